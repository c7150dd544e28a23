"""The command line: options, exit codes, messages."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.verify.cli import main
from internlm_mm.verify.compare import LIMIT_OF_ONE
from tests.helpers import TINY

CPU = ['--device', 'cpu']


def test_a_grid_and_a_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / 'cells.json'
    options = ['--precision', 'float64,float32', '--json', str(path), '--processes', '1']
    assert main([str(TINY), *CPU, *options]) == 0
    shown = capsys.readouterr()
    assert 'tiny.py in float64 on cpu' in shown.out and 'in float32' in shown.out
    assert shown.out.splitlines()[-1] == 'all 12 checks passed'
    assert '1/1 one process' in shown.err
    reports = json.loads(path.read_text())['reports']
    assert [report['precision'] for report in reports] == ['float64', 'float32']
    for report, tolerance in zip(reports, (1e-9, 1e-5), strict=True):
        for cell in report['cells']:
            assert cell['layout'] == 'one process' and cell['passed'] is True
            assert cell['max_relative_difference'] < tolerance


def test_a_deviation_is_an_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.setitem(LIMIT_OF_ONE, 'float64', 0.0)
    options = ['--precision', 'float64', '--processes', '1', '--resume-pairs', 'none']
    assert main([str(TINY), *CPU, *options]) == 1
    out = capsys.readouterr().out
    assert 'What deviates first' in out and 'checks failed' in out.splitlines()[-1]
    assert 'may be rounding' not in out


def test_half_precision_points_to_float64(monkeypatch, capsys) -> None:
    monkeypatch.setitem(LIMIT_OF_ONE, 'bfloat16', 0.0)
    options = ['--precision', 'bfloat16', '--processes', '1', '--resume-pairs', 'none']
    assert main([str(TINY), *CPU, *options]) == 1
    hint = capsys.readouterr().out.splitlines()[-2]
    assert hint == 'In bfloat16 this may be rounding: --precision float64 tells it from an error'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--layouts', 'tensr=2'], "Did you mean 'tensor'"),
        (['--precision', 'float63'], "Did you mean 'float64'"),
        (['--processes', '0'], 'must be at least 1'),
        (['--cfg-options', 'model.num_head=2'], "Did you mean 'num_heads'"),
        (['--cfg-options', 'optim_wrapper.optimizer.type=Adam'], 'AdamW'),
    ],
)
def test_mistakes(capsys, options: list[str], message: str) -> None:
    assert main([str(TINY), *CPU, *options]) == 2
    assert message in capsys.readouterr().err


def test_no_config(capsys) -> None:
    assert main(['no_such_config', *CPU]) == 2
    assert 'no config' in capsys.readouterr().err


def test_missing_data_is_told_and_random_data_only_when_asked(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data/ is
    asked = ['internlm_tiny_pretrain', *CPU, '--processes', '1', '--resume-pairs', 'none']
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert 'data/python_stdlib' in error and '--random-data' in error
    assert main([*asked, '--random-data']) == 0


def test_a_config_without_model_takes_that_of_its_folder(tmp_path: Path, capsys) -> None:
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / 'hf')
    config = tmp_path / 'more.py'
    config.write_text(
        'from mmengine.config import read_base\n'
        'with read_base():\n'
        '    from internlm_mm.configs._base_.datasets.random_tokens import *\n'
        '    from internlm_mm.configs._base_.default_runtime import *\n'
        '    from internlm_mm.configs._base_.schedules.adamw_cosine import *\n'
        'from internlm_mm.engine import TokenTrainLoop\n'
        f'load_from = {str(tmp_path / "hf")!r}\n'
        'train_cfg = dict('
        'type=TokenTrainLoop, max_iters=4, global_batch_size=4, micro_batch_size=1)\n'
        'train_dataloader.dataset.update(seq_len=64, vocab_size=96)\n'
    )
    options = ['--device', 'cpu', '--processes', '1', '--resume-pairs', 'none']
    assert main([str(config), *options]) == 0
    assert 'checks passed' in capsys.readouterr().out
