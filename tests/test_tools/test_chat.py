"""The command line of chat and completion."""

import io

import pytest

from internlm_mm.checkpoint.peft_files import export_peft
from internlm_mm.checkpoint.pretrained import convert_to_hf
from tests.trained import adapted_run, trained_run
from tools.chat import main

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture
def work_dir(tmp_path):
    return str(trained_run(tmp_path)[0])


@pytest.fixture
def type_in(monkeypatch):
    """What another program writes to this one's input."""
    return lambda *lines: monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines)))


def test_one_prompt(work_dir, capsys):
    arguments = [work_dir, '--prompt', 'def f7(x)', '--max-new-tokens', '8', '--device', 'cpu']
    assert main([*arguments, '--seed', '1']) == 0
    first = capsys.readouterr().out
    assert first.startswith('def f7(x)') and len(first) > len('def f7(x)\n')
    assert main([*arguments, '--seed', '1']) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--prompt', 'x', '--template', 'internlm2'], "--template 'internlm2' does nothing with"),
        (['--prompt', 'x', '--system', 'Shout.'], "--system 'Shout.' does nothing with --prompt"),
        (['--system', 'Shout.'], "--system 'Shout.' needs a chat template"),
    ],
)
def test_what_would_do_nothing_is_said(work_dir, options, message, capsys, type_in):
    type_in('hello')
    assert main([work_dir, '--device', 'cpu', *options]) == 2
    assert message in capsys.readouterr().err


def test_a_base_model_continues_text_until_the_input_ends(work_dir, capsys, type_in):
    type_in('def', '/set max_new_tokens 2', 'def')
    assert main([work_dir, '--max-new-tokens', '9', '--temperature', '0', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert out.startswith('The model continues what you type.')
    _, long, short = out.split('\ndef')
    assert len(short.strip()) < len(long.strip()) and long.startswith(short.rstrip())


def test_a_chat_model_chats(chat_run, capsys, type_in):
    type_in('hello', 'Who are you?', '/clear', '/system Shout.', 'hello')
    assert main([str(chat_run), '--temperature', '0', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert out.startswith('Chat with the template internlm2.')
    assert 'Hello! What can I do for you?\nA **tiny** model, 很小的模型。\nHELLO!\n' in out


def test_hugging_face_folders_chat(chat_run, tmp_path, capsys, type_in):
    convert_to_hf(chat_run, tmp_path / 'hf', dtype='float32')
    type_in('hello')
    options = ['--temperature', '0', '--device', 'cpu', '--system', 'Shout.', '--stop', 'LO']
    assert main([str(tmp_path / 'hf'), *options]) == 0
    assert '\nHEL\n' in capsys.readouterr().out


def test_a_template_may_be_chosen(work_dir, chat_run, capsys, type_in):
    type_in('/template')
    assert main([work_dir, '--template', 'internlm', '--device', 'cpu']) == 0
    assert '\ninternlm (there are' in capsys.readouterr().out
    type_in('/template')
    assert main([str(chat_run), '--template', 'none', '--device', 'cpu']) == 0
    assert '\nnone (there are' in capsys.readouterr().out
    assert main([work_dir, '--template', 'interlm', '--device', 'cpu']) == 2
    assert "'interlm'. Did you mean 'internlm'?" in capsys.readouterr().err


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


def test_adapters_are_merged_from_either_format(tmp_path, capsys):
    hf, lora, _ = adapted_run(tmp_path)
    export_peft(lora, tmp_path / 'peft')
    hf.rename(tmp_path / 'moved')
    options = ['--prompt', 'def f7(x)', '--max-new-tokens', '8', '--device', 'cpu', '--seed', '1']
    assert main([str(lora), *options]) == 2
    assert 'say with base where they are now' in capsys.readouterr().err
    answers = []
    for path in (lora, tmp_path / 'peft'):
        assert main([str(path), *options, '--base', str(tmp_path / 'moved')]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].startswith('def f7(x)')
