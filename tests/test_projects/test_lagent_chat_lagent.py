"""The chat with the real Lagent, in its own environment, which is made if it is not there."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.sandbox import Sandbox, SandboxError
from tests.chat_server import ScriptServer
from tests.chatting import learn_chat
from tests.conversations import call
from tests.test_projects.test_lagent_chat import ARGUMENTS, PLUGINS, PROJECT, SCRIPT

pytestmark = pytest.mark.slow
CHAT, SETUP = PROJECT / 'chat.py', PROJECT / 'setup_env.py'


def run(*command: object, typed: str = '', **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        input=typed,
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {'OMP_NUM_THREADS': '1'} | variables,
    )


@pytest.fixture(scope='module')
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own, or one that the command makes."""
    folder = PROJECT / '.venv'
    if not (folder / 'bin' / 'python').exists():
        folder = tmp_path_factory.mktemp('lagent') / 'env'
        made = run(SETUP, '--env', folder)
        if 'is PyPI within reach?' in made.stderr:
            pytest.skip(f'Lagent cannot be installed: {made.stderr}')
        assert made.returncode == 0, made.stderr
        assert made.stdout.splitlines()[-1] == 'Lagent 0.5.0rc3 is ready.'
    return folder


@pytest.fixture(scope='module', autouse=True)
def sandbox() -> None:
    try:
        Sandbox(spare=0).close()
    except SandboxError as error:
        pytest.skip(str(error))


def both(model: str, environment: Path, folder: Path, typed: str, *options: object) -> list[dict]:
    """Chat by Lagent and without it: the same must be said, and kept."""
    said, kept = [], []
    for name, how in (('own', ['--no-lagent']), ('lagent', ['--env', environment])):
        place = folder / name
        done = run(CHAT, model, *how, '--folder', place, *options, typed=typed)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        said.append(done.stdout.replace(str(place), 'FOLDER'))
        kept.append((place / 'trace.jsonl').read_text())
        images = sorted(path.name for path in (place / 'images').glob('*'))
        said[-1] += f'\n{images}'
    assert said[0] == said[1]
    assert kept[0] == kept[1]
    return [json.loads(line) for line in kept[0].splitlines()]


PICTURE = '''
import struct, zlib
from pathlib import Path
from lagent.actions import BaseAction
from lagent.schema import ActionReturn

class Picture(BaseAction):
    """Draw."""

    def run(self) -> ActionReturn:
        def chunk(kind, data):
            check = struct.pack('>I', zlib.crc32(kind + data))
            return struct.pack('>I', len(data)) + kind + data + check
        header = struct.pack('>IIBBBBB', 1, 1, 8, 0, 0, 0, 0)
        data = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(2))) + chunk(b'IEND', b'')
        file = Path(__file__).with_name('dot.png')
        file.write_bytes(b'\\x89PNG\\r\\n\\x1a\\n' + data)
        parts = [dict(type='text', content='a dot'), dict(type='image', content=str(file))]
        return ActionReturn(result=parts)
'''  # noqa: E501


@pytest.mark.parametrize('template', ['internlm2', 'chatml', 'internlm_v1_1'])
def test_a_server_by_lagent_and_without_it(
    template: str, environment: Path, tmp_path: Path
) -> None:
    lines = [*SCRIPT[:-1], {'calls': [('Picture', '{}')]}, SCRIPT[-1]]
    if template == 'internlm_v1_1':  # one call a turn
        lines[5] = lines[5] | {'calls': lines[5]['calls'][:1]}
    (tmp_path / 'picture.py').write_text(PICTURE)
    with ScriptServer(*lines).serving() as server:
        options = ['--template', template, *ARGUMENTS, '--plugins', tmp_path / 'picture.py']
        [record] = both(server.url, environment, tmp_path, 'How much?\nDraw!\n/history\n', *options)
        half = len(server.asked) // 2
        assert server.asked[:half] == server.asked[half:]  # Lagent shows the model the same
    texts = [m['content'] for m in record['messages'] if m['role'] == 'tool']
    assert texts[0] == '391' and '392' in texts
    assert record['messages'][-2]['content'][1]['type'] == 'image_url'
    assert record['messages'][-1]['content'] == 'You are welcome.'


