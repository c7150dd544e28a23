"""The chat with tools, all of it that needs no Lagent; test_lagent_chat_lagent.py has the rest."""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm_mm.agents import Agent, Toolbox
from internlm_mm.inference import Sampling
from internlm_mm.sandbox import Sandbox, SandboxError, Session
from internlm_mm.tokenizers import build_template, read_answer
from tests.chat_server import ScriptServer, streamed
from tests.conversations import call, internlm_model
from tests.pictures import RIGHT
from tests.runs import REPOSITORY

PROJECT = REPOSITORY / 'projects' / 'lagent_chat'
CHECK_DATA = REPOSITORY / 'projects' / 'tool_agent' / 'check_data.py'
CONFIG = REPOSITORY / 'projects' / 'tool_agent' / 'configs' / 'internlm2_7b_agent.py'


@pytest.fixture(autouse=True)
def project(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python projects/lagent_chat/chat.py` does to the search path."""
    monkeypatch.syspath_prepend(PROJECT)


@pytest.fixture(scope='module')
def sandbox() -> Iterator[Sandbox]:
    try:
        box = Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    with box:
        yield box


@pytest.fixture
def session(sandbox: Sandbox) -> Iterator[Session]:
    with sandbox.session() as one:
        yield one


def program(path: Path):
    """A file of a project as a module."""
    spec = importlib.util.spec_from_file_location(f'{path.parent.name}_{path.stem}', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def chat():
    return program(PROJECT / 'chat.py').main


class Script:
    """A model that says its lines in turn; exceptions are raised, functions called."""

    name = 'scripted'

    def __init__(self, *lines, template='internlm2'):
        self.template = build_template(template)
        self.sampling = Sampling()
        self.lines = list(lines)
        self.prompts: list[list[dict]] = []

    def __call__(self, messages, tools):
        self.prompts.append([dict(message) for message in messages])
        line = self.lines.pop(0)
        for item in line if isinstance(line, list) else [line]:
            if isinstance(item, BaseException):
                raise item
            if callable(item):
                item()
                continue
            text = self.spell(item)
            yield from (text[i : i + 3] for i in range(0, len(text), 3))

    def spell(self, line):
        if isinstance(line, str):
            return line
        message = {'role': 'assistant', 'content': None} | line
        segments = self.template.segments(
            [{'role': 'user', 'content': '?'}, message], [{'function': {'name': 'f'}}]
        )
        text = ''.join(segment.text for segment in segments if segment.answer)
        return text.removesuffix(self.template.stop[0])


def asks(name, arguments, content='I ask.'):
    return {'content': content, 'tool_calls': [call(name, arguments, 'x')]}


class Shown:
    text, images, ok = 'a picture', (RIGHT,), True


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def draw() -> Shown:
    """Draw."""
    return Shown()


def flood() -> str:
    """Too much."""
    return '\x1b[31mred' + 'x' * 3_000_000


def broken() -> None:
    """Raises."""
    raise KeyError('nothing here')


def typed(*lines):
    rest = iter(lines)

    def read(prompt):
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def terminal(folder: Path, model: Script, *lines, tools=(add, draw, flood, broken), **options):
    from lagent_chat.folder import SessionFolder
    from lagent_chat.terminal import AgentTerminal
    from lagent_chat.toolbox import ChatTools

    box = tools if isinstance(tools, Toolbox) else ChatTools(Toolbox(tools).tools.values())
    loop = Agent(model, model.template, box, **options)
    line = AgentTerminal(
        loop, model, box.declarations(), SessionFolder(folder), None, typed(*lines)
    )
    line.run()
    return line


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'trace.jsonl').read_text().splitlines()]


def roles(messages: list[dict]) -> str:
    return ''.join(message['role'][0] for message in messages)


# Plugins


PLUGINS = '''
import asyncio
from typing import Annotated, Literal
from lagent.actions import BaseAction, tool_api
from lagent.schema import ActionReturn, ActionStatusCode

@tool_api
def power(base: float, exponent: int = 2) -> float:
    """Raise a number.

    Args:
        base (float): What is raised.
        exponent (int): How often.
    """
    return base ** exponent

@tool_api(exclude_arguments=['secret'])
def hide(a: Annotated[int, 'shown'], secret: int = 7) -> int:
    """Hide."""
    return a + secret

def helper() -> None:
    """No tool."""

class Single(BaseAction):
    """One tool.

    More about it.
    """

    def run(self, text: str) -> ActionReturn:
        if not text:
            return ActionReturn(errmsg='empty', state=ActionStatusCode.API_ERROR)
        parts = [dict(type='text', content=text), dict(type='file', content='a.csv')]
        return ActionReturn(result=parts)

class Kit(BaseAction):
    """Several."""

    def __init__(self, start: int = 10) -> None:
        super().__init__()
        self.start = start

    @tool_api
    def second(self, mode: Literal['x', 'y']) -> dict:
        """Say which."""
        return {'mode': mode}

    @tool_api
    async def first(self, n: int) -> int:
        """Wait."""
        await asyncio.sleep(0)
        return self.start + n
'''


def plugins(folder: Path, text: str) -> Path:
    file = folder / 'mine.py'
    file.write_text(text)
    return file


def test_plugins_of_a_file(tmp_path: Path) -> None:
    from lagent_chat.plugins import load_plugins

    box = Toolbox(load_plugins(plugins(tmp_path, PLUGINS)))
    assert list(box.tools) == ['power', 'hide', 'Single', 'Kit.second', 'Kit.first']
    assert box.tools['power'].parameters['properties']['base'] == {
        'type': 'number',
        'description': 'What is raised.',
    }
    shown = box.tools['hide'].parameters['properties']
    assert shown == {'a': {'type': 'integer', 'description': 'shown'}}
    assert box.tools['Single'].description == 'One tool.'
    assert [box.call(name, arguments).text for name, arguments in [
        ('power', {'base': 3}), ('hide', {'a': 1}), ('Kit.second', {'mode': 'x'}),
        ('Kit.first', {'n': 1}), ('Single', {'text': 'hi'}),
    ]] == ['9', '8', '{"mode": "x"}', '11', 'hi\n[file](a.csv)']  # fmt: skip
    assert box.call('Single', {'text': ''}).status == 'error'
    assert box.call('hide', {'a': 1, 'secret': 2}).status == 'arguments'
    assert os.listdir(tmp_path) == ['mine.py']
    assert not [name for name in sys.modules if name.partition('.')[0] == 'lagent']


@pytest.mark.parametrize('action', ['Picture', 'Broken'])
def test_images_of_plugins_are_checked(action: str, tmp_path: Path) -> None:
    from lagent_chat.plugins import load_plugins

    (tmp_path / 'Picture.png').write_bytes(RIGHT)
    (tmp_path / 'Broken.png').write_bytes(RIGHT[:-5])
    text = (
        'from lagent.actions import BaseAction\nfrom lagent.schema import ActionReturn\n'
        f'class {action}(BaseAction):\n    """Draw."""\n    def run(self) -> ActionReturn:\n'
        f'        path = {str(tmp_path / action) + ".png"!r}\n'
        '        return ActionReturn(result=[dict(type="image", content=path)])\n'
    )
    result = Toolbox(load_plugins(plugins(tmp_path, text))).call(action, {})
    if action == 'Picture':
        assert result.status == 'ok' and result.images == (RIGHT,)
    else:
        assert result.status == 'error' and not result.images


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        ('x = 1\n\nnothing\n', "mine.py:3: NameError: name 'nothing' is not defined"),
        ('import sys\nsys.exit(3)\n', 'mine.py:2: SystemExit: 3'),
        ('def f(:\n', 'mine.py:1: SyntaxError: invalid syntax'),
        ('def f(a: int): pass\n', 'no function has @tool_api, and no class is a BaseAction'),
        (
            'from lagent.actions import tool_api\n@tool_api\ndef f(a):\n    """F."""\n',
            "mine.py: f: ValueError: tool 'f': parameter 'a' has no type",
        ),
        (
            'from lagent.actions import tool_api\n@tool_api\ndef f(a: int):\n    """F.\n\n'
            '    Args:\n        a: It.\n    """\n',
            'mine.py:2: ValueError: f: Lagent wants the types of arguments in the docstring',
        ),
        (
            'from lagent.actions import BaseAction\nclass A(BaseAction):\n'
            '    """A."""\n    def __init__(self, key: str) -> None:\n        super().__init__()\n'
            '    def run(self) -> str:\n        return "x"\n',
            'mine.py: A: TypeError: A.__init__() missing 1 required positional argument',
        ),
        (
            'from lagent.actions import tool_api\n@tool_api(exclude_arguments="a")\n'
            'def f(a: int):\n    """F."""\n',
            "'a' has no default, and the model is not told of it",
        ),
    ],
)
def test_plugins_that_cannot_be_used(text: str, error: str, tmp_path: Path) -> None:
    from lagent_chat.plugins import PluginError, load_plugins

    with pytest.raises(PluginError) as raised:
        load_plugins(plugins(tmp_path, text))
    assert error in str(raised.value)
    with pytest.raises(FileNotFoundError, match='there is no such file'):
        load_plugins(tmp_path / 'other.py')


def test_the_plugins_to_try() -> None:
    from lagent_chat.plugins import load_plugins

    box = Toolbox(load_plugins(PROJECT / 'plugins.py'))
    assert box.call('days_between', {'first': '2026-01-01', 'last': '2026-03-01'}).text == '59'
    assert box.call('Calendar.weekday', {'day': '2026-11-26'}).text == 'Thursday'
    assert box.call('Calendar.later', {'day': '2026-02-28'}).text == '2026-03-01'


# Servers


TWO = {'content': 'Both.', 'calls': [('add', '{"a": 1, "b": 2}'), ('python', '{"code": "1"}')]}


@pytest.mark.parametrize('name', ['chatml', 'internlm2', 'internlm_v1_1', 'llama3'])
def test_calls_of_a_server_are_read_as_the_template_spells_them(name: str) -> None:
    from lagent_chat.server import Server

    template = build_template(name)
    assert template.tools is not None
    line = TWO if template.tools.parallel else TWO | {'calls': TWO['calls'][:1]}
    with ScriptServer(line).serving() as server:
        pieces = list(Server(server.url, Sampling(), name)([{'role': 'user', 'content': '?'}], []))
        answer = read_answer(template, ''.join(pieces))
        assert len(pieces) > 3 and not answer.errors and answer.content == 'Both.'
        wanted = [('add', {'a': 1, 'b': 2}), ('python', {'code': '1'})][: len(line['calls'])]
        assert [(one.name, one.arguments) for one in answer.calls] == wanted
        fenced = json.dumps({'code': "print('```')"})
        for calls in ([('add', '{"a": ]}')], [('python', fenced)]):
            server.lines = ({'calls': calls},)
            text = ''.join(Server(server.url, Sampling(), name)([], []))
            answer = read_answer(template, text)
            if calls[0][0] == 'add':
                assert [error.kind for error in answer.errors] == ['json']
            else:
                assert answer.calls[0].arguments == {'code': "print('```')"}


def test_what_a_server_is_sent() -> None:
    from lagent_chat.server import Server

    messages = [
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'loss': False} | asks('draw', {'n': [1]}, None),
        {'role': 'tool', 'tool_call_id': 'x', 'name': 'draw', 'content': [
            {'type': 'text', 'text': 'so'}, {'type': 'image_url', 'image_url': {'url': 'data:'}}]},
    ]  # fmt: skip
    tools = Toolbox([add]).declarations()
    sampling = Sampling(top_k=3, seed=5, stop=('x',), repetition_penalty=1.5, max_new_tokens=7)
    with ScriptServer({'content': 'Ho'}).serving() as server:
        one = Server(server.url, sampling, model='other', api_key='secret')
        assert ''.join(one(messages, tools)) == 'Ho'
        asked = server.asked[0]
    assert asked == {
        'model': 'other', 'stream': True, 'tools': tools, 'key': 'Bearer secret',
        'temperature': 0.0, 'top_p': 1.0, 'max_tokens': 7, 'stop': ['x'], 'seed': 5, 'top_k': 3,
        'repetition_penalty': 1.5,
        'messages': [
            messages[0],
            {'role': 'assistant', 'content': None, 'tool_calls': [
                {'id': 'x', 'type': 'function',
                 'function': {'name': 'draw', 'arguments': '{"n": [1]}'}}]},
            {'role': 'tool', 'tool_call_id': 'x', 'name': 'draw', 'content': 'so\n[image]'},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ('line', 'error'),
    [
        ((500, b'{"error": {"message": "out of memory"}}'), 'answered 500 .*: out of memory'),
        ((404, b'\n<html>no</html>'), 'answered 404 .*: a page, no JSON. URLs .* in /v1'),
        ((404, b'no such path'), 'answered 404 .*: no such path'),
        ((200, b'[1]'), r'sent no JSON object but \[1\]'),
        (streamed({'content': 'Hel'}, done=False), 'broke off in the middle of an answer'),
        (b'data: {"error": "too long"}\n\n', 'said too long'),
        (b'data: {"choices": 3}\n\n', 'sent no choices'),
        (b'data: {nonsense\n\n', 'sent no JSON object but {nonsense'),
    ],
)
def test_servers_that_fail(line: object, error: str) -> None:
    from lagent_chat.server import Server, ServerError

    with ScriptServer(line).serving() as server:
        one = Server(server.url, Sampling())
        with pytest.raises(ServerError, match=error):
            list(one([], []))
        server.models = []
        with pytest.raises(ServerError, match='lists no model: name one with --model-name'):
            Server(server.url, Sampling())
    with pytest.raises(ServerError, match=r'does not answer: .*refused'):
        Server(server.url, Sampling())


def test_a_server_that_does_not_stream() -> None:
    from lagent_chat.server import Server

    choice = {'message': {'content': 'All.'}, 'finish_reason': 'stop'}
    with ScriptServer((200, json.dumps({'choices': [choice]}).encode())).serving() as server:
        assert ''.join(Server(server.url, Sampling())([], [])) == 'All.'
        calls = [{'function': {'name': 'add', 'arguments': {'a': n}}} for n in (1, 2)]
        choice['message'] = {'content': None, 'tool_calls': calls}
        server.lines = ((200, json.dumps({'choices': [choice]}).encode()),)
        answer = read_answer(
            build_template('chatml'), ''.join(Server(server.url, Sampling())([], []))
        )
        assert [one.arguments for one in answer.calls] == [{'a': 1}, {'a': 2}]
        choice['message'] = {'tool_calls': [3, {'function': 3}, {'index': 'x'}]}
        server.lines = ((200, json.dumps({'choices': [choice]}).encode()),)
        assert ''.join(Server(server.url, Sampling())([], [])).strip()


# The chat


def test_several_turns_with_tools(tmp_path: Path, capsys) -> None:
    model = Script(
        asks('add', {'a': 1, 'b': 2}), 'It is 3.', asks('draw', {}), 'Drawn.', 'Nothing.'
    )
    line = terminal(tmp_path / 'chat', model, '1 + 2?', 'Draw!', '/clear', 'And now?', '/tools')
    out = capsys.readouterr().out
    image = next((tmp_path / 'chat' / 'images').iterdir())
    assert image.read_bytes() == RIGHT
    assert out.split('\n', 2)[2] == (
        "I ask.\n[add]\n    {'a': 1, 'b': 2}\n  | 3\nIt is 3.\n"
        f'I ask.\n[draw]\n    {{}}\n  | a picture\n  | [image: {image}]\nDrawn.\nNothing.\n'
        'add(a, b): Add.\ndraw(): Draw.\nflood(): Too much.\nbroken(): Raises.\n\n'
    )
    assert [roles(record['messages']) for record in records(tmp_path / 'chat')] == [
        'uatauata',
        'ua',
    ]
    assert model.prompts[2][:4] == records(tmp_path / 'chat')[0]['messages'][:4]
    assert [m['content'] for m in line.dialogue.messages] == ['And now?', 'Nothing.']
    assert sorted(os.listdir(tmp_path / 'chat')) == ['images', 'trace.jsonl']


def test_what_tools_do_wrong_is_told_and_the_chat_goes_on(tmp_path: Path, capsys) -> None:
    hang = threading.Event()

    def wait() -> None:
        """Hang."""
        hang.wait(20)

    from internlm_mm.agents import tool

    calls = [
        '<|action_start|><|plugin|>\n{"name": "add"<|action_end|>',
        asks('ad', {'a': 1, 'b': 2}),
        asks('add', {'a': 'x'}),
        asks('broken', {}),
        asks('flood', {}),
        asks('wait', {}),
    ]
    tools = [add, flood, broken, tool(wait, seconds=0.2)]
    terminal(tmp_path, Script(*calls, 'Well.', 'Still here.'), 'Try', 'There?', tools=tools)
    hang.set()
    out, err = capsys.readouterr()
    for said in (
        '! The call could not be read: ',
        "  | There is no tool 'ad'. Did you mean 'add'?",
        "  | Wrong arguments of 'add': 'b' is a required property",
        "  | KeyError: 'nothing here'",
        '  | \\x1b[31mredxxx',
        'characters left out',
        "  | 'wait' took longer than 0.2 seconds.",
        'Well.\nStill here.\n',
    ):
        assert said in out
    assert '\x1b' not in out and len(out) < 40_000 and err == ''
    losses = [m.get('loss') for m in records(tmp_path)[0]['messages'] if m['role'] == 'assistant']
    assert losses == [False, False, None, None, None, None, None]


@pytest.mark.parametrize(
    ('call_', 'said', 'kept'),
    [
        (asks('add', {'a': 1, 'b': 2}), '! no answer in 3 turns', 'uatatat'),
        ('<|action_start|><|plugin|>\n{', '! the model does not mend its call', ''),
    ],
)
def test_a_model_that_never_answers(call_, said, kept, tmp_path: Path, capsys) -> None:
    line = terminal(tmp_path, Script(*[call_] * 3, 'Fine.'), 'Go', 'Again', max_turns=3)
    assert said in capsys.readouterr().out and line.status == 'answer'
    assert roles(records(tmp_path)[0]['messages']) == f'{kept}ua'


def test_an_empty_answer_is_told(tmp_path: Path, capsys) -> None:
    line = terminal(tmp_path, Script(asks('add', {'a': 1, 'b': 2}), ' ', 'Fine.'), 'Go', 'Again')
    assert '  | 3\n \n! an empty answer\nFine.\n' in capsys.readouterr().out
    assert line.status == 'answer'
    losses = [m.get('loss') for m in records(tmp_path)[0]['messages'] if m['role'] == 'assistant']
    assert losses == [None, False, None]


def test_ctrl_c_while_the_model_writes(tmp_path: Path, capsys) -> None:
    stop = KeyboardInterrupt()
    model = Script(
        ['Half an ans', stop], [stop], [asks('add', {'a': 1, 'b': 2}), stop],
        asks('add', {'a': 1, 'b': 2}, ''), ['Thr', stop], 'Done.',
    )  # fmt: skip
    line = terminal(tmp_path, model, 'One', 'Two', 'Three', 'Four', 'Five')
    assert capsys.readouterr().out.count('! stopped') == 4
    said = [(m['role'], m['content'], m.get('loss')) for m in line.dialogue.messages]
    assert said == [
        ('user', 'One', None), ('assistant', 'Half an ans', False),
        ('user', 'Three', None), ('assistant', 'I ask.', False),
        ('user', 'Four', None), ('assistant', '', None), ('tool', '3', None),
        ('assistant', 'Thr', False),
        ('user', 'Five', None), ('assistant', 'Done.', None),
    ]  # fmt: skip


def test_a_model_that_fails_leaves_the_chat_as_it_was(tmp_path: Path, capsys) -> None:
    calls = asks('add', {'a': 1, 'b': 2})
    errors = [OSError('no route'), ValueError('too long'), RuntimeError('out of memory')]
    model = Script('One.', *[x for error in errors for x in (calls, error)], 'Two.')
    line = terminal(tmp_path, model, 'a', 'b', 'c', 'd', 'e')
    assert capsys.readouterr().err == (
        'error: no route\nerror: too long\nerror: the model failed: out of memory\n'
    )
    assert [m['content'] for m in line.dialogue.messages] == ['a', 'One.', 'e', 'Two.']


def test_commands(tmp_path: Path, capsys) -> None:
    bad = '<|action_start|><|plugin|>\n{'
    model = Script('A.', bad, 'B.', 'C.', 'D.', 'E.')
    file = tmp_path / 'kept.json'
    lines = ['a', 'b', '/retry', '/history', '/undo', '/system Be brief.', '/set temperature 0.5',
             'd', f'/save {file}', '/clear', f'/load {file}', 'e', '/undo', '/undo', '/undo',
             '/undo', f'/save {tmp_path}', '/nothing', '/exit']  # fmt: skip
    line = terminal(tmp_path / 'chat', model, *lines)
    out, err = capsys.readouterr()
    assert '[user] b\n[assistant] C.\n' in out and 'written' in out and 'read' in out
    assert 'nothing has been said yet' in err and 'exists, and not from here' in err
    assert "there is no command '/nothing'" in err or 'there is no command /nothing' in err
    assert [m['content'] for m in model.prompts[-1]] == ['Be brief.', 'a', 'A.', 'd', 'D.', 'e']
    assert model.sampling.temperature == 0.5 and line.dialogue.messages == []
    assert json.loads(file.read_text())['messages'][0] == {
        'role': 'system',
        'content': 'Be brief.',
    }


def test_a_folder_of_an_earlier_chat_is_refused(tmp_path: Path) -> None:
    from lagent_chat.folder import SessionFolder

    terminal(tmp_path, Script('A.'), 'a')
    with pytest.raises(ValueError, match='is of an earlier chat; name another --folder'):
        SessionFolder(tmp_path)
    with pytest.raises(ValueError, match=r'--folder .*/b: .*trace\.jsonl is a file'):
        SessionFolder(tmp_path / 'trace.jsonl' / 'b')
    terminal(tmp_path / 'silent', Script())
    assert not (tmp_path / 'silent').exists()


def test_what_is_kept_of_misspelt_calls() -> None:
    from lagent_chat.folder import learnable

    template = build_template('internlm2')
    ask, answer = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}
    bad = '<|action_start|><|plugin|>\n{'
    misspelt = {'role': 'assistant', 'content': bad, 'loss': False}
    [error] = read_answer(template, bad).errors
    told = {'role': 'user', 'content': error.to_model()}
    half = {'role': 'assistant', 'content': 'Half', 'loss': False}
    calling = asks('f', {}) | {'role': 'assistant'}
    result = {'role': 'tool', 'tool_call_id': 'x', 'content': ''}
    for given, left in [
        ([ask, answer, ask, half], [ask, answer, ask, half]),
        ([ask, misspelt, told, misspelt, told, answer], [ask, answer]),
        ([ask, misspelt, told, misspelt, ask, answer], [ask, answer]),
        ([ask, answer, ask, calling, result, misspelt], [ask, answer]),
        ([ask, misspelt, told, calling, result, answer], [ask, calling, result, answer]),
    ]:
        assert learnable(given, template) == left


