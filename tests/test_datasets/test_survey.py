import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from internlm_mm.datasets import ConversationDataset, PretrainDataset, RandomTokens, Row
from internlm_mm.datasets.packed import PackedRows
from internlm_mm.datasets.survey import facts, packings, records, rows_an_epoch, sheets, survey
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import TokenFileWriter
from tests.conversations import PLAIN, internlm_model


def packed(folder: Path, lengths: list[int], packing: str | None, seq_len: int) -> PackedRows:
    with TokenFileWriter(folder / 'a', vocab_size=9, has_loss_mask=True, overwrite=True) as writer:
        for length in lengths:
            mask = np.zeros(length)
            mask[length // 2 :] = 1
            writer.add(np.full(length, 5), mask)
    return PackedRows({'a': TokenFile(folder / 'a')}, seq_len=seq_len, packing=packing)


@given(
    some.lists(some.integers(2, 12), min_size=1, max_size=30),
    some.sampled_from(['best_fit', 'documents', None]),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_padding_and_losses_are_counted(tmp_path_factory, lengths: list[int], packing) -> None:
    dataset = packed(tmp_path_factory.mktemp('s'), lengths, packing, 12)
    found = survey(dataset)
    places = len(dataset) * 12
    assert found.looked_at == found.num_rows == len(dataset)
    one = found.domains['a']
    assert one.padding == places - sum(lengths)
    assert found.padding == pytest.approx(dataset.waste)
    assert one.tokens == sum(lengths)
    learned = sum(length - max(length // 2, 1) for length in lengths)
    assert one.learned == learned and found.learned == pytest.approx(learned / places)
    assert sorted(found.lengths.tolist()) == sorted(lengths)
    ends = np.cumsum(lengths)
    cut = sum(
        start // 12 != (end - 1) // 12 for start, end in zip(ends - lengths, ends, strict=True)
    )
    assert one.cut == (cut if packing == 'documents' else 0)
    counts = [int(row[1]) for row in found.histogram().rows]
    assert sum(counts) == len(lengths)


def test_what_other_packings_would_waste(tmp_path: Path) -> None:
    lengths = [7, 7, 3, 3, 2]
    for packing in ('best_fit', 'documents', None):
        said = packings(packed(tmp_path, lengths, packing, 10))
        for other in ('best_fit', 'documents', None):
            real = packed(tmp_path, lengths, other, 10)
            line = (
                f'packing={other!r} would make {len(real)} rows, {real.waste:.1%} of them padding'
            )
            assert (line in said) == (other != packing)
    said = packings(packed(tmp_path, [12, 3], 'documents', 10))
    assert said[0] == "packing='best_fit' cannot be: documents are longer than a row"
    assert packings(RandomTokens(vocab_size=8, seq_len=4)) == []


def test_large_sets_are_looked_at_here_and_there(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [5] * 3 + [10] * 97, None, 10)
    dataset = PackedRows({'a': TokenFile(tmp_path / 'a')}, seq_len=10, packing=None, shuffle=False)
    found = survey(dataset, most=10)
    assert (found.num_rows, found.looked_at) == (100, 10)
    assert found.domains['a'].rows == 10
    assert found.domains['a'].padding == 5  # rows 0, 10, 20, ...
    assert '(10 rows looked at)' in found.rows().title
    assert len(found.lengths) == 100  # of all documents: they are known


def test_pretraining_rows(tmp_path: Path) -> None:
    for name, lengths in (('a', [6, 6]), ('b', [3])):
        with TokenFileWriter(tmp_path / name, vocab_size=9) as writer:
            for length in lengths:
                writer.add(np.full(length, 5))
    dataset = PretrainDataset(tmp_path, seq_len=8, shuffle=False)
    found = survey(dataset)
    assert found.domains['a'].cut == 1 and found.domains['a'].padding == 4
    assert found.domains['b'].padding == 5
    assert [row[0] for row in found.rows().rows] == ['a', 'b']
    assert records(dataset) is None and len(sheets(dataset)) == 2
    assert facts(dataset, None) == {'data': 'PretrainDataset', 'domains': 'a, b', 'seq_len': '8'}


def test_rows_without_domains() -> None:
    dataset = RandomTokens(vocab_size=8, seq_len=16, num_rows=3, document_lengths=[4])
    found = survey(dataset)
    assert found.domains[''].documents == 12 and found.rows().rows[0][0] == '-'


def test_rows_without_end(tmp_path: Path) -> None:
    class Endless:
        """What the registry asks of a dataset, and no more."""

        seq_len, domains = 4, ()

        def __getitem__(self, index: int) -> Row:
            return RandomTokens(vocab_size=8, seq_len=4)[index]

    found = survey(Endless(), most=6)
    assert (found.looked_at, found.domains[''].rows) == (6, 6)
    assert rows_an_epoch(Endless()) is None and facts(Endless(), None)['data'] == 'Endless'


def test_documents_longer_than_a_row_are_told_apart(tmp_path: Path) -> None:
    rows = survey(packed(tmp_path, [3, 9, 10, 11, 40], 'documents', 10)).histogram().rows
    assert [row[:2] for row in rows] == [
        ('1 to 8', '1'),
        ('9 to 10', '2'),
        ('11 to 16 > a row', '1'),
        ('17 to 32 > a row', '0'),
        ('33 to 40 > a row', '1'),
    ]


def test_conversations(tmp_path: Path) -> None:
    tokenizer = internlm_model(tmp_path / 'tokenizer')
    lines = [json.dumps({'messages': PLAIN})] * 2
    (tmp_path / 'c.jsonl').write_text('\n'.join([*lines, '{"messages": 3}']))
    dataset = ConversationDataset(
        tmp_path / 'c.jsonl',
        seq_len=60,
        chat_template='internlm2',
        tokenizer=tokenizer,
        overlong='truncate',
        on_error='skip',
        cache_dir=tmp_path / 'cache',
    )
    sheet = records(dataset)
    assert sheet is not None
    row = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    whole = len(dataset.template.encode(tokenizer, PLAIN, add_ending=True).ids)
    assert row == {
        'domain': 'c',
        'used': '2',
        'malformed': '1',
        'over a row': '2',
        'documents': '2',
        'tokens': '120',
        'learned': row['learned'],
        'cut off': f'{2 * (whole - 60)}',
    }
    told = facts(dataset, tokenizer)
    assert told['chat_template'] == 'internlm2' and told['packing'] == "'best_fit'"
    assert told['tokenizer'] == f'SentencePieceTokenizer, {tokenizer.vocab_size} ids'
