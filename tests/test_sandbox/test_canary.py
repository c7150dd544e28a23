"""Without any confinement, every attempt of the canary must succeed: it is no dummy."""

import os
import subprocess
import sys
from pathlib import Path

from internlm_mm.sandbox.proof import Traps


def test_an_open_door_is_seen(tmp_path: Path) -> None:
    traps = Traps(tmp_path)
    try:
        for alone in (False, True):
            done = subprocess.run(
                [sys.executable, '-c', traps.cell(alone)],
                capture_output=True,
                text=True,
                check=True,
                env={'PATH': '/usr/bin', 'SECRET': 'x'},
            )
            lines = dict(line.split(': ', 1) for line in done.stdout.splitlines())
            open_doors = {name for name, what in lines.items() if what == 'OPEN'}
            expected = {
                'reading a file of the host', 'writing a file of the host',
                'making a file on the host', 'the network', 'a socket of the host',
                'a signal to the host', 'memory outside of all counts',
                'processes in sight' if alone else 'processes of the host',
            }  # fmt: skip
            if os.getuid() == 0:
                expected |= {'reading the passwords of the host', 'running as root'}
                expected |= {'another root', 'becoming root'}
            assert expected <= open_doors
            assert 'SECRET' in lines['variables']
            assert traps.judge(done.stdout, {'PATH'}) is not None
    finally:
        traps.close()
