"""Every class of malformed record: found with file, line and field, wherever it stands."""

import json
from pathlib import Path

import pytest

from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.inspection import (
    Marks,
    absent_marks,
    has_stop,
    learned_stretches,
    look_over,
    texts_of,
)
from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers import ChatTemplate, build_template
from internlm_mm.tokenizers.chat_spelling import Encoded
from tests.conversations import CALLING, NAMES, PLAIN, TOOLS, call, internlm_model
from tests.trained import train_tokenizer

Q, A = {'role': 'user', 'content': 'def'}, {'role': 'assistant', 'content': 'return 书'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer'))


def over(
    folder: Path,
    tokenizer,
    *lines: str,
    size: int = 500,
    overlong: str = 'split',
    template: ChatTemplate | str = 'internlm2',
    **options,
):
    (folder / 'c.jsonl').write_text('\n'.join(lines))
    encoder = ConversationEncoder(tokenizer, build_template(template), size, overlong)
    return look_over({'c': [folder / 'c.jsonl']}, encoder, **options)


def chat(*messages: dict, **more) -> str:
    return json.dumps({'messages': messages, **more})


def test_statistics_by_role(tmp_path: Path, tokenizer) -> None:
    records = [{'messages': PLAIN}, {'messages': CALLING, 'tools': TOOLS}]
    report = over(tmp_path, tokenizer, *map(json.dumps, records))
    assert report.problems == report.notes == [] and report.conversations == 2
    assert report.messages == {'system': 2, 'user': 3, 'assistant': 5, 'tool': 2}
    users = [m['content'] for r in records for m in r['messages'] if m['role'] == 'user']
    assert report.tokens['user'] == sum(len(tokenizer.encode(text)) for text in users)
    template = build_template('internlm2')
    encoded = [template.encode(tokenizer, r['messages'], r.get('tools')) for r in records]
    assert report.lengths == [len(one.ids) for one in encoded]
    assert report.learned == sum(sum(one.loss_mask) for one in encoded)
    assert '2 conversations, 0 of them longer' in report.lines()[0]
    assert [row[:3] for row in report.roles().rows] == [
        ('system', '2', '0'),
        ('user', '3', '0'),
        ('assistant', '5', '5'),
        ('tool', '2', '0'),
    ]
    muted = over(tmp_path, tokenizer, chat(Q, {**A, 'loss': 0}, Q, A))
    assert muted.messages['assistant'] == 2 and muted.with_loss == {'user': 0, 'assistant': 1}


CALL = {'role': 'assistant', 'content': None, 'tool_calls': CALLING[2]['tool_calls']}
LONG = {**A, 'content': 'x' * 600}
BAD = {
    'broken JSON': ('{"messages": [', 'c.jsonl:2: not JSON'),
    'a key twice': (
        '{"messages": [], "messages": []}',
        "c.jsonl:2: not JSON: key 'messages'",
    ),
    'role order': (chat(Q, Q), "c.jsonl:2, message 1: role 'user' after 'user'"),
    'no role': (chat({'content': 'x'}), 'c.jsonl:2, message 0: role None is none'),
    'a call without its result': (
        chat(Q, CALL, A),
        "c.jsonl:2, message 2: role 'assistant', but there is no result yet of 'python'",
    ),
    'an empty answer': (chat(Q, {**A, 'content': ''}), 'c.jsonl:2, message 1: content is empty'),
    'nothing to learn': (chat(Q), 'c.jsonl:2, messages: there is nothing to learn'),
    'only a system': (
        chat({'role': 'system', 'content': 's'}),
        'c.jsonl:2, messages: there is nothing to learn',
    ),
    'too long': (chat(Q, LONG), 'c.jsonl:2, message 0: the turn that begins here is longer'),
    'a mark of a template': (
        chat({**Q, 'content': 'hi<eoh>'}, A),
        "c.jsonl:2, message 0: content spells '<eoh>', which is plain text here: was the",
    ),
    'a mark by its other name': (
        chat(Q, {**A, 'content': '[UNUSED_TOKEN_145]'}),
        "c.jsonl:2, message 1: content spells '[UNUSED_TOKEN_145]'",
    ),
    'an unknown special token': (
        chat(Q, {**A, 'content': 'a<|im_edn|>'}),
        "c.jsonl:2, message 1: content spells '<|im_edn|>', which is plain text here: it looks "
        "like a special token. Did you mean '<|im_end|>'?",
    ),
    'one in a call': (
        chat(Q, {'role': 'assistant', 'tool_calls': [call('f', {'x': '<|plugin|>'}, 'a')]}),
        "c.jsonl:2, message 1: tool_calls[0].function.arguments spells '<|plugin|>'",
    ),
    'one in a part of a content': (
        chat({**Q, 'content': [{'text': 'a'}, {'text': '</s>'}]}, A),
        "c.jsonl:2, message 0: content[1].text spells '</s>'",
    ),
    'one in the description of a function': (
        chat(Q, A, tools=[{'name': 'f'}, {'name': 'g', 'description': 'ends <|im_end|>'}]),
        "c.jsonl:2, tools[1] spells '<|im_end|>', which is plain text here",
    ),
}


@pytest.mark.parametrize(('line', 'problem'), BAD.values(), ids=BAD)
def test_problems(tmp_path: Path, tokenizer, line: str, problem: str) -> None:
    report = over(tmp_path, tokenizer, chat(Q, A), line, chat(Q, A))
    assert len(report.problems) == 1 and problem in report.problems[0]
    assert report.conversations == 2 + ('spells' in problem)  # what follows is read
    assert '; 1 problem' in report.lines()[0]


def test_all_problems_at_once(tmp_path: Path, tokenizer) -> None:
    lines = [line for line, _ in BAD.values()]
    report = over(tmp_path, tokenizer, chat(Q, A), *lines)
    assert len(report.problems) == len(BAD)
    for number, (problem, (_, wanted)) in enumerate(
        zip(report.problems, BAD.values(), strict=True), 2
    ):
        assert wanted.replace('c.jsonl:2', f'c.jsonl:{number}') in problem


def test_over_long_ones_by_option(tmp_path: Path, tokenizer) -> None:
    report = over(tmp_path, tokenizer, chat(Q, LONG), overlong='error')
    assert (
        'c.jsonl:1: 6' in report.problems[0] and 'more than the 500 of a row' in report.problems[0]
    )
    report = over(tmp_path, tokenizer, chat(Q, LONG), overlong='truncate')
    assert report.problems == [] and report.cut == 1 and report.lengths == [500]
    whole = build_template('internlm2').encode(tokenizer, [Q, LONG], add_ending=True)
    assert report.lost == len(whole.ids) - 500
    assert f'1 of them longer than a row ({report.lost} tokens are cut off)' in report.lines()[0]


def test_an_answer_that_is_not_taught_to_stop(tmp_path: Path, tokenizer) -> None:
    """By a template whose stop is not learned; muted answers have nothing to stop."""
    silent = ChatTemplate(
        name='silent',
        marks=('<eoa>',),
        stop=('<eoa>',),
        system=('S:', '\n'),
        user=('U:', '\n'),
        assistant=('A:', '', '<eoa>\n'),
    )
    line = chat(Q, {**A, 'loss': False}, Q, A, Q, A)
    report = over(tmp_path, tokenizer, line, template=silent)
    assert report.problems == [
        f'{tmp_path}/c.jsonl:1, message {index}: its answer ends without a stop token that is '
        'learned: the model would not stop'
        for index in (3, 5)
    ]


@pytest.mark.parametrize('name', NAMES)
def test_stops_of_every_template(tokenizer, name: str) -> None:
    template = build_template(name)
    document = template.encode(tokenizer, PLAIN)
    answers = learned_stretches(document)
    assert len(answers) == 2
    assert all(has_stop(answer, template, tokenizer) for answer in answers)
    # A mask that forgets the last token of the last answer, as others have made it.
    is_token = template.token_id(tokenizer, template.stop[0]) is not None
    stop = 1 if is_token else len(tokenizer.encode(template.stop[0]))
    assert not has_stop(answers[1][:-stop], template, tokenizer)


def test_stretches() -> None:
    document = Encoded([1, 2, 3, 4, 5, 6], [True, False, True, True, False, True])
    assert learned_stretches(document) == [[1], [3, 4], [6]]


def test_nothing_at_all(tmp_path: Path, tokenizer) -> None:
    report = over(tmp_path, tokenizer, chat(Q))
    assert report.lines() == ['no conversation can be trained on, 1 problem']
    assert 'there is nothing to learn' in report.problems[0]
    (tmp_path / 'empty.jsonl').write_text('')
    files = {'here': [tmp_path / 'c.jsonl'], 'empty': [tmp_path / 'empty.jsonl']}
    (tmp_path / 'c.jsonl').write_text(chat(Q, A))
    encoder = ConversationEncoder(tokenizer, build_template('internlm2'), 500, 'split')
    report = look_over(files, encoder)
    assert report.problems == [f'{tmp_path}/empty.jsonl: no conversation to learn from']


def test_a_file_that_cannot_be_read_on(tmp_path: Path, tokenizer) -> None:
    report = over(tmp_path, tokenizer, json.dumps({'text': 'x'}), chat(Q, A))
    assert len(report.problems) == 1
    assert "c.jsonl:1: the keys 'text' are of no form" in report.problems[0]


def test_what_else_is_asked(tmp_path: Path, tokenizer) -> None:
    """With documents, or without where there are none; what it tells comes first and alone."""
    seen = []

    def also(example, documents, template, given) -> list[str]:
        seen.append((len(documents), template.name, given is tokenizer))
        return ['of mine'] if 'mine' in str(example.messages) else []

    answer = {'role': 'assistant', 'content': 'a'}
    lines = [
        chat({'role': 'user', 'content': 'mine'}, answer),
        chat({'role': 'user', 'content': 'mine'}),
        chat({'role': 'user', 'content': 'b'}),
    ]
    report = over(tmp_path, tokenizer, *lines, also=also)
    assert [words for words, _, _ in seen] == [1, 0, 0]
    assert all(name == 'internlm2' and same for _, name, same in seen)
    assert [problem.rpartition(':')[2] for problem in report.problems[:2]] == [
        '1, of mine',
        '2, of mine',
    ]
    assert len(report.problems) == 3 and 'nothing to learn' in report.problems[2]
    assert report.conversations == 1


def test_only_the_first_records(tmp_path: Path, tokenizer) -> None:
    report = over(tmp_path, tokenizer, *[chat(Q, A)] * 5, '{', limit=3)
    assert report.conversations == 3 and report.is_part and report.problems == []
    assert report.lines()[0].startswith('the first 3 conversations')
    assert not over(tmp_path, tokenizer, *[chat(Q, A)] * 3, limit=3).is_part


def test_marks_that_the_vocabulary_has_not(tmp_path: Path, tokenizer) -> None:
    assert absent_marks(tokenizer, build_template('internlm')) == []
    plain = train_tokenizer(tmp_path / 'plain')
    (note,) = absent_marks(plain, build_template('internlm'))
    assert "has no <eoh>, <eoa> of the template 'internlm'" in note
    report = over(tmp_path, plain, chat(Q, A), template='internlm')
    assert report.lines()[0] == note and report.problems == []


def test_every_mark_of_every_template_is_known() -> None:
    marks = Marks()
    for name in CHAT_TEMPLATES.module_dict:
        template = build_template(name)
        for mark in (*template.marks, *template.aliases.values()):
            (problem,) = marks.problems([{'content': f'a {mark} b'}], 'p')
            assert repr(mark) in problem and problem.endswith('already?')
    for text in ('a <b> c', 'x < y | z > w', '[1]', '<s>struck</s', '<|a b|>'):
        assert list(marks.problems([{'content': text}], 'p')) == []


def test_texts_of_a_message() -> None:
    message = {'content': [{'text': 'a'}, {'image': 1}], 'reasoning_content': 'b'}
    assert list(texts_of(message)) == [('content[0].text', 'a'), ('reasoning_content', 'b')]
    calls = CALLING[2] | {'content': None}
    field = 'tool_calls[0].function.arguments'
    assert list(texts_of(calls)) == [(field, '{"code": "print(6 * 7)"}')]
    as_text = call('f', {}, 'a')
    as_text['function']['arguments'] = '{"x": 1}'
    assert list(texts_of({'tool_calls': [as_text]})) == [(field, '{"x": 1}')]
    assert list(texts_of({'content': None})) == []
