"""The terminal, without a terminal."""

import io
import json

import pytest

from internlm_mm.inference import Sampling
from internlm_mm.inference.terminal import Terminal, complete


class Echo:
    """Continues every prompt with itself, backwards; refuses the empty one.

    To a chat it answers with the number of tokens that it was shown; its tokens are characters.
    """

    add_bos = True
    bos_id = eos_id = None

    def __init__(self):
        self.tokenizer = self
        self.prompts = []
        self.samplings = []
        self.stop_after = None  # pieces, after which Ctrl-C is pressed

    def encode(self, text):
        return list(text)

    def token_id(self, token):
        return None

    def stream(self, prompt, sampling):
        if not prompt:
            raise ValueError('a prompt is empty')
        yield from reversed(prompt)

    def stream_ids(self, ids, sampling):
        if len(ids) > 600:
            raise ValueError('a prompt of many tokens leaves no room')
        self.prompts.append(''.join(ids))
        self.samplings.append(sampling)
        for number, piece in enumerate(('<', f'{len(self.prompts)}', '>')):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield piece


def typed(*lines):
    """Lines as `input` gives them; exceptions are raised."""
    rest = iter(lines)

    def read(prompt):
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def run(echo, *lines, template='chatml', system=None, sampling=None):
    terminal = Terminal(echo, template, sampling or Sampling(), system, typed(*lines))
    terminal.run()
    return terminal


def chat(terminal):
    return [(m['role'], m['content']) for m in terminal.dialogue.whole()]


def test_complete():
    out = io.StringIO()
    complete(Echo(), 'abc', Sampling(), out)
    assert out.getvalue() == 'abccba\n'


def test_nothing_is_written_for_a_prompt_that_fails():
    out = io.StringIO()
    with pytest.raises(ValueError, match='empty'):
        complete(Echo(), '', Sampling(), out)
    assert out.getvalue() == ''


def test_text_is_continued_without_a_template(capsys):
    terminal = run(
        Echo(), 'ab', '', 'c\\', 'd', '"""', 'e', '', 'f', '"""', '/retry', template=None
    )
    printed = capsys.readouterr()
    assert printed.out.startswith('The model continues what you type.')
    assert printed.out.split('\n', 2)[2] == 'abba\nc\ndd\nc\ne\n\nff\n\ne\ne\n\nff\n\ne\n\n'
    assert printed.err == '' and chat(terminal) == []


def test_a_chat_has_a_history(capsys):
    echo = Echo()
    terminal = run(echo, 'Hi', 'Ho', '/exit', 'never', system='S')
    assert capsys.readouterr().out.split('\n', 2)[2] == '<1>\n<2>\n'
    assert echo.prompts[1] == (
        '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
        '<|im_start|>assistant\n<1><|im_end|>\n<|im_start|>user\nHo<|im_end|>\n'
        '<|im_start|>assistant\n'
    )
    assert chat(terminal) == [
        ('system', 'S'),
        ('user', 'Hi'),
        ('assistant', '<1>'),
        ('user', 'Ho'),
        ('assistant', '<2>'),
    ]


def test_two_slashes_are_one(capsys):
    assert chat(run(Echo(), '//etc', ' /x')) == [
        ('user', '/etc'),
        ('assistant', '<1>'),
        ('user', ' /x'),
        ('assistant', '<2>'),
    ]
    run(Echo(), '/ect')
    assert 'no command /ect' in capsys.readouterr().err


def test_retry_and_undo(capsys):
    echo = Echo()
    terminal = run(echo, 'Hi', 'Ho', '/retry', '/undo', '/undo', '/undo', '/retry')
    assert echo.prompts[1] == echo.prompts[2] and len(echo.prompts) == 3
    assert chat(terminal) == []
    assert capsys.readouterr().err == 'error: nothing has been said yet\n' * 2


def test_clear_and_system(capsys):
    terminal = run(Echo(), '/system', '/system Be brief.', 'Hi', '/clear', '/system', '/history')
    assert chat(terminal) == [('system', 'Be brief.')]
    out = capsys.readouterr().out
    assert 'There is no system prompt.\n<1>\nBe brief.\n[system] Be brief.\n' in out
    assert chat(run(Echo(), '/system none', 'Hi', system='S'))[0] == ('system', '')


def test_the_templates_own_system_prompt(capsys):
    run(Echo(), '/system', template={'type': 'chatml', 'default_system': 'D'})
    assert capsys.readouterr().out.split('\n', 2)[2] == 'D\n\n'


