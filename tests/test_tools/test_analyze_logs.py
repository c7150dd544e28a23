"""The command that compares runs."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from internlm_mm.utils.curves import read_run
from tests.helpers import tiny_runner

TOOL = Path(__file__).parents[2] / 'tools' / 'analyze_logs.py'


def analyze(*arguments: object) -> int:
    spec = spec_from_file_location('analyze_logs', TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def test_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_runner(tmp_path / 'run', custom_hooks=[dict(type='EvaluationHook', interval=2)]).train()
    capsys.readouterr()
    out = tmp_path / 'curves.png'
    arguments = ['--keys', 'loss', 'val/loss', 'lr', '--x', 'tokens', '--out', out, '--summary']
    assert analyze(tmp_path / 'run', *arguments) == 0
    header, row, path = capsys.readouterr().out.splitlines()
    assert 'val/loss best' in header and row.split()[:3] == ['run', '6', '768']
    assert Path(path) == out and out.is_file()
    run = read_run(tmp_path / 'run')
    assert run.series('consumed_tokens')[6] == 6 * 4 * 32
    assert run.mean_speed() > 0


def test_the_table_is_what_comes_without_options(tmp_path: Path, capsys) -> None:
    tiny_runner(tmp_path / 'run').train()
    capsys.readouterr()
    assert analyze(tmp_path / 'run') == 0
    assert (
        capsys.readouterr().out.split()[:8]
        == 'run steps tokens tokens/s loss last loss best'.split()
    )


def test_differences_of_seeds(tmp_path: Path, capsys) -> None:
    for seed in (0, 1):
        progress = dict(type='ProgressHook', interval=1)
        tiny_runner(
            tmp_path / f'seed_{seed}',
            randomness=dict(seed=seed),
            default_hooks=dict(progress=progress),
        ).train()
    capsys.readouterr()
    runs = [tmp_path / 'seed_0', tmp_path / 'seed_1']
    assert analyze(*runs, '--differences', '--last', '0.5') == 0
    _, line = capsys.readouterr().out.splitlines()
    first, second = (read_run(run).series('loss') for run in runs)
    apart = sum(abs(second[step] - first[step]) for step in (4, 5, 6))
    assert f'{apart / sum(first[step] for step in (4, 5, 6)):.3%}' in line and '4 to 6: 3' in line


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['run', '--keys', 'los'], "has logged no 'los'. Did you mean 'loss'?"),
        (['run', '--out', 'x.png', '--smooth', '0'], 'smooth=0 must be at least 1'),
        (['run', '--differences'], 'differences need two runs at least'),
        (['run', 'run', '--differences', '--last', '2'], 'last=2.0 must be a share'),
        (['nowhere'], 'no run has logged here'),
    ],
)
def test_wrong_input(arguments, message, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'run' / '20260101_000000' / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1, "loss": 2.0}\n')
    assert analyze(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and message in captured.err
