"""Conversations in memory and in files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as some

from internlm_mm.inference.dialogue import Dialogue
from internlm_mm.tokenizers.chat_messages import read_conversation
from tests.conversations import CALLING, PLAIN


@given(
    some.lists(some.tuples(some.text(min_size=1), some.one_of(some.just(''), some.text()))),
    some.integers(0, 3),
)
def test_roles_take_turns_whatever_happens(turns, undone):
    dialogue = Dialogue('S')
    for question, answer in turns:
        dialogue.ask(question)
        read_conversation(dialogue.whole())
        dialogue.reply(answer)
    answered = [turn for turn in turns if turn[1]]
    for question, _ in reversed(answered[len(answered) - min(undone, len(answered)) :]):
        assert dialogue.undo() == question
    kept = answered[: len(answered) - min(undone, len(answered))]
    contents = [message['content'] for message in dialogue.messages]
    assert contents == [text for turn in kept for text in turn]
    if kept:
        read_conversation(dialogue.whole())


def test_undo_takes_calls_and_results_with_it():
    dialogue = Dialogue()
    dialogue.messages = [*PLAIN[1:3], *CALLING[1:]]
    assert dialogue.undo() == CALLING[1]['content']
    assert dialogue.messages == PLAIN[1:3]
    dialogue.clear()
    with pytest.raises(ValueError, match='nothing has been said yet'):
        dialogue.undo()


@pytest.mark.parametrize('messages', [PLAIN, CALLING, PLAIN[1:]])
def test_files(messages, tmp_path):
    dialogue = Dialogue(messages[0]['content'] if messages[0]['role'] == 'system' else None)
    dialogue.messages = messages if dialogue.system is None else messages[1:]
    dialogue.save(tmp_path / 'c.json', 'internlm2')
    other = Dialogue('gone')
    assert other.load(tmp_path / 'c.json') == 'internlm2'
    assert other.whole() == messages
    (tmp_path / 'list.json').write_text(json.dumps(messages))
    assert other.load(tmp_path / 'list.json') is None
    assert other.whole() == messages


@pytest.mark.parametrize(
    ('content', 'error'),
    [
        ('{', 'c.json is no JSON'),
        ('{"messages": []}', 'c.json, messages: there is none'),
        ('{"massages": []}', 'c.json, messages: a list of dicts, not null or missing'),
        ('[{"role": "usr", "content": ""}]', "c.json, message 0: role 'usr'"),
        ('\xff', 'no JSON'),
    ],
)
def test_what_is_no_conversation_changes_nothing(content, error, tmp_path):
    (tmp_path / 'c.json').write_bytes(content.encode('latin-1'))
    dialogue = Dialogue('S')
    dialogue.ask('Q')
    with pytest.raises(ValueError, match=error):
        dialogue.load(tmp_path / 'c.json')
    assert [message['content'] for message in dialogue.whole()] == ['S', 'Q']
    with pytest.raises(FileNotFoundError, match='none is no file; expected a conversation'):
        dialogue.load(tmp_path / 'none')