@pytest.mark.parametrize(
    ('messages', 'text', 'left'),
    [
        ('u', '', ''),
        ('u', 'par', 'ua'),
        ('uau', '', 'ua'),
        ('uct', '', 'uct'),
        ('uct', 'par', 'ucta'),
        ('uctc', 'lost', 'uct'),
        ('uc', '', ''),
        ('su', '', 's'),
    ],
)
def test_what_is_left_of_a_conversation_that_was_stopped(messages, text, left) -> None:
    from lagent_chat.terminal import settle

    full = dict(u='user', a='assistant', c='assistant', t='tool', s='system')
    given = [{'role': full[m], 'content': m} for m in messages]
    for message in given:
        if message['content'] == 'c':
            message['tool_calls'] = [call('f', {}, 'x')]
    settle(given, text)
    said = [m['content'] if m['content'] in 'uacts' else m['role'][0] for m in given]
    assert ''.join(said) == left


# Ctrl-C during a call


def press_ctrl_c(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_stops_a_cell_and_keeps_its_variables(session: Session) -> None:
    from lagent_chat.toolbox import ChatTools

    box = ChatTools(session=session)
    assert box.call('python', {'code': 'x = 5'}).status == 'ok'
    timer = press_ctrl_c(0.4)
    began = time.monotonic()
    result = box.call('python', {'code': 'import time\ntime.sleep(60)'})
    timer.join()
    assert result.status == 'error' and 'asked to stop the cell' in result.text
    assert time.monotonic() - began < 50
    assert box.call('python', {'code': 'x'}).text == '5'
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_a_plugin() -> None:
    from lagent_chat.toolbox import ChatTools

    hang = threading.Event()

    def wait() -> None:
        """Hang."""
        hang.wait(20)

    box = ChatTools(Toolbox([wait]).tools.values())
    timer = press_ctrl_c(0.2)
    result = box.call('wait', {})
    timer.join()
    hang.set()
    assert (result.status, result.text) == ('error', "'wait' was stopped by the user.")


# The program


SCRIPT = (
    {'content': 'I compute.', 'calls': [('python', json.dumps({'code': 'x = 17 * 23\nx'}))]},
    {'calls': [('Calendar.weekday', '{"day": ')]},
    {'calls': [('Calendar.weekday', '{"day": 3}')]},
    {'calls': [('Calender.weekday.x', '{}')]},
    {'calls': [('python', json.dumps({'code': 'open("/etc/evil", "w")'}))]},
    {'calls': [('python', '{"code": "x + 1"}'),
               ('days_between', '{"first": "2026-01-01", "last": "2026-03-01"}')]},
    {'calls': [('python', json.dumps({'code': 'x = ('}))]},
    {'content': 'It is 391.'},
    {'content': 'You are welcome.'},
)  # fmt: skip
ARGUMENTS = ['--plugins', str(PROJECT / 'plugins.py')]


@pytest.fixture
def writes(tmp_path: Path) -> Iterator[list[str]]:
    """Paths that this process opens to write, makes or moves; but for the sandbox's own."""
    seen: list[str] = []
    watching = [True]
    places = {'os.mkdir': 0, 'os.rename': 1, 'os.remove': 0, 'os.link': 1, 'os.symlink': 1}

    def hook(event: str, arguments: tuple) -> None:
        if not watching:
            return
        if event == 'open' and isinstance(arguments[0], (str, bytes, os.PathLike)):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                seen.append(os.fsdecode(arguments[0]))
        elif event in places:
            folder = arguments[-1]  # a number of a file, or -1
            base = os.readlink(f'/proc/self/fd/{folder}') if folder >= 0 else ''
            seen.append(os.path.join(base, os.fsdecode(arguments[places[event]])))

    sys.addaudithook(hook)
    yield seen
    watching.clear()


def test_a_chat_writes_to_its_folder_only_and_its_trace_is_data(
    chat, writes: list[str], sandbox: Sandbox, tmp_path: Path, capsys, monkeypatch
) -> None:
    folder = tmp_path / 'chat'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('builtins.input', typed('How much?', 'Thanks'))
    with ScriptServer(*SCRIPT).serving() as server:
        begun = len(writes)
        run = [server.url, '--no-lagent', '--template', 'internlm2', '--folder', str(folder)]
        assert chat([*run, *ARGUMENTS]) == 0
        written = {Path(path).resolve() for path in writes[begun:]}
    out = capsys.readouterr().out
    assert '  | 391\n' in out and '  | 392\n' in out and '  | 59\n' in out
    assert '  | SyntaxError: ' in out and 'It is 391.\nYou are welcome.\n' in out
    assert 'Error' in out.partition('/etc/evil')[2] and not Path('/etc/evil').exists()
    allowed = (folder, Path('/dev'), Path('/proc'))
    outside = [
        path
        for path in written
        if not any(path.is_relative_to(one) for one in allowed) and 'internlm_mm-' not in str(path)
    ]
    assert not outside, outside
    assert os.listdir(tmp_path) == ['chat']
    assert len(records(folder)) == 1
    tokenizer = internlm_model(tmp_path / 'tokenizer')
    options = [f'tokenizer.path={tokenizer.path}', f'train_dataloader.dataset.path={folder}']
    checked = program(CHECK_DATA).main([str(CONFIG), '--cfg-options', *options])
    out = capsys.readouterr().out
    assert checked == 0, out
    assert '1 conversations, 0 of them without a call; 0 problems' in out


def test_one_question(chat, tmp_path: Path, capsys) -> None:
    with ScriptServer({'content': 'Hello.'}).serving() as server:
        run = [server.url, '--no-lagent', '--no-interpreter', '--folder', str(tmp_path / 'a')]
        assert chat([*run, '--ask', 'Hi']) == 0
        assert capsys.readouterr().out == 'Hello.\n'
        server.lines = ({'calls': [('f', '{"a": ')]},)
        run[-1] = str(tmp_path / 'b')
        assert chat([*run, *ARGUMENTS, '--ask', 'Hi']) == 1
        assert 'does not mend its call' in capsys.readouterr().out
        server.lines = ({'content': ''},)
        run[-1] = str(tmp_path / 'c')
        assert chat([*run, '--ask', 'Hi']) == 1
        assert capsys.readouterr().out == '! an empty answer\n'


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['URL', '--template', 'internlm', *ARGUMENTS], "the template 'internlm' spells no"),
        (['URL', '--template', 'chatlm'], "'chatlm'"),
        (['URL', '--plugins', 'none.py'], '--plugins none.py: there is no such file'),
        (['URL', '--temperature', '-1'], 'temperature=-1.0 must be 0'),
        (['URL', '--max-turns', '0'], 'max_turns=0: at least 1'),
        (['nowhere'], 'nowhere'),
        (['http://127.0.0.1:9/v1'], 'http://127.0.0.1:9/v1 does not answer'),
    ],
)
def test_what_the_user_did_wrong(arguments, error, chat, tmp_path: Path, capsys) -> None:
    with ScriptServer({'content': 'Hello.'}).serving() as server:
        given = [server.url if argument == 'URL' else argument for argument in arguments]
        options = ['--no-lagent', '--no-interpreter', '--folder', str(tmp_path / 'chat')]
        assert chat([*given, *options, '--ask', 'Hi']) == 2
    assert error in capsys.readouterr().err and not (tmp_path / 'chat').exists()


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['hf', '--tool-seconds', '-1'], '--tool-seconds -1.0 is not above 0'),
        (['hf', '--cell-seconds', 'nan'], '--cell-seconds nan is not above 0'),
        (['htp://127.0.0.1:8000/v1'], 'a server begins with http:// or https://'),
        (['hf', '--model-name', 'x'], '--model-name x does nothing where hf answers'),
        (['http://a/v1', '--device', 'cpu'], '--device cpu does nothing where http://a/v1 answers'),
        (
            ['hf', '--max-turn', '3', '--plugin', 'a', '--cells', '3'],
            "Did you mean '--cell-seconds'",
        ),
    ],
)
def test_what_is_wrong_with_options(arguments, error, chat, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        chat(arguments)
    assert left.value.code == 2 and error in capsys.readouterr().err


def test_without_a_sandbox_nothing_is_run(tmp_path: Path, capsys, monkeypatch) -> None:
    module = program(PROJECT / 'chat.py')
    asked = []

    def none(**options):
        asked.append(options['unsafe'])
        raise SandboxError('no way to confine programs: apt install bubblewrap')

    monkeypatch.setattr(module, 'Sandbox', none)
    with ScriptServer({'content': 'Hello.'}).serving() as server:
        run = [server.url, '--no-lagent', '--folder', str(tmp_path / 'chat'), '--ask', 'Hi']
        assert module.main(run) == 2
        err = capsys.readouterr().err
        for said in ('apt install bubblewrap', '--no-interpreter', '--unsafe-no-sandbox'):
            assert said in err
        module.main([*run, '--unsafe-no-sandbox'])
        assert asked == [False, True]
        assert module.main([*run, '--no-interpreter']) == 0


def test_without_lagent_the_command_that_installs_it_is_said(chat, tmp_path, capsys) -> None:
    assert chat(['model', '--env', str(tmp_path / 'none'), '--ask', 'Hi']) == 2
    err = capsys.readouterr().err
    assert f'Lagent is not installed at {tmp_path / "none"}' in err
    assert f'setup_env.py --env {tmp_path / "none"}' in err and '--no-lagent' in err
    python = tmp_path / 'none' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.touch()
    assert chat(['model', '--env', str(tmp_path / 'none'), '--ask', 'Hi']) == 2
    err = capsys.readouterr().err
    assert 'was made for another environment' in err and 'Make it again: python' in err
