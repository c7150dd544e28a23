"""Records of preferences in their public forms, against what they mean by hand."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from internlm_mm.datasets.preference_formats import (
    FORMATS,
    check_format,
    detect_format,
    read_preferences,
)

USER = [{'role': 'user', 'content': 'Hi?'}]
GOOD, BAD = 'Hello.', 'Go away.'
ANSWERS = [[{'role': 'assistant', 'content': text}] for text in (GOOD, BAD)]
TALK = [
    {'role': 'user', 'content': 'A?'},
    {'role': 'assistant', 'content': 'B.'},
    {'role': 'user', 'content': 'C?'},
]
OTHER = {'role': 'user', 'content': 'totally other'}
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': '{"x": 1}'}, 'id': 'a'}
CALLS = [
    {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
    {'role': 'tool', 'tool_call_id': 'a', 'content': '2'},
    ANSWERS[0][0],
]


def turns(*texts: str) -> str:
    return ''.join(
        f'\n\n{("Human", "Assistant")[index % 2]}: {text}' for index, text in enumerate(texts)
    )


# Name, record, format, prompt; both answers are ANSWERS unless said.
RECORDS = [
    (
        'message',
        dict(messages=USER, chosen=ANSWERS[0][0], rejected=ANSWERS[1][0]),
        'messages',
        USER,
    ),
    ('messages and texts', dict(messages=TALK, chosen=GOOD, rejected=BAD), 'messages', TALK),
    ('trl', dict(prompt=USER, chosen=ANSWERS[0], rejected=ANSWERS[1]), 'prompt', USER),
    ('trl, plain', dict(prompt='Hi?', chosen=GOOD, rejected=BAD), 'prompt', USER),
    (
        'trl, implicit prompt',
        dict(chosen=TALK + ANSWERS[0], rejected=TALK + ANSWERS[1]),
        'prompt',
        TALK,
    ),
    (
        'ultrafeedback, binarised',
        dict(
            prompt='Hi?', prompt_id='x', messages=USER + ANSWERS[0], score_chosen=8.0,
            chosen=USER + ANSWERS[0], rejected=USER + ANSWERS[1], score_rejected=3.0,
        ),
        'prompt',
        USER,
    ),
    (
        'a prompt that says what two conversations say',
        dict(
            prompt=[SYSTEM, TALK[0]], system='Be brief.',
            chosen=TALK + ANSWERS[0], rejected=TALK + ANSWERS[1],
        ),
        'prompt',
        [SYSTEM, *TALK],
    ),
    (
        'orca',
        dict(system='Be brief.', question='Hi?', chosen=GOOD, rejected=BAD),
        'prompt',
        [SYSTEM, *USER],
    ),
    (
        'hh',
        dict(
            chosen=turns('A?', 'B.', 'C?', GOOD), rejected=turns('A?', 'B.', 'C?', BAD) + '\n'
        ),
        'hh',
        TALK,
    ),
    (
        'stack exchange',
        dict(qid=3, question='Hi?', response_j=GOOD, response_k=BAD),
        'question_responses',
        USER,
    ),
    (
        'llama factory, sharegpt',
        dict(
            conversations=[{'from': 'human', 'value': 'Hi?'}], system='Be brief.',
            chosen={'from': 'gpt', 'value': GOOD}, rejected={'from': 'gpt', 'value': BAD},
        ),
        'sharegpt',
        [SYSTEM, *USER],
    ),
    (
        'llama factory, alpaca',
        dict(
            instruction='C', input='?', history=[['A?', 'B.']], chosen=GOOD, rejected=BAD,
        ),
        'alpaca',
        [*TALK[:2], {'role': 'user', 'content': 'C\n?'}],
    ),
]  # fmt: skip


def write(path: Path, *records: dict) -> Path:
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


@pytest.mark.parametrize(
    ('record', 'format', 'prompt'),
    [record[1:] for record in RECORDS],
    ids=[record[0] for record in RECORDS],
)
def test_what_each_form_means(record, format, prompt, tmp_path) -> None:
    assert detect_format(record) == format
    file = write(tmp_path / 'pairs.jsonl', record)
    (found,) = read_preferences(file)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, *ANSWERS)
    assert (found.format, found.place, found.tools) == (format, f'{file}:1', [])
    assert list(read_preferences(file, format)) == [found]


def test_every_form_is_tried() -> None:
    assert {record[2] for record in RECORDS} == set(FORMATS)


def test_answers_with_calls_and_functions(tmp_path) -> None:
    tools = [{'type': 'function', 'function': {'name': 'f'}}]
    record = dict(prompt=USER, chosen=CALLS, rejected=ANSWERS[1], tools=json.dumps(tools))
    (found,) = read_preferences(write(tmp_path / 'a.jsonl', record))
    assert found.tools == tools and len(found.chosen) == 3
    implicit = dict(chosen=USER + CALLS, rejected=USER + ANSWERS[1], tools=tools)
    assert next(read_preferences(write(tmp_path / 'b.jsonl', implicit)))[:4] == found[:4]
    (messages,) = read_preferences(
        write(tmp_path / 'c.jsonl', dict(messages=USER, chosen=CALLS, rejected=BAD, tools=tools))
    )
    assert messages[:4] == found[:4]
    alpaca = dict(instruction='Hi?', chosen=GOOD, rejected=BAD, tools=tools)
    (texts,) = read_preferences(write(tmp_path / 'd.jsonl', alpaca))
    assert (texts.format, texts.tools) == ('alpaca', tools)


def test_kinds_of_files(tmp_path) -> None:
    records = [
        dict(prompt='Hi?', chosen=GOOD, rejected=BAD),
        dict(prompt='X', chosen='1', rejected='2'),
    ]
    (tmp_path / 'a.json').write_text(json.dumps(records))
    with gzip.open(tmp_path / 'b.jsonl.gz', 'wt') as file:
        file.write('\n'.join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / 'c.parquet')
    conversational = dict(prompt='Hi?', chosen=USER + ANSWERS[0], rejected=USER + ANSWERS[1])
    pq.write_table(pa.Table.from_pylist([conversational]), tmp_path / 'd.parquet')
    expected = [(USER, *ANSWERS)]
    for name in 'a.json', 'b.jsonl.gz', 'c.parquet', 'd.parquet':
        found = [pair[:3] for pair in read_preferences(tmp_path / name)]
        assert found[:1] == expected and len(found) == (1 if name[0] == 'd' else 2)
    place = [pair.place for pair in read_preferences(tmp_path / 'a.json')][1]
    assert place == f'{tmp_path}/a.json: record 2'


MALFORMED = [
    (dict(prompt='Hi?', chosen=GOOD), "'rejected' is missing"),
    (dict(prompt='Hi?', chosen=GOOD, rejceted=BAD), "'rejected' is missing.*'rejceted'"),
    (dict(prompt='Hi?', chosen=GOOD, rejected=3), 'rejected, message 0: an object'),
    (dict(prompt=None, chosen=GOOD, rejected=BAD), "'prompt' is null"),
    (dict(promt='Hi?', chosen=GOOD, rejected=BAD), "'prompt' is missing.*'promt'"),
    (dict(question=None, chosen=GOOD, rejected=BAD), "'question' is null"),
    (dict(prompt='Hi?', chosen=GOOD, rejected=None), "'rejected' is null"),
    (dict(prompt=7, chosen=GOOD, rejected=BAD), 'prompt: a text, not int'),
    (dict(prompt=[], chosen=GOOD, rejected=BAD), 'prompt: it is empty'),
    (dict(prompt='Hi?', chosen=[], rejected=BAD), 'chosen: it is empty'),
    (dict(prompt='Hi?', chosen=GOOD, rejected=GOOD), 'chosen and rejected are the same'),
    (dict(prompt='Hi?', chosen=GOOD, rejected='a\ud800'), r'rejected\[0\]: the text has a lone'),
    (dict(prompt='\udc00', chosen=GOOD, rejected=BAD), r'prompt\[0\]: the text has a lone'),
    (
        dict(prompt=USER, chosen=ANSWERS[0] + USER, rejected=BAD),
        'chosen: an answer of the assistant is expected at the end',
    ),
    (
        dict(prompt=USER, chosen=[ANSWERS[0][0] | {'weight': 0}], rejected=BAD),
        'chosen: all of an answer is compared',
    ),
    (
        dict(prompt=USER, chosen=[ANSWERS[0][0] | {'loss': 0}], rejected=BAD),
        'chosen: all of an answer is compared',
    ),
    (
        dict(prompt=None, chosen=TALK, rejected=TALK + ANSWERS[0]),
        'chosen: it is the beginning of the other',
    ),
    (
        dict(prompt='totally other', chosen=TALK + ANSWERS[0], rejected=TALK + ANSWERS[1]),
        "prompt: it says 'totally other', which is no turn of chosen and rejected",
    ),
    (
        dict(
            prompt=[{'role': 'user', 'content': ['x', 3]}],
            chosen=TALK + ANSWERS[0],
            rejected=TALK + ANSWERS[1],
        ),
        'prompt',
    ),
    (
        dict(question=[OTHER], chosen=TALK + ANSWERS[0], rejected=TALK + ANSWERS[1]),
        "question: it says 'totally other'",
    ),
    (
        dict(prompt='x', chosen=TALK + ANSWERS[0], rejected=USER + ANSWERS[1]),
        r"chosen\[0\]: the conversations part in a message of role 'user'",
    ),
]


@pytest.mark.parametrize(('record', 'message'), MALFORMED)
def test_malformed_records(record, message, tmp_path) -> None:
    good = dict(prompt='Hi?', chosen=GOOD, rejected=BAD)
    file = write(tmp_path / 'pairs.jsonl', good, record, good)
    first, error, last = read_preferences(file)
    assert first[:4] == last[:4]
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match=f'pairs.jsonl:2, .*{message}'):
        raise error


@pytest.mark.parametrize(
    ('format', 'record', 'message'),
    [
        ('hh', dict(chosen='Hello', rejected='No'), "chosen: it does not begin with 'Human:'"),
        ('hh', dict(chosen=turns('A?', GOOD), rejected=7), 'rejected: a text, not int'),
        ('hh', dict(chosen=turns('A?', 'B'), rejected=turns('B?', 'C')), 'conversations part in'),
        (
            'sharegpt',
            dict(
                conversations=[{'from': 'human', 'value': 'A?'}],
                chosen={'from': 'gtp', 'value': 'x'},
                rejected={'from': 'gpt', 'value': 'y'},
            ),
            r"chosen: conversations\[0\].from 'gtp' is none.*'gpt'",
        ),
        ('question_responses', dict(question='A', response_j='b'), "'response_k' is missing"),
        ('alpaca', dict(instruction=1, chosen=GOOD, rejected=BAD), 'instruction: a text, not int'),
        ('messages', dict(messages=[], chosen=GOOD, rejected=BAD), 'prompt: there is none'),
    ],
)
def test_malformed_records_of_a_form(format, record, message, tmp_path) -> None:
    (error,) = read_preferences(write(tmp_path / 'pairs.jsonl', record), format)
    with pytest.raises(ValueError, match=f'pairs.jsonl:1, .*{message}'):
        raise error


def test_parquet_that_has_filled_up_arguments(tmp_path) -> None:
    functions = [{'name': 'f', 'arguments': arguments} for arguments in ({'a': 1}, {'b': 2})]
    calls = [
        {'role': 'assistant', 'content': 'x', 'tool_calls': [{'function': function}]}
        for function in functions
    ]
    rows = [dict(prompt='A?', chosen=[call], rejected=ANSWERS[1]) for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'pairs.parquet')
    error = next(read_preferences(tmp_path / 'pairs.parquet', 'prompt'))
    assert "store the column 'chosen' as JSON text" in str(error)


def test_forms_that_there_are_not(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"format='shargpt' is none of auto, .*'sharegpt'"):
        check_format('shargpt')
    with pytest.raises(ValueError, match="the keys 'a', 'b' are of no form"):
        detect_format({'a': 1, 'b': 2})
    with pytest.raises(ValueError, match=r"_k\. Did you mean 'rejected' by 'rejectd'\?"):
        detect_format({'prompt': 'q', 'chosen': 'a', 'rejectd': 'b'})
    with pytest.raises(ValueError, match=r'x\.jsonl:1: an object is expected, not list'):
        next(read_preferences(write(tmp_path / 'x.jsonl', [1])))
