"""A sample as MOSS-003's plugin data has them."""

import pytest

from internlm_mm.datasets.conversation_formats import detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.moss import read, write

META = (
    'You are an AI assistant whose name is MOSS.\nCapabilities and tools that MOSS can possess.\n'
    '- Inner thoughts: enabled.\n- Web search: enabled. API: Search(query)\n'
    '- Calculator: enabled. API: Calculate(expression)\n- Equation solver: disabled.\n'
)
FOUND = "<|1|>: '电子邮件'\n<|2|>: '文本'"
SAMPLE = {
    'conversation_id': '1',
    'meta_instruction': META,
    'num_turns': 3,
    'chat': {
        'turn_1': {
            'Human': '<|Human|>: 应用有哪些？<eoh>\n',
            'Inner Thoughts': '<|Inner Thoughts|>: 需要列举<eot>\n',
            'Commands': '<|Commands|>: Search("自然语言")<eoc>\n',
            'Tool Responses': f'<|Results|>:\nSearch("自然语言") =>\n{FOUND}\n<eor>\n',
            'MOSS': '<|MOSS|>: 广泛 <|1|>。<eom>\n',
        },
        'turn_2': {
            'Human': '<|Human|>: 谢谢<eoh>\n',
            'Inner Thoughts': '<|Inner Thoughts|>: None<eot>\n',
            'Commands': '<|Commands|>: None<eoc>\n',
            'Tool Responses': '<|Results|>: None<eor>\n',
            'MOSS': '<|MOSS|>: 不客气<eom>\n',
        },
        'turn_3': {
            'Human': '<|Human|>: 1+2?<eoh>\n',
            'Inner Thoughts': '<|Inner Thoughts|>: None<eot>\n',
            'Commands': '<|Commands|>: Calculate("1+2"), Search("three")<eoc>\n',
            'Tool Responses': '<|Results|>:\nCalculate("1+2") =>\n3\nSearch("three") =>\n3 is\n'
            '<eor>\n',
            'MOSS': '<|MOSS|>: 3<eom>\n',
        },
    },
}  # fmt: skip


def called(name: str, **arguments: str) -> dict:
    return {'type': 'function', 'function': {'name': name, 'arguments': arguments}}


def test_read():
    messages, tools = read(SAMPLE)
    assert [tool['function']['name'] for tool in tools] == ['Search', 'Calculate']
    assert tools[0]['function']['parameters']['required'] == ['query']
    assert messages == [
        {'role': 'system', 'content': META},
        {'role': 'user', 'content': '应用有哪些？'},
        {
            'role': 'assistant',
            'content': '需要列举',
            'tool_calls': [called('Search', query='自然语言')],
        },
        {'role': 'tool', 'content': FOUND},
        {'role': 'assistant', 'content': '广泛 <|1|>。'},
        {'role': 'user', 'content': '谢谢'},
        {'role': 'assistant', 'content': '不客气'},
        {'role': 'user', 'content': '1+2?'},
        {
            'role': 'assistant',
            'content': '',
            'tool_calls': [called('Calculate', expression='1+2'), called('Search', query='three')],
        },
        {'role': 'tool', 'name': 'Calculate', 'content': '3'},
        {'role': 'tool', 'name': 'Search', 'content': '3 is'},
        {'role': 'assistant', 'content': '3'},
    ]  # fmt: skip
    assert detect_format(SAMPLE) == 'moss'


def test_nothing_is_lost():
    converted = convert_record(SAMPLE, 'moss')
    assert 'source' not in converted
    assert convert_record(converted, 'messages', 'moss') == SAMPLE


def with_commands(commands: str, results: str = 'None', thought: str = 'None') -> dict:
    turn = SAMPLE['chat']['turn_1'] | {
        'Commands': f'<|Commands|>: {commands}<eoc>\n',
        'Tool Responses': f'<|Results|>:\n{results}\n<eor>\n',
        'Inner Thoughts': f'<|Inner Thoughts|>: {thought}<eot>\n',
    }
    return {'meta_instruction': '', 'num_turns': 1, 'chat': {'turn_1': turn}}


def test_commands_are_read_and_never_run(tmp_path):
    target = tmp_path / 'made'
    messages, _ = read(with_commands(f'Search(open("{target}", "w").write("x"))', 'r'))
    assert messages[1]['tool_calls'] == [
        called('Search', query=f'open("{target}", "w").write("x")')]  # fmt: skip
    assert not target.exists()
    assert read(with_commands('Calculate(2^3)'))[0][1]['tool_calls'] == [
        called('Calculate', expression='2^3')]  # fmt: skip


def test_what_the_messages_cannot_hold_comes_back():
    for record in (
        with_commands('Calculate(2^3)', '8'),
        with_commands('None', 'None', 'I know this.'),
        with_commands('Search("a"), Search("b")', 'both of them'),
    ):
        converted = convert_record(record, 'moss')
        assert 'source' in converted
        assert convert_record(converted, 'messages', 'moss') == record


@pytest.mark.parametrize(
    ('change', 'error'),
    [
        ({'chat': None}, "field 'chat' is null"),
        ({'chat': []}, 'chat: an object of turns, not list'),
        ({'chat': {'first': {}}}, "chat: 'turn_1' and so on, not 'first'"),
        ({'chat': {'turn_1': 3}}, 'chat.turn_1: an object, not int'),
        ({'chat': {'turn_1': {'Human': 3}}}, 'chat.turn_1.Human: a text, not int'),
        ({'chat': {'turn_1': {'Commands': 'look around'}}}, "Commands: no call: 'look around'"),
    ],
)
def test_malformed(change, error):
    with pytest.raises(ValueError, match=error):
        read(SAMPLE | change)


def test_what_has_no_place():
    messages, tools = read(SAMPLE)
    with pytest.raises(ValueError, match="does not say 'API: Search"):
        write(messages[1:], tools)
    twice = [messages[1], messages[2], messages[3], messages[2], messages[3]]
    with pytest.raises(ValueError, match='message 3: this form has calls once a turn'):
        write(twice, [])
    with pytest.raises(ValueError, match='one argument a call'):
        write([messages[1], {'role': 'assistant', 'tool_calls': [called('f', a='1', b='2')]}], [])
