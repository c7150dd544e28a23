import importlib.util
import json
from pathlib import Path

import pytest

from internlm_mm.__main__ import main
from tests.helpers import TINY

COMMAND = ['benchmark', str(TINY), '--warmup', '1', '--steps', '2', '--blocks', '1']


def test_text_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, '--breakdown', '--cfg-options', 'strategy.recompute=0.5']) == 0
    captured = capsys.readouterr()
    assert ' tokens/s/device (' in captured.out and 'products reach here' in captured.out
    assert '\n  attention ' in captured.out and '\n  activations ' in captured.out
    (path,) = (tmp_path / 'work_dirs' / 'benchmarks').iterdir()
    assert f'kept in {path.relative_to(tmp_path)}' in captured.err
    record = json.loads(path.read_text())
    assert record['command'][0] == 'tools/benchmark.py' and record['name'] == 'tiny'
    assert record['recomputed_share'] == 0.5
    assert record['hardware_tflops_full'] > record['tflops_full'] > record['tflops_causal']
    parts = record['breakdown']['parts_ms']
    whole = sum(parts.values()) + record['breakdown']['remainder_ms']
    assert whole == pytest.approx(record['framework']['median'] * 1e3)
    assert sum(record['memory']['kinds'].values()) == record['memory']['bytes'] > 0
    assert record['host_resident_bytes'] >= record['peak_memory_bytes'] > 2**25


def test_json_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, '--json', '--no-records', '--against', 'bare']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['of_matmul_full'] > 0 and 'breakdown' not in report
    assert report['bare']['steps'] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec('torchao') is None, reason='torchao is not installed')
@pytest.mark.filterwarnings('ignore')  # torchao's, of its own use of torch
def test_products_in_8_bits_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    options = ['strategy.float8.emulate=True', 'strategy.precision.param=bfloat16']
    assert main([*COMMAND, '--no-records', '--cfg-options', *options]) == 0
    out = capsys.readouterr().out
    assert ', bfloat16 with products in fp8 (tensorwise, emulated), gradients' in out
    assert 'reach here' not in out  # none were measured


@pytest.mark.parametrize(
    ('options', 'unknown'),
    [
        (['model.adapter.rank=4'], 'model.adapter'),
        (['optim_wrapper.clip_grad=None'], 'optim_wrapper.clip_grad=None'),
        (['strategy.offload=True', 'optim_wrapper.optimizer=None'], 'strategy.offload=True'),
        (
            ['optim_wrapper.optimizer.type=MuonAdamW', 'optim_wrapper.optimizer.fused=False'],
            'optim_wrapper.optimizer.type=MuonAdamW',
        ),
    ],
)
def test_what_the_bare_loop_does_not_know_is_refused_first(
    options: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND, '--no-records', '--against', 'bare', '--cfg-options', *options]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err == f'error: --against bare: the bare loop knows no {unknown}\n'
    assert not captured.out


def test_a_mistake_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in (
        ('model.hiden_size=3', "Did you mean 'hidden_size'"),
        ('strategy.recompute=7', 'error: strategy.recompute=7'),
        ('train_cfg=None', f'error: {TINY}: has no training steps to measure: it lacks train_cfg='),
        ('train_cfg=3', f'error: {TINY}: has no training steps to measure: it lacks train_cfg='),
        ('optim_wrapper=None', 'to measure: it lacks optim_wrapper=dict(...)'),
        ('optim_wrapper.optimizer=None', 'error: optim_wrapper.optimizer=None: expected dict('),
        ('default_hooks=[1]', 'error: default_hooks=[1]: expected a dict of hooks by role'),
    ):
        assert main([*COMMAND, '--no-records', '--cfg-options', option]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert message in line


def test_a_launcher_that_started_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('RANK', raising=False)
    assert main([*COMMAND, '--no-records', '--launcher', 'pytorch']) == 2
    assert capsys.readouterr().err == (
        'error: --launcher pytorch: RANK is not set. Start with: torchrun --nproc-per-node N '
        'tools/benchmark.py CONFIG --launcher pytorch\n'
    )


def test_a_file_that_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'a.py'
    path.write_text('def f(): return 1\n')
    assert main(['benchmark', str(path), '--no-records']) == 2
    assert capsys.readouterr().err == (
        f'error: {path}: has no training steps to measure: it lacks model=dict(...), '
        'train_dataloader=dict(...), train_cfg=dict(...), optim_wrapper=dict(...)\n'
    )


def test_without_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, '--no-records', '--cfg-options', 'default_hooks=None']) == 0
    assert ' tokens/s/device (' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--steps', '0'], '--steps 0: must be at least 1'),
        (['--steps', '1'], '--steps 1 --blocks 1: measure at least 2 steps'),
        (['--warmup', '-1'], '--warmup -1: must be at least 0'),
        (['--profiled-steps', '3'], '--profiled-steps 3: give it with --breakdown'),
        (['--breakdown', '--profiled-steps', '0'], '--profiled-steps 0: must be at least 1'),
        (['--records', str(TINY)], f'--records {TINY}: {TINY} is no folder'),
        (['--records', f'{TINY}/a/b'], f'--records {TINY}/a/b: {TINY} is no folder'),
        (['--records', '/proc/nowhere/x'], '/x: nothing can be written into /proc: '),
    ],
)
def test_what_cannot_be_measured_or_kept_is_refused_first(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and not captured.out


def test_records_are_kept_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='2'):
        main([*COMMAND, '--no-records', '--records', 'work_dirs/benchmarks'])
    assert '--records: not allowed with argument --no-records' in capsys.readouterr().err
