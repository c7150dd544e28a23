"""The loop, driven by models that follow a script."""

import pytest

from internlm_mm.agents.loop import Agent
from internlm_mm.agents.tools import Toolbox, interpreter
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import Example
from internlm_mm.inference.chat import Chat
from internlm_mm.sandbox import Limits, Sandbox, SandboxError
from internlm_mm.tokenizers import build_template, load_tokenizer, read_answer
from tests.conversations import NAMES, call

WITH_TOOLS = [name for name in NAMES if name != 'internlm']
QUESTION = [{'role': 'user', 'content': 'How much?'}]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Shown:
    images = (b'\x89PNG',)
    ok = True

    def __init__(self, text: str) -> None:
        self.text = text


class Script:
    """Says its lines in turn, in pieces, and keeps the prompts that it was given."""

    def __init__(self, template, lines: list) -> None:
        self.template = template
        self.lines = [self.spell(line) for line in lines]
        self.prompts: list[str] = []

    def spell(self, line: str | dict) -> str:
        if isinstance(line, str):
            return line
        messages = [QUESTION[0], {'role': 'assistant', 'content': None} | line]
        segments = self.template.segments(messages, [{'function': {'name': 'add'}}])
        return ''.join(s.text for s in segments if s.answer).removesuffix(self.template.stop[0])

    def __call__(self, messages, tools):
        self.prompts.append(self.template.text(messages, tools, add_generation_prompt=True))
        line = self.lines.pop(0)
        return (line[i : i + 3] for i in range(0, len(line), 3))


def agent(name: str, lines: list, **options) -> Agent:
    template = build_template(name)
    box = Toolbox([add, interpreter(lambda code: Shown(f'ran {code}'))], max_chars=100)
    return Agent(Script(template, lines), template, box, **options)


ADD = {'content': 'I add.', 'tool_calls': [call('add', {'a': 1, 'b': 2}, 'x')]}
CODE = {'tool_calls': [call('python', {'code': 'plot()'}, 'x')]}
DONE = {'content': 'It is 3.'}


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_calls_and_an_answer(name):
    worker = agent(name, [ADD, CODE, DONE])
    trace = worker.begin(QUESTION)
    events = list(worker.events(trace))
    assert [e.kind for e in events if e.kind in ('call', 'result', 'answer')] == [
        'call', 'result', 'call', 'result', 'answer']  # fmt: skip
    assert trace.status == 'answer' and trace.answer == 'It is 3.' and trace.turns == 3
    assert ''.join(e.text for e in events if e.kind == 'text').endswith('It is 3.')
    said = 'thought' if worker.template.tools.thought else 'text'
    assert 'I add.' in ''.join(e.text for e in events if e.kind == said)
    assert [m['role'] for m in trace.messages] == [
        'user', 'assistant', 'tool', 'assistant', 'tool', 'assistant']  # fmt: skip
    assert trace.messages[1]['tool_calls'][0]['id'] == trace.messages[2]['tool_call_id'] == 'call_0'
    assert trace.messages[2]['content'] == '3'
    assert trace.messages[4]['content'][1]['image_url']['url'].startswith('data:image/png;base64,')
    assert 'ran plot()\n[image]' in worker.model.prompts[2]
    assert QUESTION == [{'role': 'user', 'content': 'How much?'}]  # left alone


