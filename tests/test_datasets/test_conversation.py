import json
import logging
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from internlm_mm.datasets import ConversationDataset, EvalLoader, TokenLoader, collate_rows
from internlm_mm.models import InternLM
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.tokenizers import build_template
from tests.conversations import (
    CALLING,
    PLAIN,
    TOOLS,
    byte_level,
    conversations,
    internlm_model,
)

Q, A = {'role': 'user', 'content': 'def f1(x)'}, {'role': 'assistant', 'content': 'return x'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer'))


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(map(json.dumps, records)))
    return path


def make(path, tokenizer, cache: Path, **options) -> ConversationDataset:
    options = {'seq_len': 256, 'chat_template': 'internlm2'} | options
    return ConversationDataset(path, tokenizer=tokenizer, cache_dir=cache / 'cache', **options)


def epoch(dataset: ConversationDataset) -> tuple[list[tuple], list[list[int]]]:
    """Documents of an epoch with their labels, without padding, sorted; and whole rows."""
    documents = []
    rows = [dataset[index] for index in range(len(dataset))]
    for row in rows:
        cuts = np.cumsum(row.lengths)[:-1]
        parts = zip(np.split(row.input_ids, cuts), np.split(row.labels, cuts), strict=True)
        documents += [(ids.tolist(), labels.tolist()) for ids, labels in parts if ids.any()]
    return sorted(documents), [row.input_ids.tolist() for row in rows]


def expected(tokenizer, template, conversations, tools=None) -> list[tuple]:
    """By the definition: the label of a token is the next one, where the loss is on that."""
    found = []
    for messages in conversations:
        ids, mask = template.encode(tokenizer, messages, tools, add_ending=True)
        labels = [i if m else IGNORE_INDEX for i, m in zip(ids[1:], mask[1:], strict=True)]
        found.append((ids, [*labels, IGNORE_INDEX]))
    return sorted(found)


