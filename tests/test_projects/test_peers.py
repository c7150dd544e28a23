"""What the peers are measured with, on a model of two small blocks."""

import importlib
import itertools
import json
import os
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.runs import REPOSITORY

needs_peft = pytest.mark.skipif(find_spec('peft') is None, reason='PEFT is not installed')
PEERS = REPOSITORY / 'projects' / 'peers'
PROGRAM = PEERS / 'lora_peft.py'
SMALL = ['--size', 'tiny', '--seq-len', '16', '--rows', '4', '--warmup', '1', '--steps', '2']


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python projects/peers/...` does to the search path.

    transformers' Trainer is imported with it, before a test takes packages away.
    """
    monkeypatch.syspath_prepend(PEERS)
    importlib.import_module('measuring')


def measure(
    *options: str, program: str = 'lora_peft.py', processes: int = 1
) -> subprocess.CompletedProcess:
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
    return subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(PEERS / program),
            *SMALL,
            *options,
        ],
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
    (record,) = tmp_path.glob('peer_lora_peft_tiny_*.json')
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
def test_missing_packages_are_named(peers, monkeypatch, capsys, package, options, text) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_whole_models_by_transformers(processes: int, tmp_path) -> None:
    pytest.importorskip('accelerate')
    options = ['--json', '--records', str(tmp_path)]
    done = measure(*options, program='pretrain_transformers.py', processes=processes)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report['devices'] == processes and not report['is_sharded']  # on GPUs alone
    assert report['tokens_per_second'] == pytest.approx(4 * 16 / report['framework']['median'])
    assert report['tgs'] == pytest.approx(report['tokens_per_second'] / processes)
    # Two tables, and in each of two blocks seven matrices, four biases and two norms; a norm.
    block = 4 * 64 * 64 + 3 * 64 * 96 + 4 * 64 + 2 * 64
    assert report['trained_weights'] == 2 * 512 * 64 + 2 * block + 64
    assert report['loss'] == pytest.approx(6.2383, abs=0.1)  # log 512
    assert len(list(tmp_path.glob('peer_pretrain_transformers_tiny_*.json'))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (['--micro-batch', '3'], '--rows 4 is no multiple of --micro-batch 3'),
        (['--micro-batch', '0'], '--micro-batch 0 must be at least 1'),
        (['--seq-len', '1'], '--seq-len 1 must be at least 2'),
        (['--size', '70b'], "invalid choice: '70b'"),
    ],
)
@pytest.mark.parametrize('name', ['pretrain_transformers', 'pretrain_torchtitan'])
def test_wrong_options_of_whole_models(peers, capsys, name, options, text) -> None:
    main = runpy.run_path(str(PEERS / f'{name}.py'))['main']
    with pytest.raises(SystemExit) as left:
        main([*SMALL, *options])
    assert left.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('package', ['torchtitan', 'tyro'])
def test_what_torchtitan_needs_is_named(peers, monkeypatch, capsys, package: str) -> None:
    main = runpy.run_path(str(PEERS / 'pretrain_torchtitan.py'))['main']
    for name in ('torchtitan', 'torchdata', 'tyro', 'torchao'):
        there = ModuleType(name)
        there.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, None if name == package else there)
    with pytest.raises(SystemExit):
        main(SMALL)
    assert f'{package} is not installed: see projects/peers/README' in capsys.readouterr().err


def test_torchtitan_is_told_the_same_work(peers) -> None:
    parts = runpy.run_path(str(PEERS / 'pretrain_torchtitan.py'))
    options = dict(
        warmup=1, steps=2, micro_batch=2, rows=8, seq_len=16, checkpointing='none', gathered=True
    )
    args = SimpleNamespace(**options, no_compile=False, fp8=True)
    words = parts['flags_of'](args, 'folder')
    said = dict(itertools.pairwise(words))
    assert said['--training.steps'] == '3' and said['--training.global_batch_size'] == '8'
    assert said['--parallelism.fsdp_reshard_after_forward'] == 'never'
    assert said['--model.converters'] == 'quantize.linear.float8'
    assert '--compile.enable' in words
    args.fp8 = args.gathered = False
    args.no_compile = True
    words = parts['flags_of'](args, 'folder')
    assert not {'--compile.enable', '--model.converters'} & set(words)
    for inner, width in ((11_008, 4096), (14_336, 4096), (96, 64)):  # as it works out gates
        factor = parts['gate_factor'](inner, width)
        hidden = int(factor * int(2 * 4 * width / 3))
        assert inner * ((hidden + inner - 1) // inner) == inner
    stream = parts['TokenStream'](50, 16)
    first, labels = next(iter(stream))
    assert first['input'].shape == labels.shape == (16,)
    assert torch.equal(first['input'][1:], labels[:-1])
