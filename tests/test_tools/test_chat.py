"""The command line of completion."""

import builtins

import pytest

from tests.trained import trained_run
from tools.chat import main

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture
def work_dir(tmp_path):
    return str(trained_run(tmp_path)[0])


def test_one_prompt(work_dir, capsys):
    arguments = [work_dir, '--prompt', 'def f7(x)', '--max-new-tokens', '8', '--device', 'cpu']
    assert main([*arguments, '--seed', '1']) == 0
    first = capsys.readouterr().out
    assert first.startswith('def f7(x)') and len(first) > len('def f7(x)\n')
    assert main([*arguments, '--seed', '1']) == 0
    assert capsys.readouterr().out == first


def test_until_the_input_ends(work_dir, capsys, monkeypatch):
    lines = iter(['def'])

    def read(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(builtins, 'input', read)
    assert main([work_dir, '--max-new-tokens', '4', '--device', 'cpu']) == 0
    assert '\ndef' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--prompt', 'x', '--top-p', '2'], 'top_p=2.0'),
        (['--prompt', 'x' * 500], 'leaves no room in max_seq_len=64'),
    ],
)
def test_errors_are_one_line(work_dir, arguments, message, capsys):
    assert main([work_dir, *arguments, '--device', 'cpu']) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_no_model(tmp_path, capsys):
    assert main([str(tmp_path / 'nothing'), '--prompt', 'x']) == 2
    assert 'nothing does not exist' in capsys.readouterr().err
