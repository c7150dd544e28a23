"""What the peers are measured with, on a model of two small blocks."""

import json
import os
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest

from tests.runs import REPOSITORY

needs_peft = pytest.mark.skipif(find_spec('peft') is None, reason='PEFT is not installed')
PROGRAM = REPOSITORY / 'projects' / 'peers' / 'lora_peft.py'
SMALL = ['--size', 'tiny', '--seq-len', '16', '--rows', '4', '--warmup', '1', '--steps', '2']


def measure(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *SMALL, *options],
        env=os.environ | {'PYTHONPATH': str(REPOSITORY), 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--checkpointing', '--adapter-dtype', 'bfloat16']])
def test_steps_are_timed_under_the_keys_of_our_benchmark(options: list[str], tmp_path) -> None:
    done = measure('--json', '--records', str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report['step_seconds']) == report['framework']['steps'] == 2
    assert report['tgs'] == pytest.approx(4 * 16 / report['framework']['median'])
    # Rank 16 over four matrices of 64 x 64 and three of 64 x 96 in each of two blocks.
    assert report['trained_weights'] == 2 * 16 * (4 * (64 + 64) + 3 * (64 + 96))
    assert report['loss'] == pytest.approx(6.2383, abs=0.1)  # log 512: nothing is learnt of chance
    (record,) = tmp_path.glob('peer_lora_tiny_*.json')
    assert json.loads(record.read_text())['tgs'] == report['tgs']


@pytest.mark.slow
def test_rows_that_do_not_divide_are_refused() -> None:
    done = measure('--micro-batch', '3')
    assert done.returncode == 2 and '--rows 4 is no multiple of --micro-batch 3' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('package', 'options', 'text'),
    [
        ('peft', [], 'peft is not installed: see projects/peers/README.md'),
        ('liger_kernel', ['--liger'], 'liger-kernel is not installed, which --liger needs: see'),
        ('bitsandbytes', ['--four-bit'], 'bitsandbytes is not installed, which --four-bit needs'),
    ],
)
def test_missing_packages_are_named(monkeypatch, capsys, package, options, text) -> None:
    if package != 'peft':
        monkeypatch.setitem(sys.modules, 'peft', ModuleType('peft'))
        sys.modules['peft'].__spec__ = ModuleSpec('peft', None)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    main = runpy.run_path(str(PROGRAM))['main']
    for argv, code in (([*SMALL, *options], 2), (['--help'], 0)):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == code
    printed = capsys.readouterr()
    assert text in printed.err and '--four-bit' in printed.out
