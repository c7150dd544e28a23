"""Rows of pairs: what is spelt, what shares a row, what is refused, and by which message."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.datasets import PreferenceDataset
from internlm_mm.datasets.loader import EvalLoader, TokenLoader
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.tokenizers import build_template
from tests.conversations import CALLING, PLAIN, TOOLS, internlm_model

ROW = 400


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer') / 'tokenizer')


def pair(number: int, long: int = 1) -> dict:
    return {
        'prompt': f'Is {number} prime?',
        'chosen': 'It is. ' * long,
        'rejected': f'No. {number}',
    }


def write(folder: Path, *records: dict, name: str = 'pairs') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, records)))
    return folder


def dataset(folder: Path, tokenizer, **options) -> PreferenceDataset:
    defaults = dict(seq_len=ROW, chat_template='internlm2', cache_dir=folder.parent / 'cache')
    return PreferenceDataset(folder, tokenizer=tokenizer, **(defaults | options))


def documents_of(row):
    """Tokens and labels of each document of a row, padding left out."""
    ends = np.cumsum(row.lengths)
    cuts = zip(ends - row.lengths, ends, strict=True)
    found = [(row.input_ids[a:b].tolist(), row.labels[a:b].tolist()) for a, b in cuts]
    return found[: 2 * row.num_pairs]


def test_a_pair_is_two_conversations_with_labels_on_the_answers_alone(tokenizer, tmp_path) -> None:
    prompt, last = CALLING[:-1], CALLING[-1]
    other = {'role': 'assistant', 'content': 'I do not know'}
    record = {'messages': prompt, 'tools': TOOLS, 'chosen': [last], 'rejected': [other]}
    found = dataset(write(tmp_path / 'data', record), tokenizer, seq_len=1000)
    (chosen, rejected) = documents_of(found[0])
    template = build_template('internlm2')
    for (ids, labels), answer in ((chosen, last), (rejected, other)):
        whole = template.encode(tokenizer, [*prompt, answer], TOOLS, add_ending=True)
        assert ids == whole.ids
        before = [{**m, 'loss': False} if m['role'] == 'assistant' else m for m in prompt]
        mask = template.encode(tokenizer, [*before, answer], TOOLS, add_ending=True).loss_mask
        assert sum(mask) < sum(whole.loss_mask)  # the prompt has calls, which are not compared
        wanted = [*np.where(mask, ids, IGNORE_INDEX)[1:].tolist(), IGNORE_INDEX]
        assert labels == wanted
        stop = tokenizer.encode('')  # nothing
        assert stop == [] and template.stops(tokenizer)[0][0] in labels


def test_pairs_share_rows_and_are_never_parted(tokenizer, tmp_path) -> None:
    records = [pair(number, long=1 + number % 7) for number in range(40)]
    folder = write(tmp_path / 'data', *records)
    packed = dataset(folder, tokenizer, seq_len=200, shuffle=False)
    alone = dataset(folder, tokenizer, seq_len=200, shuffle=False, packing=None)
    assert len(alone) == 40 and len(packed) < 25
    assert packed.num_pairs == alone.num_pairs == [40]
    found = sorted(
        (tuple(map(str, documents[2 * index : 2 * index + 2])))
        for row in map(packed.__getitem__, range(len(packed)))
        for documents in [documents_of(row)]
        for index in range(row.num_pairs)
    )
    wanted = [tuple(map(str, documents_of(alone[index]))) for index in range(40)]
    assert found == sorted(wanted)
    assert packed.max_docs >= max(2 * packed[index].num_pairs for index in range(len(packed)))


def test_batches_count_pairs_on_every_rank(tokenizer, tmp_path) -> None:
    folder = write(tmp_path / 'data', *(pair(number) for number in range(23)))
    rows = dataset(folder, tokenizer, seq_len=150, shuffle=False)
    for world in (1, 2, 3):
        loaders = [
            EvalLoader(rows, micro_batch_size=2, data_rank=rank, data_world_size=world)
            for rank in range(world)
        ]
        batches = [list(loader) for loader in loaders]
        assert len({len(one) for one in batches}) == 1
        assert sum(batch.num_targets for one in batches for batch in one) == 23
        assert all(batch.is_paired and batch.references is None for one in batches for batch in one)
    step = next(iter(TokenLoader(rows, global_batch_size=4, micro_batch_size=2)))
    assert sum(batch.num_targets for batch in step) == sum(rows[i].num_pairs for i in range(4))


def test_references_go_where_their_pairs_go(tokenizer, tmp_path) -> None:
    write(tmp_path / 'data', *(pair(number) for number in range(30)), name='a')
    folder = write(tmp_path / 'data', *(pair(number) for number in range(30, 37)), name='b')
    rows = dataset(folder, tokenizer, seq_len=150)
    assert not rows.has_references and rows.num_pairs == [30, 7]
    arrays = [
        np.stack([np.arange(pairs), -1.0 * np.arange(pairs)], 1) + 100 * domain
        for domain, pairs in enumerate((30, 7))
    ]
    rows.set_references(arrays)
    seen = set()
    for index in range(len(rows)):
        domain, place = rows.locate(index)
        row, pairs = rows[index], rows.pairs_of(domain, place)
        assert row.references.shape == (rows.max_docs,) and row.references.dtype == np.float32
        assert row.references[: 2 * len(pairs)].tolist() == arrays[domain][pairs].ravel().tolist()
        assert not row.references[2 * len(pairs) :].any()
        for number, (ids, _) in zip(pairs, documents_of(row)[::2], strict=True):
            assert f'Is {number + 30 * domain} prime' in tokenizer.decode(ids)
            seen.add((domain, int(number)))
    assert len(seen) == 37


def test_pairs_that_are_longer_than_a_row(tokenizer, tmp_path) -> None:
    folder = write(tmp_path / 'data', pair(1), pair(2, long=60), pair(3))
    message = r"pairs.jsonl:2: chosen and rejected have \d+ tokens.*'skip'"
    with pytest.raises(ValueError, match=message):
        dataset(folder, tokenizer, seq_len=150)
    skipping = dataset(folder, tokenizer, seq_len=150, overlong='skip')
    assert skipping.counts['pairs'].overlong == 1 and skipping.num_pairs == [2]
    message = r"no pair to learn from, 3 longer than the 20 tokens .* left out by overlong='skip'$"
    with pytest.raises(ValueError, match=message):
        dataset(folder, tokenizer, seq_len=20, overlong='skip')
    cutting = dataset(folder, tokenizer, seq_len=150, overlong='truncate', packing=None)
    counts = cutting.counts['pairs']
    assert counts.cut == 1 and counts.pairs == 3
    rows = [cutting[index] for index in range(3)]
    (cut,) = [row for row in rows if len(row.lengths) == 2]  # it fills its row
    whole = dataset(folder, tokenizer, seq_len=1000, packing=None, shuffle=False)
    (chosen, rejected), (short, other) = documents_of(whole[1]), documents_of(cut)
    assert other == rejected and len(short[0]) == 150 - len(rejected[0])  # the shorter is spared
    assert short[0] == chosen[0][: len(short[0])]
    folder = write(tmp_path / 'other', pair(10**80))
    with pytest.raises(ValueError, match=r'pairs.jsonl:1: .*nothing to compare is left'):
        dataset(folder, tokenizer, seq_len=40, overlong='truncate')


def test_the_same_files_are_the_same_data_wherever_they_are(
    tokenizer, tmp_path, monkeypatch
) -> None:
    folder = write(tmp_path / 'data', pair(1), pair(2))
    first = dataset(folder, tokenizer).folder
    monkeypatch.chdir(tmp_path)
    assert dataset(Path('data'), tokenizer, cache_dir=tmp_path / 'cache').folder == first
    shutil.move(folder, tmp_path / 'moved')
    assert dataset(tmp_path / 'moved', tokenizer).folder == first
    write(tmp_path / 'moved', pair(2), pair(1))
    assert dataset(tmp_path / 'moved', tokenizer).folder != first


BROKEN = [
    (dict(prompt='A', chosen='b'), "pairs.jsonl:2, field 'rejected' is missing"),
    (dict(prompt='A', chosen='b', rejected='b'), 'pairs.jsonl:2, chosen and rejected are the same'),
    (dict(prompt='A', chosen='b', rejected=' '), 'pairs.jsonl:2, rejected, message 1: content is'),
    (dict(prompt=PLAIN[1:], chosen='x', rejected='y'), 'pairs.jsonl:2, chosen, message 4: role'),
]


@pytest.mark.parametrize(('record', 'message'), BROKEN)
def test_malformed_records_are_told_or_counted(record, message, tokenizer, tmp_path) -> None:
    folder = write(tmp_path / 'data', pair(1), record, pair(2))
    with pytest.raises(ValueError, match=message):
        dataset(folder, tokenizer)
    left = dataset(folder, tokenizer, on_error='skip')
    counts = left.counts['pairs']
    assert (counts.pairs, counts.skipped, len(counts.messages)) == (2, 1, 1)
    assert message in counts.messages[0]
    assert counts.formats == {'prompt': 2}
    with pytest.raises(ValueError, match='no pair to learn from, 1 malformed: '):
        dataset(write(tmp_path / 'bad', record), tokenizer, on_error='skip', format='prompt')


def test_answers_that_are_spelt_alike(tokenizer, tmp_path) -> None:
    parts = [{'type': 'text', 'text': 'b'}]
    record = dict(prompt='A', chosen={'role': 'assistant', 'content': parts}, rejected='b')
    folder = write(tmp_path / 'data', record)
    with pytest.raises(ValueError, match=r'pairs.jsonl:1: chosen and rejected are spelt alike'):
        dataset(folder, tokenizer, chat_template='internlm')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(packing='documents'), "packing='documents': pairs are packed by 'best_fit'"),
        (dict(overlong='split'), r"overlong='split' is none of error, truncate, skip"),
        (dict(on_error='skp'), r"on_error='skp' is none of raise, skip.*'skip'"),
        (dict(format='hhh'), "format='hhh'.*'hh'"),
        (dict(tokenizer=None), 'need a tokenizer'),
    ],
)
def test_options_that_there_are_not(options, message, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, options.pop('tokenizer', tokenizer), **options)