def test_several_calls_in_a_turn():
    calls = [call('add', {'a': n, 'b': n}, f'{n}') for n in (1, 2)]
    trace = agent('chatml', [{'tool_calls': calls}, ADD, DONE]).run(QUESTION)
    results = [m for m in trace.messages if m['role'] == 'tool']
    assert [m['content'] for m in results] == ['2', '4', '3']
    assert [m['tool_call_id'] for m in results] == ['call_0', 'call_1', 'call_2']


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_a_malformed_call_is_told_and_mended(name):
    template = build_template(name)
    broken = Script(template, [ADD]).lines[0].replace('"b": 2', '"b": ')
    worker = agent(name, [broken, ADD, DONE])
    trace = worker.begin(QUESTION)
    kinds = [event.kind for event in worker.events(trace)]
    assert 'malformed' in kinds and kinds[-1] == 'answer'
    assert [e.kind for e in trace.errors] == ['json']
    told = trace.messages[2]
    assert told['role'] == 'user' and 'The call could not be read: it is no JSON' in told['content']
    assert trace.messages[1] == {'role': 'assistant', 'content': broken, 'loss': False}
    assert 'could not be read' in worker.model.prompts[1]


def test_malformed_calls_without_end():
    trace = agent('chatml', ['<tool_call>\n{"name"'] * 9, max_repairs=2).run(QUESTION)
    assert trace.status == 'gave_up' and trace.turns == 3 and trace.answer == ''
    assert len(trace.errors) == 3


def test_a_model_that_never_stops_calling():
    worker = agent('internlm2', [ADD] * 9, max_turns=4)
    trace = worker.begin(QUESTION)
    last = list(worker.events(trace))[-1]
    assert (last.kind, last.text) == ('turn_limit', 'no answer in 4 turns')
    assert (
        trace.status == 'turn_limit' and trace.turns == 4 and trace.messages[-1]['role'] == 'tool'
    )


def test_wrong_calls_are_answered_and_not_learned():
    unknown = {'tool_calls': [call('ad', {}, 'x')]}
    wrong = {'tool_calls': [call('add', {'a': 1}, 'x')]}
    trace = agent('internlm2', [unknown, wrong, ADD, DONE]).run(QUESTION)
    assert [result.status for result in trace.results] == ['unknown', 'arguments', 'ok']
    answers = [m for m in trace.messages if m['role'] == 'assistant']
    assert [m.get('loss', True) for m in answers] == [False, False, True, True]
    assert "Did you mean 'add'?" in trace.messages[2]['content']
    assert "'b' is a required property" in trace.messages[4]['content']


@pytest.mark.parametrize('name', ['internlm_v1_1', 'internlm2', 'chatml'])
def test_a_trace_is_a_record_to_train_on(name, exported):

    template, tokenizer = build_template(name), load_tokenizer(exported[name])
    broken = Script(template, [ADD]).lines[0].replace('"b": 2', '"b": ')
    wrong = {'tool_calls': [call('add', {'a': 1}, 'x')]}
    record = agent(name, [broken, wrong, ADD, CODE, DONE]).run(QUESTION).record()
    example = Example(record['messages'], record['tools'], 'here', 'messages')
    document = ConversationEncoder(tokenizer, template, 10_000)(example).documents[0]
    learned = tokenizer.decode([i for i, m in zip(*document, strict=True) if m])
    assert 'It is 3.' in learned and 'plot()' in learned and '"a": 1, "b": 2' in learned
    assert '"b": }' not in learned and '{"a": 1}' not in learned and 'ran plot' not in learned


def test_without_tools_it_is_a_chat():
    template = build_template('internlm')
    trace = Agent(lambda messages, tools: 'Action: none <tool_call>', template).run(QUESTION)
    assert trace.answer == 'Action: none <tool_call>' and trace.record().keys() == {'messages'}


def test_chats_are_models():
    """The signature that the docstring names."""
    assert list(Chat.stream.__annotations__)[:3] == ['messages', 'sampling', 'tools']


@pytest.mark.parametrize(
    ('options', 'messages', 'error'),
    [
        ({'max_turns': 0}, QUESTION, 'max_turns=0: at least 1'),
        ({'max_repairs': -1}, QUESTION, 'max_repairs=-1: at least 0'),
        ({}, [], 'messages: there is none'),
        ({}, [*QUESTION, {'role': 'assistant', 'content': 'a'}], "is of 'assistant': nothing to"),
    ],
)
def test_what_cannot_begin(options, messages, error):
    with pytest.raises(ValueError, match=error):
        agent('chatml', [], **options).run(messages)
    with pytest.raises(ValueError, match="'internlm' spells no functions"):
        agent('internlm', [])