@given(some.lists(conversations(build_template('internlm2')), min_size=1, max_size=6))
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_are_the_conversations(tmp_path_factory, tokenizer, records) -> None:
    folder = tmp_path_factory.mktemp('data')
    for messages in records:
        for message in messages:
            if message['role'] == 'assistant' and not message.get('tool_calls'):
                message['content'] += 'x'  # an empty answer is refused
    path = write(folder / 'c.jsonl', *({'messages': m, 'tools': TOOLS} for m in records))
    wanted = expected(tokenizer, build_template('internlm2'), records, TOOLS)
    seq_len = max(len(ids) for ids, _ in wanted) + 7
    for packing in ('best_fit', None):
        dataset = make(path, tokenizer, folder, seq_len=seq_len, packing=packing)
        assert epoch(dataset)[0] == wanted
        counts = dataset.counts['c']
        assert counts.conversations == counts.documents == len(records)
        assert counts.trained == sum(i != IGNORE_INDEX for _, labels in wanted for i in labels)
    cut = make(path, tokenizer, folder, seq_len=seq_len, packing='documents')
    rows = [cut[index] for index in range(len(cut))]
    assert sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows) == counts.trained
    assert len(rows) == -(-counts.tokens // seq_len)


def test_domains_are_files_and_folders(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / 'data/alpaca.json', {'instruction': 'a', 'output': 'b'})
    write(tmp_path / 'data/tools/1.jsonl', {'messages': CALLING, 'tools': TOOLS})
    write(tmp_path / 'data/tools/2.jsonl', {'messages': PLAIN})
    dataset = make(tmp_path / 'data', tokenizer, tmp_path, seq_len=512)
    assert dataset.domains == ['alpaca', 'tools']
    assert dataset.counts['tools'].formats == {'messages': 2}
    assert dataset.counts['alpaca'].formats == {'alpaca': 1}
    paths = [f'mine={tmp_path}/data/tools', tmp_path / 'data/alpaca.json']
    assert make(paths, tokenizer, tmp_path, seq_len=512).domains == ['alpaca', 'mine']
    only = make(tmp_path / 'data', tokenizer, tmp_path, seq_len=512, weights={'alpaca': 2})
    assert only.domains == ['alpaca']


def test_a_readme_beside_the_data_is_no_data_and_a_table_is_an_error(
    tmp_path: Path, tokenizer
) -> None:
    write(tmp_path / 'data/a.jsonl', {'messages': PLAIN})
    (tmp_path / 'data/README.txt').write_text('Conversations of mine.')
    assert make(tmp_path / 'data', tokenizer, tmp_path, seq_len=512).domains == ['a']
    (tmp_path / 'data/b.csv').write_text('prompt,answer')
    with pytest.raises(ValueError, match=r"b\.csv: cannot read '\.csv', only \.json, "):
        make(tmp_path / 'data', tokenizer, tmp_path, seq_len=512)


def test_it_is_made_once(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / 'c.jsonl', *[{'messages': PLAIN}] * 5)
    first = make(path, tokenizer, tmp_path)
    encoded = []
    monkeypatch.setattr(
        'internlm_mm.datasets.conversation.ConversationEncoder.__call__',
        lambda self, example: encoded.append(example) or pytest.fail('encoded again'),
    )
    again = make(path, tokenizer, tmp_path, packing=None, shuffle=False, seed=4)
    assert again.counts == first.counts and not encoded
    assert pickle.loads(pickle.dumps(again))[3].input_ids.tolist() == again[3].input_ids.tolist()
    for change in ({'chat_template': 'internlm'}, {'seq_len': 300}, {'add_ending': False}):
        with pytest.raises(pytest.fail.Exception):
            make(path, tokenizer, tmp_path, **change)
    write(path, {'messages': [Q, A]})
    with pytest.raises(pytest.fail.Exception):
        make(path, tokenizer, tmp_path)


def test_order_is_of_seed_and_index(tmp_path: Path, tokenizer) -> None:
    records = [{'prompt': 'q', 'answer': f'def f{i}'} for i in range(40)]
    path = write(tmp_path / 'c.jsonl', *records)
    options = dict(seq_len=64)
    one, same, other = (make(path, tokenizer, tmp_path, seed=s, **options) for s in (1, 1, 2))
    rows = epoch(one)[1]
    assert rows == epoch(same)[1] != epoch(other)[1]
    assert [one[len(one) + i].input_ids.tolist() for i in range(len(one))] != rows
    assert epoch(one)[0] == epoch(other)[0]


def test_loaders_take_it_as_it_is(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / 'c.jsonl', *[{'messages': PLAIN}] * 4, *[{'messages': [Q, A]}] * 9)
    dataset = make(path, tokenizer, tmp_path, seq_len=80)
    steps = iter(TokenLoader(dataset, global_batch_size=4, micro_batch_size=2))
    batches = [*next(steps), *next(steps)]
    assert all(batch.input_ids.shape == (2, 80) for batch in batches)
    still = make(path, tokenizer, tmp_path, seq_len=80, shuffle=False)
    passed = sum(batch.num_targets for batch in EvalLoader(still, micro_batch_size=3))
    assert passed == dataset.counts['c'].trained


def make_and_count(path: Path, tokenizer, folder: Path, results) -> None:
    results.put(make(path, tokenizer, folder).num_tokens)


def test_ranks_share_one_copy(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / 'c.jsonl', *[{'messages': PLAIN}] * 50)
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    arguments = (path, tokenizer, tmp_path, results)
    ranks = [context.Process(target=make_and_count, args=arguments) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0] and results.get() == results.get()
    assert len([f for f in (tmp_path / 'cache').iterdir() if f.is_dir()]) == 1


BAD = [
    ({'messages': [Q, Q]}, "c.jsonl:2, message 1: role 'user' after 'user'"),
    ({'messages': [Q, {**A, 'content': ''}]}, 'c.jsonl:2, message 1: content is empty'),
    ({'messages': [Q]}, 'c.jsonl:2, messages: there is nothing to learn'),
    ({'messages': 5}, 'c.jsonl:2, messages: a list, not int'),
    ({'messages': [Q, {**A, 'content': 'x' * 500}]}, 'c.jsonl:2, message 0: the turn that begins'),
    ([], 'c.jsonl:2: an object is expected, not list'),
]


@pytest.mark.parametrize(('record', 'message'), BAD)
def test_malformed_records(tmp_path: Path, tokenizer, record, message, caplog) -> None:
    path = write(tmp_path / 'c.jsonl', {'messages': [Q, A]}, record, {'messages': PLAIN})
    with pytest.raises(ValueError) as raised:
        make(path, tokenizer, tmp_path)
    assert message in str(raised.value)
    for _ in range(2):  # also when it is there already
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = make(path, tokenizer, tmp_path, on_error='skip')
        counts = dataset.counts['c']
        assert (counts.conversations, counts.skipped) == (2, 1)
        assert message in counts.messages[0]


def test_nothing_left(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / 'c.jsonl', {'messages': [Q]})
    with pytest.raises(ValueError, match=r'c\.jsonl: no conversation to learn from, 1 malformed: '):
        make(path, tokenizer, tmp_path, on_error='skip')


def test_options_that_there_are_not(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / 'c.jsonl', {'messages': PLAIN})
    for options, message in [
        (dict(packing='fit'), r"packing='fit' is none"),
        (dict(on_error='skp'), r"on_error='skp' is none of raise, skip\. Did you mean 'skip'\?"),
        (dict(format='openai'), r"format='openai' is none of auto, messages"),
        (dict(overlong='cut'), r"overlong='cut' is none"),
        (dict(chat_template='internlm9'), r"no chat template 'internlm9'"),
        (dict(weights={'c': 1}, shuffle=False), r'weights mix domains'),
        (dict(weights={'b': 1}), r"unknown domain 'b'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(path, tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match='conversations need a tokenizer'):
        make(path, None, tmp_path)
    with pytest.raises(FileNotFoundError, match='no file or folder'):
        make(tmp_path / 'none', tokenizer, tmp_path)


def test_tokenizer_by_path_and_config(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / 'c.jsonl', {'messages': PLAIN})
    by_object = make(path, tokenizer, tmp_path)
    folder = str(tokenizer.path)
    config = dict(type='SentencePieceTokenizer', path=folder)
    for given_as in (folder, config):
        dataset = make(path, given_as, tmp_path)
        assert (
            dataset.tokenizer
            == by_object.tokenizer
            == {
                'type': 'SentencePieceTokenizer',
                'hash': tokenizer.hash,
            }
        )


@pytest.mark.parametrize('route', ['SentencePiece', 'Hugging Face'])
def test_packing_and_accumulation_do_not_change_the_gradient(
    tmp_path: Path, tokenizer, route: str
) -> None:
    template = 'internlm2'
    if route == 'Hugging Face':
        tokenizer, template = byte_level(tmp_path / 'bytes'), 'chatml'
    pairs = [({**Q, 'content': f'def f{i}'}, {**A, 'content': 'return x' * i}) for i in range(1, 6)]
    lines = [{'messages': PLAIN}, *({'messages': pair} for pair in pairs)]
    path = write(tmp_path / 'c.jsonl', *lines)
    torch.manual_seed(0)
    model = InternLM(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        max_seq_len=256,
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    gradients = []
    for packing, seq_len, rows_a_time in (
        (None, 128, 1),
        ('best_fit', 128, 1),
        ('best_fit', 256, 2),
        (None, 200, 4),
        ('best_fit', 200, 3),
    ):
        dataset = make(
            path, tokenizer, tmp_path, seq_len=seq_len, packing=packing, chat_template=template
        )
        rows = [dataset[index] for index in range(len(dataset))]
        batches = [
            collate_rows(rows[i : i + rows_a_time]) for i in range(0, len(rows), rows_a_time)
        ]
        divisor = sum(batch.num_targets for batch in batches)
        model.zero_grad()
        for batch in batches:
            (model(batch)['loss'] / divisor).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(rows) < len(lines)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            # float64, but for the loss, which is summed in float32
            torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-9)
