"""Whatever is converted comes back; what cannot be is refused."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from internlm_mm.datasets.conversation_formats import FORMATS
from internlm_mm.datasets.converting import WRITERS, convert_files, convert_record
from internlm_mm.tokenizers import build_template
from tests.conversations import CALLING, PLAIN, TOOLS, conversations

WITHOUT_TOOLS = ('agent_flan', 'moss')  # they have functions in texts only


def said(messages: list[dict]) -> list[tuple]:
    """What a conversation says, without ids of calls and with names of results."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        calls = [call['function'] for call in message.get('tool_calls') or ()]
        names |= {
            c['id']: c['function']['name'] for c in message.get('tool_calls') or () if 'id' in c
        }
        name = names.get(message.get('tool_call_id', ''), message.get('name'))
        content = message.get('content') or ''
        found.append((message['role'], content, calls, name, message.get('loss', True)))
    return found


def without_names(found: list[tuple]) -> list[tuple]:
    return [(role, content, calls, loss) for role, content, calls, _, loss in found]


@pytest.mark.parametrize('form', [form for form in WRITERS if form not in ('messages', 'xlam')])
@settings(max_examples=15, deadline=None)
@given(data=some.data())
def test_any_conversation_comes_back_or_is_refused(form, data):
    messages = data.draw(conversations(build_template('internlm2')))
    for message in messages:
        if message['role'] == 'assistant' and data.draw(some.integers(0, 5)) == 0:
            message['loss'] = False
    tools = [] if form in WITHOUT_TOOLS else data.draw(some.sampled_from([[], TOOLS]))
    record = {'messages': messages, **({'tools': tools} if tools else {}), 'id': 3}
    before = copy.deepcopy(record)
    try:
        written = convert_record(record, 'messages', form)
    except ValueError as error:
        assert 'form' in str(error)
        return
    assert record == before and written['id'] == 3
    json.dumps(written, allow_nan=False)
    back = convert_record(json.loads(json.dumps(written)), form)
    assert without_names(said(back['messages'])) == without_names(said(messages))
    assert back.get('tools', []) == tools


@pytest.mark.parametrize('form', [form for form in WRITERS if form != 'xlam'])
def test_plain_and_calling_conversations_have_a_place(form):
    plain = {'messages': PLAIN[1:]}  # a system's text that is there
    assert said(convert_record(convert_record(plain, 'messages', form), form)['messages']) == said(
        PLAIN[1:]
    )
    if form in ('sharegpt', 'moss'):  # no text beside calls; one round of calls a turn
        with pytest.raises(ValueError, match='this form'):
            convert_record({'messages': CALLING}, 'messages', form)
        return
    tools = [] if form in (*WITHOUT_TOOLS, 'ms_agent') else TOOLS  # whose schemas have 'required'
    record = {'messages': CALLING, 'tools': tools}
    back = convert_record(convert_record(record, 'messages', form), form)
    assert without_names(said(back['messages'])) == without_names(said(CALLING))
    assert back.get('tools', []) == tools


def test_a_loss_has_no_place_in_most_forms():
    record = {'messages': [PLAIN[1], PLAIN[2] | {'loss': False}]}
    with pytest.raises(ValueError, match=r"message 1, loss: the form 'toolbench' has no place"):
        convert_record(record, 'messages', 'toolbench')
    assert convert_record(record, 'messages', 'agent_flan')['conversation'][1]['loss'] is False


def test_results_stand_in_the_order_of_calls():
    call = {'type': 'function', 'function': {'name': 'f', 'arguments': {}}}
    messages = [
        {'role': 'user', 'content': 'q'},
        {'role': 'assistant', 'content': '', 'tool_calls': [call | {'id': i} for i in 'ab']},
        {'role': 'tool', 'tool_call_id': 'b', 'content': 'of b'},
        {'role': 'tool', 'tool_call_id': 'a', 'content': 'of a'},
        {'role': 'assistant', 'content': 'x'},
    ]
    written = convert_record({'messages': messages}, 'messages', 'sharegpt')
    assert [turn['value'] for turn in written['conversations'][2:4]] == ['of a', 'of b']


def test_a_changed_record_does_not_go_back_to_its_source():
    record = {'query': 'q', 'tools': '[ ]', 'answers': '[{"name": "f", "arguments": {}}]', 'id': 1}
    converted = convert_record(record, 'xlam')
    assert convert_record(converted, 'messages', 'xlam') == record
    converted['messages'][0]['content'] = 'another'
    assert convert_record(converted, 'messages', 'xlam')['query'] == 'another'


def test_malformed_conversations_are_refused():
    with pytest.raises(ValueError, match="message 1: role 'user' after 'user'"):
        convert_record({'messages': [PLAIN[1], PLAIN[1]]}, 'messages', 'hermes')


def write(path: Path, *records: object) -> Path:
    path.write_text('\n'.join(json.dumps(record) for record in records))
    return path


def test_files(tmp_path: Path):
    turns = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
    first = write(tmp_path / 'a.jsonl', {'conversations': turns, 'id': 1}, {'conversations': 3})
    second = write(tmp_path / 'b.jsonl', {'query': 'q', 'answers': '[]', 'tools': '[]'})
    out = tmp_path / 'deep' / 'out.jsonl'
    counts = convert_files([first, second], out, on_error='skip')
    assert (counts.written, counts.skipped) == (2, 1)
    assert counts.forms == {'sharegpt': 1, 'xlam': 1}
    assert counts.messages == [f'{first}:2, conversations: a list, not int']
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records[0] == {
        'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}],
        'id': 1,
    }
    with pytest.raises(ValueError, match=r'a\.jsonl:2, conversations: a list'):
        convert_files([first], tmp_path / 'none.jsonl')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.jsonl', 'b.jsonl', 'deep']


def test_no_file_is_replaced_unasked(tmp_path: Path):
    turns = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
    source = write(tmp_path / 'a.jsonl', {'conversations': turns})
    before = source.read_text()
    with pytest.raises(FileExistsError, match=r'a\.jsonl exists; .* --overwrite'):
        convert_files([source], source)
    assert source.read_text() == before
    assert convert_files([source], source, overwrite=True).written == 1
    assert 'messages' in json.loads(source.read_text())
    with pytest.raises(ValueError, match=f'{tmp_path}: cannot read a folder, only .json, '):
        convert_files([tmp_path], tmp_path / 'b.jsonl')


@pytest.mark.parametrize(
    ('options', 'error'),
    [
        ({'form': 'toolbnch'}, "is none of .* Did you mean 'toolbench'?"),
        ({'to': 'hermess'}, "to='hermess' is none of .* Did you mean 'hermes'?"),
        ({'output': 'out.json'}, 'whose name ends in .jsonl'),
    ],
)
def test_options(tmp_path: Path, options: dict, error: str):
    options = {'output': 'out.jsonl'} | options
    with pytest.raises(ValueError, match=error):
        convert_files([], tmp_path / options.pop('output'), **options)


def test_every_form_that_is_written_is_read():
    assert set(WRITERS) < set(FORMATS)
