"""`tools/convert_config.py`."""

from pathlib import Path

import pytest

from internlm_mm.__main__ import main as command
from internlm_mm.engine.dry_run import dry_run
from internlm_mm.utils.config import load_config
from tests.internlm_configs import SFT_2023, TINY


def run(*arguments: object) -> int:
    return command(['convert_config', *map(str, arguments)])


def test_prints_the_table_and_writes_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'ours.py'
    assert run(SFT_2023, out, '--gpus', 8) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f'written: {out} (') and last.endswith(' 0 unknown)')
    assert any('data.micro_bsz=2' in row and 'train_cfg.micro_batch_size=2' in row for row in rows)
    assert load_config(out).train_cfg.global_batch_size == 64


def test_what_it_writes_passes_a_dry_run(tmp_path: Path) -> None:
    out = tmp_path / 'tiny.py'
    assert run(TINY, out, '--gpus', 1) == 0
    config = load_config(out)
    config.work_dir, config.launcher = str(tmp_path / 'work'), 'none'
    report = dry_run(config)
    assert '4 rows = 128 tokens: 2 micro-batches of 2 rows' in report


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['7B_sft.py', 'out.py'], "error: no config '7B_sft.py'"),
        ([SFT_2023, 'out.json'], "error: 'out.json': a config is a Python file, out.py"),
        ([SFT_2023, 'out.py', '--gpus', '12'], 'error: --gpus 12: parallel.zero1=8 does not'),
        ([SFT_2023, 'out.py', '--data', 'tokens'], 'error: --data tokens: no such folder'),
        ([SFT_2023, 'out.py', '--tokenizer', 'words'], 'error: --tokenizer words: no such file'),
        ([SFT_2023, 'there.py'], 'error: there.py exists; choose another file or overwrite it'),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('there.py').touch()
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['there.py']