@pytest.mark.parametrize('name', ['internlm_v1_1', 'internlm2'])
def test_the_sandbox_is_an_interpreter(name):
    """Variables stay, errors come back to the model, and nothing else of this machine does."""
    try:
        sandbox = Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    lines = [
        {'content': 'first', 'tool_calls': [call('python', {'code': 'x = 17 * 23'}, 'a')]},
        {'tool_calls': [call('python', {'code': 'y / 2'}, 'b')]},
        {'tool_calls': [call('python', {'code': 'x'}, 'c')]},
        {'content': 'It is 391.'},
    ]
    template = build_template(name)
    with sandbox, sandbox.session() as session:
        box = Toolbox([interpreter(session.run)])
        trace = Agent(Script(template, lines), template, box).run(QUESTION)
    assert trace.answer == 'It is 391.'
    assert [result.status for result in trace.results] == ['ok', 'error', 'ok']
    assert "NameError: name 'y' is not defined" in trace.results[1].text
    assert trace.results[2].text == '391'


def test_without_events_a_trace_is_the_same():
    template = build_template('internlm2')
    two = {'tool_calls': [call('add', {'a': 1, 'b': 2}, 'x'), call('nothing', {}, 'y')]}
    lines = [two, 'a <|action_start|><|plugin|>\n{"name"', DONE]
    worker = agent('internlm2', lines)
    expected = worker.run(QUESTION)
    spelt = agent('internlm2', lines).model.lines
    trace = worker.begin(QUESTION)
    for written in spelt:
        worker.hear(trace, read_answer(template, written), written)
        for one in trace.waiting():
            trace.take(worker.toolbox.call(one.name, one.arguments))
        assert trace.waiting() == []
    assert trace == expected and trace.status == 'answer' and len(trace.results) == 2


def test_bad_programs_are_told_and_the_chat_goes_on(tmp_path):
    """Each is told to the model; what was defined stays, and nothing of this machine changes."""
    outside = tmp_path / 'outside'
    outside.write_text('as it was')
    programs = {
        'x = 5': 'ok',
        'print((': 'error',
        'while True: pass': 'timeout',
        'print("y" * 3_000_000)': 'error',
        f'open({str(outside)!r}, "w")': 'error',
        'import sys; sys.exit(3)': 'error',
        'x': 'ok',
    }
    lines = [{'tool_calls': [call('python', {'code': one}, 'a')]} for one in programs]
    template = build_template('internlm2')
    limits = Limits(seconds=1, grace_seconds=5, output_mb=1, output_chars=1000)
    try:
        sandbox = Sandbox(spare=0, limits=limits)
    except SandboxError as error:
        pytest.skip(str(error))
    with sandbox, sandbox.session() as session:
        box = Toolbox([interpreter(session.run)], max_chars=2000)
        agent = Agent(Script(template, [*lines, DONE]), template, box)
        trace = agent.run(QUESTION)
    assert trace.status == 'answer' and trace.answer == 'It is 3.'
    assert [result.status for result in trace.results] == list(programs.values())
    told = [result.text for result in trace.results]
    assert "SyntaxError: '(' was never closed" in told[1] and 'print((' in told[1]
    assert 'ran longer than 1 s' in told[2] and 'is still there' in told[2]
    assert 'wrote more than 1 MiB' in told[3] and max(map(len, told)) < 2100
    assert 'FileNotFoundError' in told[4] or 'PermissionError' in told[4]
    assert 'SystemExit: 3' in told[5] and told[6] == '5'
    assert [p.name for p in tmp_path.iterdir()] == ['outside']
    assert outside.read_text() == 'as it was'
