import os
import socket
from pathlib import Path

import pytest

from internlm_mm.sandbox.proof import Traps


def good(variables: str = 'HOME PATH') -> str:
    return ''.join(f'{number}: blocked (1)\n' for number in range(13)) + f'variables: {variables}\n'


@pytest.fixture
def traps(tmp_path: Path):
    one = Traps(tmp_path)
    yield one
    one.close()


def test_a_good_report(traps: Traps) -> None:
    assert traps.judge(good(), {'HOME', 'PATH'}) is None
    assert traps.judge(good(), {'HOME', 'PATH', 'MORE'}) is None


@pytest.mark.parametrize(
    ('printed', 'reason'),
    [
        ('', 'did not come to its end'),
        (good().replace('0: blocked (1)\n', '', 1), 'did not come to its end'),
        (good() .replace('5: blocked (1)', 'the network: OPEN'), 'open: the network'),
        (good('HOME PATH AWS_KEY'), 'AWS_KEY'),
    ],
)  # fmt: skip
def test_a_bad_report(traps: Traps, printed: str, reason: str) -> None:
    assert reason in (traps.judge(printed, {'HOME', 'PATH'}) or '')


def test_the_host_believes_its_own_eyes(traps: Traps, tmp_path: Path) -> None:
    """A session that says that all is blocked, but did what it must not."""
    port = int(traps.cell(True).rsplit('attempt_all(', 1)[1].split(', ')[1])
    with socket.create_connection(('127.0.0.1', port)):
        assert traps.judge(good(), {'HOME', 'PATH'}) == 'a service of the host was reached'
    assert traps.judge(good(), {'HOME', 'PATH'}) is None
    (tmp_path / 'canary.new').touch()
    assert traps.judge(good(), {'HOME', 'PATH'}) == 'a file of the host was changed'
    (tmp_path / 'canary.new').unlink()
    (tmp_path / 'canary').write_text('changed')
    assert traps.judge(good(), {'HOME', 'PATH'}) == 'a file of the host was changed'


def test_everybody_can_spring_the_traps(traps: Traps, tmp_path: Path) -> None:
    assert (tmp_path / 'canary').stat().st_mode & 0o777 == 0o666
    assert str(os.getpid()) in traps.cell(alone=False).splitlines()[-1]