def test_limits_and_commands_by_lagent_and_without_it(environment: Path, tmp_path: Path) -> None:
    asks = {'content': 'On.', 'calls': [('python', '{"code": "1 / 0"}')]}
    typed = 'a\n/undo\nb\n/retry\n/system Be brief.\nc\n/clear\nd\n/history\n'
    with ScriptServer(asks, asks, {'content': 'Well.'}, asks).serving() as server:
        records = both(server.url, environment, tmp_path, typed, '--max-turns', 2)
        half = len(server.asked) // 2
        assert server.asked[:half] == server.asked[half:]
    roles = [''.join(m['role'][0] for m in record['messages']) for record in records]
    assert roles == ['suatatua', 'suatat'] and 'ZeroDivisionError' in json.dumps(records)


DOUBLE = '''
from lagent.actions import tool_api

@tool_api
def double(n: int) -> int:
    """Double it."""
    return 2 * n
'''
QUESTIONS = {
    '17 * 23?': ('python', {'code': 'x = 17 * 23\nprint(x)'}, '391'),
    'Twice 4?': ('double', {'n': 4}, '8'),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model that has learned two calls by heart, alone and one after the other."""
    from internlm_mm.agents import Toolbox, interpreter

    folder = tmp_path_factory.mktemp('trained')
    turns = []
    for question, (name, arguments, answer) in QUESTIONS.items():
        turns.append([
            {'role': 'user', 'content': question},
            {'role': 'assistant', 'content': 'I ask.',
             'tool_calls': [call(name, arguments, 'a')]},
            {'role': 'tool', 'tool_call_id': 'a', 'content': answer},
            {'role': 'assistant', 'content': f'It is {answer}.'},
        ])  # fmt: skip
    file = folder / 'double.py'
    file.write_text(DOUBLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT)
        from lagent_chat.plugins import load_plugins

        box = Toolbox([interpreter(lambda code: pytest.fail(code)), *load_plugins(file)])
    torch.set_num_threads(1)
    both_turns = [*turns, [*turns[0], *turns[1]]]
    work = learn_chat(folder, 'internlm2', 250, both_turns, box.declarations())
    yield work


@pytest.mark.parametrize('form', ['checkpoint', 'hf'])
def test_a_trained_model_by_lagent_and_without_it(
    form: str, trained: Path, environment: Path, tmp_path: Path
) -> None:
    model = trained
    if form == 'hf':
        model = tmp_path / 'hf'
        convert_to_hf(trained, model)
    typed = '\n'.join(QUESTIONS)
    plugins = ['--plugins', trained.parent / 'double.py']
    [record] = both(str(model), environment, tmp_path, typed, *plugins)
    said = [(m['role'], m['content']) for m in record['messages']]
    assert said == [
        item
        for question, (_, _, answer) in QUESTIONS.items()
        for item in [
            ('user', question), ('assistant', 'I ask.'), ('tool', answer),
            ('assistant', f'It is {answer}.'),
        ]
    ]  # fmt: skip


DRIVER = """
import json, os, sys, tempfile
written = []
tempfile.gettempdir()  # tries whether it can write there

def hook(event, arguments):
    if event == 'open' and isinstance(arguments[0], (str, bytes, os.PathLike)):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.fsdecode(arguments[0]))
    elif event in ('os.mkdir', 'os.remove', 'os.rename'):
        written.append(os.fsdecode(arguments[0]))

sys.addaudithook(hook)
from lagent.agents import StreamingAgent
from lagent.actions import ActionExecutor
from internlm_mm.agents import Toolbox
from internlm_mm.datasets.conversation_formats import FORMATS
from lagent_chat.folder import SessionFolder
from lagent_chat.lagent_loop import LagentLoop
from lagent_chat.plugins import load_plugins
from lagent_chat.server import Server
from internlm_mm.inference import Sampling

url, plugins, folder = sys.argv[1:]
box = Toolbox(load_plugins(plugins))
speaker = Server(url, Sampling(), 'internlm2')
loop = LagentLoop(speaker, box, SessionFolder(folder), max_turns=4)
assert type(loop.agent) is StreamingAgent and type(loop.executor) is ActionExecutor
messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'One'}]
remembered = []
for question in ('Two', 'Three', None):
    trace = loop.begin(messages)
    events = [event.kind for event in loop.events(trace)]
    remembered.append(loop.memory() == trace.messages)
    messages = [*trace.messages, {'role': 'user', 'content': question}]
