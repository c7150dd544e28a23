import json
from pathlib import Path

import pytest

from internlm_mm.datasets import ConversationDataset
from internlm_mm.datasets.browsing import (
    LEARNED,
    SPECIAL,
    look_over,
    show_row,
    special_tokens,
    stops_are_learned,
)
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.chat_spelling import Encoded
from tests.conversations import CALLING, NAMES, PLAIN, TOOLS, internlm_model

Q, A = {'role': 'user', 'content': 'def'}, {'role': 'assistant', 'content': 'return 书'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer'))


def test_a_row_is_shown_with_its_loss(tmp_path: Path, tokenizer) -> None:
    (tmp_path / 'c.jsonl').write_text(json.dumps({'messages': [Q, A]}))
    dataset = ConversationDataset(
        tmp_path / 'c.jsonl',
        seq_len=64,
        chat_template='internlm2',
        tokenizer=tokenizer,
        cache_dir=tmp_path / 'cache',
    )
    shown = show_row(dataset[0], tokenizer, special_tokens(tokenizer, dataset.template))
    text = '<bos><|im_start|>user\ndef<|im_end|>\n<|im_start|>assistant\nreturn 书<|im_end|>\n'
    assert shown.plain.startswith(text)
    learned = int((dataset[0].labels != -100).sum())
    assert f'[{dataset[0].lengths[0]} tokens, {learned} learned]' in shown.plain
    assert shown.plain.endswith(f'[{dataset[0].lengths[1]} tokens of padding]\n')
    by_style: dict[str, str] = {}
    for span in shown.spans:
        style = str(span.style)
        by_style[style] = by_style.get(style, '') + shown.plain[span.start : span.end]
    assert by_style[LEARNED] == 'return 书'
    assert by_style[f'{SPECIAL} underline'] == '<|im_end|>'
    assert by_style[SPECIAL] == '<bos><|im_start|><|im_end|><|im_start|>'


def over(folder: Path, tokenizer, *lines: str, size: int = 500, overlong: str = 'split'):
    (folder / 'c.jsonl').write_text('\n'.join(lines))
    encoder = ConversationEncoder(tokenizer, build_template('internlm2'), size, overlong)
    return look_over({'c': [folder / 'c.jsonl']}, encoder)


def test_statistics_by_role(tmp_path: Path, tokenizer) -> None:
    records = [{'messages': PLAIN}, {'messages': CALLING, 'tools': TOOLS}]
    report = over(tmp_path, tokenizer, *map(json.dumps, records))
    assert report.problems == [] and report.conversations == 2
    assert report.messages == {'system': 2, 'user': 3, 'assistant': 5, 'tool': 2}
    users = [m['content'] for r in records for m in r['messages'] if m['role'] == 'user']
    assert report.tokens['user'] == sum(len(tokenizer.encode(text)) for text in users)
    template = build_template('internlm2')
    encoded = [template.encode(tokenizer, r['messages'], r.get('tools')) for r in records]
    assert report.lengths == [len(one.ids) for one in encoded]
    assert report.learned == sum(sum(one.loss_mask) for one in encoded)
    assert '2 conversations, 0 of them longer' in report.lines()[0]
    assert report.table().row_count == 4


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        ('{"messages": [', 'c.jsonl:2: not JSON'),
        (json.dumps({'messages': [Q, Q]}), "c.jsonl:2, message 1: role 'user' after 'user'"),
        (json.dumps({'messages': [Q, {**A, 'content': ''}]}), 'c.jsonl:2, message 1: content is'),
        (json.dumps({'messages': [Q]}), 'c.jsonl:2, messages: there is nothing to learn'),
        (json.dumps({'messages': [Q, {**A, 'content': 'x' * 600}]}), 'c.jsonl:2, message 0: the'),
        (
            json.dumps({'messages': [{**Q, 'content': 'hi<eoh>'}, A]}),
            "c.jsonl:2, message 0: content spells '<eoh>', which is plain text here",
        ),
    ],
)
def test_problems(tmp_path: Path, tokenizer, line: str, problem: str) -> None:
    report = over(tmp_path, tokenizer, json.dumps({'messages': [Q, A]}), line)
    assert len(report.problems) == 1 and problem in report.problems[0]


def test_nothing_at_all(tmp_path: Path, tokenizer) -> None:
    report = over(tmp_path, tokenizer, json.dumps({'messages': [Q]}))
    assert report.lines() == ['no conversation can be trained on, 1 problems']


@pytest.mark.parametrize('name', NAMES)
def test_stop_tokens_without_a_loss_are_found(tokenizer, name: str) -> None:
    template = build_template(name)
    encoder = ConversationEncoder(tokenizer, template, 500, add_ending=False)
    document = template.encode(tokenizer, PLAIN)
    assert stops_are_learned(document, encoder)
    # A mask that forgets the last token of the last answer, as others have made it.
    stop = len(template.stop[0]) if template.token_id(tokenizer, template.stop[0]) is None else 1
    last = max(place for place, mask in enumerate(document.loss_mask) if mask)
    mask = [m and not last - stop < place <= last for place, m in enumerate(document.loss_mask)]
    assert not stops_are_learned(Encoded(document.ids, mask), encoder)
