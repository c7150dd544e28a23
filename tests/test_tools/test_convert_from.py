"""The command line; what it does is tested in test_checkpoint/test_convert_from.py."""

import pytest
import torch

from internlm_mm.checkpoint.step_folders import read_config
from tests.internlm_oracle import SIZES, full_state, write_shards
from tools.convert_from import main


def test_what_it_prints(tmp_path, capsys):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, tp=2)
    arguments = [str(tmp_path / 'x'), str(tmp_path / 'out')]
    assert main(arguments) == 2
    assert '--set num_heads=N' in capsys.readouterr().err
    more = ['--set', 'num_heads=4', 'norm_eps=1e-6', '--format', 'internlm-2023']
    assert main([*arguments, *more, '--dtype', 'bfloat16']) == 0
    out = capsys.readouterr().out
    assert out.startswith('InternLM, ') and 'parameters in bfloat16, no tokenizer' in out
    assert out.endswith(f'written: {tmp_path / "out"}\n')
    model = read_config(tmp_path / 'out')['model']
    assert model['num_heads'] == 4 and model['norm_eps'] == 1e-6
    assert main([*arguments, *more]) == 2
    assert 'exists' in capsys.readouterr().err
    assert main([*arguments, *more, '--overwrite']) == 0


@pytest.mark.parametrize('option', [['--format', 'meta'], ['--dtype', 'int8'], ['--set']])
def test_unknown_options(option, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(tmp_path / 'out'), *option])
    assert stopped.value.code == 2


def test_a_setting_without_a_value(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / 'out'), '--set', 'num_heads']) == 2
    assert "--set 'num_heads' is not of the form" in capsys.readouterr().err


def test_pickled_code(tmp_path, capsys):
    import os

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    (tmp_path / 'x').mkdir()
    torch.save({'model.norm.weight': Code()}, tmp_path / 'x' / 'model_tp0_pp0.pt')
    assert main([str(tmp_path / 'x'), str(tmp_path / 'out')]) == 2
    assert 'model_tp0_pp0.pt holds pickled code or objects' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x']