state = loop.agent.state_dict()['memory']
read, tools = FORMATS['lagent']({'memory': json.loads(json.dumps(state)), 'tools': trace.tools})
llm = loop.agent.llm
before = speaker.sampling
alone = [llm.generate('Hi'), llm.generate(['Hi', 'Ho']), llm.chat(messages[:2], temperature=0.5)]
print(json.dumps(dict(
    tools=trace.tools, remembered=remembered, messages=trace.messages, read=read, alone=alone,
    restored=before is speaker.sampling, written=written,
)))
"""


def test_what_lagent_remembers(environment: Path, tmp_path: Path) -> None:
    driver, plugins = tmp_path / 'driver.py', tmp_path / 'plugins.py'
    driver.write_text(DRIVER)
    plugins.write_text(PLUGINS)
    lines = [
        {'content': 'I ask.', 'calls': [('power', '{"base": 3}')]},
        {'content': 'It is 9.'},
        {'content': 'Yes.'},
        {'calls': [('Kit.first', '{"n": 1}')]},
        {'content': '11.'},
    ]
    with ScriptServer(*lines).serving() as server:
        command = [environment / 'bin/python', '-B', driver, server.url, plugins, tmp_path / 'chat']
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {'PYTHONPATH': str(PROJECT)},
        )
        assert done.returncode == 0, done.stderr
        drawn = [request['temperature'] for request in server.asked[-4:]]
    given = json.loads(done.stdout.splitlines()[-1])
    folder = str(tmp_path / 'chat')
    assert not [p for p in given['written'] if not p.startswith((folder, '/dev/null'))]
    assert given['remembered'] == [True, True, True] and given['restored']
    assert given['alone'] == ['I ask.' + CALL, ['I ask.' + CALL] * 2, 'I ask.' + CALL]
    assert drawn == [0.0, 0.0, 0.0, 0.5]
    # Lagent's own memory, read by the form that reads traces of Lagent.
    own = [m for m in given['messages'] if m['role'] != 'system']
    assert [(m['role'], m['content']) for m in given['read']] == [
        (m['role'], m['content']) for m in own
    ]
    called = [m['tool_calls'][0]['function'] for m in own if 'tool_calls' in m]
    assert [m['tool_calls'][0]['function'] for m in given['read'] if 'tool_calls' in m] == called
    # The same file gives the same tools where Lagent is not installed.
    from internlm_mm.agents import Toolbox

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT)
        from lagent_chat.plugins import load_plugins

        assert Toolbox(load_plugins(plugins)).declarations() == given['tools']


CALL = '<|action_start|><|plugin|>\n{"name": "power", "parameters": {"base": 3}}<|action_end|>'


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        ('@tool_api\ndef f(a: int):\n    """F.\n\n    Args:\n        a: It.\n    """\n',
         'Lagent wants the types of arguments in the docstring'),
        ('@tool_api\ndef f(a):\n    """F."""\n', "parameter 'a' has no type"),
    ],
)  # fmt: skip
def test_plugins_that_cannot_be_used(
    text: str, error: str, environment: Path, tmp_path: Path
) -> None:
    (tmp_path / 'bad.py').write_text(f'from lagent.actions import tool_api\n{text}')
    done = run(
        CHAT, 'http://127.0.0.1:9/v1', '--env', environment, '--plugins', tmp_path / 'bad.py'
    )
    assert done.returncode == 2 and error in done.stderr


def test_an_environment_that_cannot_be_made(tmp_path: Path) -> None:
    without = dict(PIP_NO_INDEX='1', PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS='')
    done = run(SETUP, '--env', tmp_path / 'env', **without)
    assert done.returncode == 1
    assert 'pip cannot install what Lagent needs: is PyPI within reach?' in done.stderr
    done = run(CHAT, 'model', '--env', tmp_path / 'env')
    assert done.returncode == 2 and 'is broken' in done.stderr and 'setup_env.py' in done.stderr
