"""Token files, `.bin` files and pairs are looked over as conversations are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm_mm.datasets import TokenFileWriter
from internlm_mm.datasets.inspection_sets import inspect
from internlm_mm.datasets.internlm_bin import BinSample, write_bin
from tests.conversations import CALLING, PLAIN, TOOLS, internlm_model

Q, A = {'role': 'user', 'content': 'def'}, {'role': 'assistant', 'content': 'return 1'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer'))


def test_conversations_by_their_config(tmp_path: Path, tokenizer) -> None:
    lines = [{'messages': PLAIN}, {'messages': CALLING, 'tools': TOOLS}, {'messages': [Q]}]
    (tmp_path / 'c.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    config = dict(
        type='ConversationDataset',
        path=str(tmp_path / 'c.jsonl'),
        seq_len=512,
        chat_template='internlm2',
    )
    report = inspect(config, tokenizer)
    assert report.conversations == 2 and report.messages['tool'] == 2
    assert ['c.jsonl:3, messages: there' in problem for problem in report.problems] == [True]
    longer = inspect(
        {**config, 'overlong': 'truncate', 'seq_len': 60, 'path': [config['path']]}, tokenizer
    )
    assert longer.cut == 1 and longer.lost > 0 and 'what is left' in longer.problems[0]
    with pytest.raises(ValueError, match='with a tokenizer, and the config has none'):
        inspect(config, None)
    with pytest.raises(ValueError, match=r'RandomTokens cannot be checked; that of Conversation'):
        inspect(dict(type='RandomTokens', vocab_size=8, seq_len=4), tokenizer)


GOOD = {'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}
PAIRS = [
    (GOOD, None),
    (
        {'prompt': 'q', 'chosen': 'a', 'rejected': 'a'},
        'p.jsonl:2, chosen and rejected are the',
    ),
    ({'prompt': 'q', 'chosen': 'a'}, "p.jsonl:3, field 'rejected' is missing"),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': ''}, 'p.jsonl:5, rejected, message 1: content is'),
    ({'prompt': 'q', 'chosen': 'a', 'rejected': 'x' * 900}, 'p.jsonl:6: chosen and rejected have'),
    (
        {'prompt': 'q', 'chosen': 'a<eoa>', 'rejected': 'b'},
        "p.jsonl:7, chosen, message 0: content spells '<eoa>'",
    ),
    (
        {**GOOD, 'tools': [{'name': 'f', 'description': '<|plugin|>'}]},
        "p.jsonl:8, tools[0] spells '<|plugin|>'",
    ),
]


def test_pairs(tmp_path: Path, tokenizer) -> None:
    lines = [json.dumps(record) for record, _ in PAIRS]
    lines.insert(3, '{"prompt": "q", "chosen": ')
    (tmp_path / 'p.jsonl').write_text('\n'.join(lines))
    config = dict(
        type='PreferenceDataset',
        path=str(tmp_path / 'p.jsonl'),
        seq_len=256,
        chat_template='internlm2',
    )
    report = inspect(config, tokenizer)
    wanted = [message for _, message in PAIRS if message is not None]
    wanted.insert(2, 'p.jsonl:4: not JSON')
    assert len(report.problems) == len(wanted)
    for problem, message in zip(report.problems, wanted, strict=True):
        assert message in problem
    assert report.conversations == 3 and len(report.lengths) == 6
    assert report.messages == {'prompt': 3, 'chosen': 3, 'rejected': 3}
    assert report.lines()[0] == '3 pairs, 0 of them longer than a row; 7 problems'
    skipped = inspect({**config, 'overlong': 'skip'}, tokenizer, 6)
    assert skipped.cut == 1 and skipped.is_part and len(skipped.problems) == 4
    (tmp_path / 'p.jsonl').write_text('')
    assert inspect(config, tokenizer).problems == [f'{tmp_path}/p.jsonl: no pair to learn from']
    (tmp_path / 'p.jsonl').write_text('{"text": 1}')
    assert "the keys 'text' are of no form" in inspect(config, tokenizer).problems[0]


def encoded(tokenizer, *messages: dict) -> list[int]:
    from internlm_mm.tokenizers import build_template

    ids, mask = build_template('internlm').encode(tokenizer, messages, add_ending=True)
    return [index if loss else -index for index, loss in zip(ids, mask, strict=True)]


def write_samples(path: Path, samples: list[Any]) -> None:
    lines = [s if isinstance(s, str) else json.dumps({'tokens': s}) for s in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def test_bins(tmp_path: Path, tokenizer) -> None:
    good = encoded(tokenizer, Q, A, Q, A)
    stop = tokenizer.token_id('<eoa>')
    without = [token for token in good if token != stop]
    unlearned = [-stop if token == stop else token for token in good]
    other = tokenizer.token_id('<TOKENS_UNUSED_3>')  # as ids of InternLM's own tool are
    mistaken = [other if token == stop else token for token in good]
    original = [abs(good[0]), *good[1:]]  # InternLM's own tool leaves bos positive
    samples = [
        good,
        '{"tokens": [',
        [1, 2.5],
        [-abs(token) for token in good],
        without,
        original,
        unlearned,
        [1, 9999, 2],
        good * 20,
        [1, 5, 6, 7],  # a text, of which all is learned
        mistaken,
    ]
    write_samples(tmp_path / 'en' / 'a.bin', samples)
    config = dict(
        type='InternLMBinDataset',
        data_root=str(tmp_path),
        seq_len=256,
        vocab_size=tokenizer.vocab_size,
        chat_template='internlm',
        packing='best_fit',
    )
    report = inspect(config, tokenizer)
    wanted = [
        'a.bin:2: not JSON',
        "a.bin:3: 'tokens' has something that is no whole number",
        "a.bin:4: 'tokens' has nothing to learn: no id is positive",
        "a.bin:5: 'tokens', answer 0: it ends without a stop token of 'internlm'",
        "a.bin:5: 'tokens', answer 1: it ends without",
        "a.bin:7: 'tokens', answer 0: it ends without",
        "a.bin:7: 'tokens', answer 1: it ends without",
        "a.bin:7: 'tokens', answer 2: it ends without",  # what follows the stop is learned still
        "a.bin:8: 'tokens' has 9999, outside the vocabulary",
        f"a.bin:9: 'tokens' has {20 * len(good):,}, more than the 256 of a row",
        "a.bin:11: 'tokens', answer 0: it ends without",
        "a.bin:11: 'tokens', answer 1: it ends without",
    ]
    lines = [int(problem.partition('a.bin:')[2].partition(':')[0]) for problem in report.problems]
    found = [problem for _, problem in sorted(zip(lines, report.problems, strict=True))]
    assert len(found) == len(wanted), found
    for problem, message in zip(found, wanted, strict=True):
        assert message in problem, found
    assert report.cut == 1 and report.kind == 'samples'
    cut = inspect({**config, 'packing': 'documents'}, tokenizer)
    assert not any('of a row' in problem for problem in cut.problems) and cut.cut == 1
    (note,) = inspect(config, None).notes
    assert note.startswith('stop tokens are not looked for')


def test_bins_and_metas(tmp_path: Path, tokenizer) -> None:
    sample = BinSample(np.array([1, 5, 2]), np.array([1, 1, 1]))
    write_bin(tmp_path / 'a.bin', [sample] * 3)
    config = dict(type='InternLMBinDataset', data_root=str(tmp_path), seq_len=8, vocab_size=300)
    report = inspect(config, tokenizer, 2)
    assert report.problems == [] and report.is_part and report.learned == 4
    with open(tmp_path / 'a.bin', 'a') as file:
        file.write('{"tokens": [1]}\n')
    (problem,) = inspect(config, tokenizer).problems
    assert 'a.bin:4: 1 tokens at byte' in problem and 'no such line' in problem
    short = inspect({**config, 'min_length': 4}, tokenizer, 1)
    assert short.conversations == 0 and short.lines()[-1] == (
        'no sample can be trained on, 0 problems'
    )


def test_token_files(tmp_path: Path, tokenizer) -> None:
    end = tokenizer.eos_id
    options = dict(vocab_size=tokenizer.vocab_size)
    mark = dict(type='x', hash=tokenizer.hash)
    with TokenFileWriter(tmp_path / 'd/a', tokenizer=mark, **options) as writer:
        for document in ([1, 5, end], [1, 6, 7], [1, 5, 5, 5, 5, end]):
            writer.add(document)
    with TokenFileWriter(tmp_path / 'd/b', tokenizer=dict(mark, hash='0'), **options) as writer:
        for _ in range(25):
            writer.add([5, 6])
    config = dict(type='PretrainDataset', data_root=str(tmp_path / 'd'), seq_len=4)
    report = inspect(config, tokenizer)
    assert report.problems[0] == f'{tmp_path}/d/a: document 1 does not end with the end token'
    assert report.problems[1] == (
        f'{tmp_path}/d/b: made with another tokenizer than that of the run'
    )
    assert len(report.problems) == 2 + 20 + 1
    assert report.problems[-1].endswith('/d/b: 5 more documents without the end token')
    assert (report.conversations, report.cut, report.learned) == (28, 1, 2 + 2 + 5 + 25)
    only = inspect({**config, 'domains': ['a'], 'min_document_length': 4}, tokenizer)
    assert only.problems == [] and only.lengths == [6]
    part = inspect({**config, 'domains': ['a']}, tokenizer, 1)
    assert part.is_part and part.lengths == [3]
    assert inspect(config, None).problems == []
    meta = tmp_path / 'd/a/meta.json'
    meta.write_text(meta.read_text().replace(f': {tokenizer.vocab_size}', ': 6'))
    problems = inspect({**config, 'domains': ['a']}, None).problems
    assert len(problems) == 1 and 'outside the vocabulary of 6' in problems[0]


def test_token_files_with_masks(tmp_path: Path, tokenizer) -> None:
    with TokenFileWriter(
        tmp_path / 'a', vocab_size=tokenizer.vocab_size, has_loss_mask=True
    ) as writer:
        writer.add([1, 5, 6], np.array([0, 0, 1]))
        writer.add([1, 5], np.array([1, 1]))
    config = dict(type='PretrainDataset', data_root=str(tmp_path / 'a'), seq_len=4)
    assert inspect(config, tokenizer).learned == 2