def test_history_shows_calls(tmp_path, capsys):
    function = {'name': 'f', 'arguments': '{"x": 1}'}
    messages = [
        {'role': 'user', 'content': 'Q'},
        {'role': 'assistant', 'content': None, 'tool_calls': [{'function': function}]},
        {'role': 'tool', 'content': 'R'},
    ]
    (tmp_path / 'c.json').write_text(json.dumps(messages))
    run(Echo(), f'/load {tmp_path / "c.json"}', '/history')
    assert '[user] Q\n[assistant] \n  f({"x": 1})\n[tool] R\n' in capsys.readouterr().out


def test_ctrl_c_keeps_what_has_come(capsys):
    echo = Echo()
    echo.stop_after = 2
    assert chat(run(echo, 'Hi')) == [('user', 'Hi'), ('assistant', '<1')]
    echo.stop_after = 0
    assert chat(run(echo, 'Hi')) == []
    assert capsys.readouterr().err == ''


def test_ctrl_c_at_the_prompt_twice_leaves(capsys):
    c = KeyboardInterrupt()
    terminal = run(Echo(), c, 'Hi', c, c, 'never')
    assert chat(terminal) == [('user', 'Hi'), ('assistant', '<1>')]
    assert capsys.readouterr().out.count('once more') == 2


def test_ctrl_c_in_a_block_drops_it():
    terminal = run(Echo(), '"""', 'a', KeyboardInterrupt(), 'b')
    assert chat(terminal)[0] == ('user', 'b')


def test_an_error_is_a_line_and_the_question_is_gone(capsys):
    terminal = run(Echo(), 'Hi', 'x' * 600, 'Ho')
    assert capsys.readouterr().err == 'error: a prompt of many tokens leaves no room\n'
    assert [content for _, content in chat(terminal)] == ['Hi', '<1>', 'Ho', '<2>']


def test_a_retry_that_fails_changes_nothing(capsys):
    terminal = run(Echo(), 'Hi', f'/system {"x" * 600}', '/retry')
    assert 'leaves no room' in capsys.readouterr().err
    assert chat(terminal)[1:] == [('user', 'Hi'), ('assistant', '<1>')]


def test_save_and_load(tmp_path, capsys):
    file = tmp_path / 'a b.json'
    run(Echo(), 'Hi', f'/save {file}', 'Ho', f'/save {file}', system='S')
    record = json.loads(file.read_text())
    assert record['template'] == 'chatml' and len(record['messages']) == 5
    other = Echo()
    terminal = run(other, f'/load {file}', 'Hu', f'/save {file}', template='llama3')
    assert len(terminal.dialogue.messages) == 6 and terminal.dialogue.system == 'S'
    printed = capsys.readouterr()
    assert 'written with the template chatml; this is llama3' in printed.out
    assert printed.err == f'error: {file} exists, and not from here; give another name\n'
    assert len(json.loads(file.read_text())['messages']) == 5


def test_settings(capsys):
    echo = Echo()
    lines = ['/set temperature 0.5', '/set stop ["a", "b"]', '/set top_k 7', 'Hi', '/set']
    run(echo, *lines, '/set top_p 2', '/set temprature 1')
    used = echo.samplings[0]
    assert (used.temperature, used.top_k) == (0.5, 7) and used.stop[:2] == ('a', 'b')
    printed = capsys.readouterr()
    assert 'temperature 0.5\n' in printed.out and 'stop ["a", "b"]\n' in printed.out
    assert 'top_p=2.0 is not in (0, 1]' in printed.err
    assert "'temprature'. Did you mean 'temperature'?" in printed.err


def test_templates_change(capsys):
    echo = Echo()
    lines = [
        '/template',
        '/template internlm',
        'Hi',
        '/template none',
        'ab',
        '/undo',
        '/template x',
    ]
    run(echo, *lines, template='llama3')
    assert echo.prompts == ['<|User|>:Hi<eoh>\n<|Bot|>:']
    printed = capsys.readouterr()
    assert 'llama3 (there are chatml, internlm, ' in printed.out and 'abba\n' in printed.out
    assert 'error: the model continues text here; /template NAME begins a chat\n' in printed.err
    assert "error: there is no chat template 'x'" in printed.err


def test_help_lists_every_command_and_extra_words_are_told(capsys):
    names = ['help', 'clear', 'history', 'retry', 'undo', 'exit']
    run(Echo(), '/help', *(f'/{name} x' for name in names), '/save', '/load', '/load /no/such')
    printed = capsys.readouterr()
    for name in [*names, 'system', 'save', 'load', 'template', 'set']:
        assert f'\n/{name}' in printed.out
    errors = printed.err.splitlines()
    assert errors[: len(names)] == [f'error: /{name} stands alone' for name in names]
    assert errors[len(names) :][:2] == [
        'error: /save takes the name of a file',
        'error: /load takes the name of a file',
    ]
    assert '/no/such' in errors[-1]
