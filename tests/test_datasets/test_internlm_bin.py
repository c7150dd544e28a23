import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from internlm_mm.datasets import InternLMBinDataset, TokenFileWriter
from internlm_mm.datasets.internlm_bin import (
    BinSample,
    find_bins,
    read_bin,
    read_meta,
    samples_of,
    write_bin,
)
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.structures import IGNORE_INDEX

SAMPLES = [[1, -5, -6, 7, 2], [1, 8, 9, 2], [-1, -3, 4], [1, -70000, 70001, 2]]


def write_as_internlm(
    path: Path, samples: list[list[int]], dtype=np.int64, middle: int = 0
) -> Path:
    """As tools/alpaca_tokenizer.py of InternLM does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table, seek = [], 0
    with open(path, 'wb') as file:
        for tokens in samples:
            line = (json.dumps(dict(tokens=tokens)) + '\n').encode()
            file.write(line)
            table.append((seek, *[0] * middle, len(tokens)))
            seek += len(line)
    with open(f'{path}.meta', 'wb') as file:
        np.save(file, np.array(table, dtype))
    return path


def as_lists(samples) -> list[list[int]]:
    return [np.where(mask == 1, ids, -ids).tolist() for ids, mask in samples]


@pytest.mark.parametrize(('dtype', 'middle'), [(np.int64, 0), (np.int32, 1)])
def test_reads_what_internlm_writes(tmp_path: Path, dtype, middle) -> None:
    path = write_as_internlm(tmp_path / 'a.bin', SAMPLES, dtype, middle)
    assert as_lists(read_bin(path)) == SAMPLES
    assert read_meta(path).shape == (4, 2)


def test_writes_the_bytes_that_internlm_writes(tmp_path: Path) -> None:
    theirs = write_as_internlm(tmp_path / 'theirs.bin', SAMPLES)
    samples = [BinSample(np.abs(s), np.array(s) > 0) for s in map(np.array, SAMPLES)]
    assert write_bin(tmp_path / 'ours.bin', samples) == 4
    for end in ('', '.meta'):
        ours = Path(f'{tmp_path}/ours.bin{end}').read_bytes()
        assert ours == Path(f'{theirs}{end}').read_bytes()
    with pytest.raises(FileExistsError):
        write_bin(tmp_path / 'ours.bin', samples)
    assert write_bin(tmp_path / 'ours.bin', samples[:1], overwrite=True) == 1
    assert len(list(tmp_path.iterdir())) == 4  # nothing is left behind


def test_rows_have_the_loss_where_ids_are_positive(tmp_path: Path) -> None:
    write_as_internlm(tmp_path / 'data/en/x/a.bin', SAMPLES[:2])
    write_as_internlm(tmp_path / 'data/code.bin', SAMPLES[2:])
    dataset = InternLMBinDataset(
        tmp_path / 'data',
        seq_len=12,
        vocab_size=103_168,
        shuffle=False,
        cache_dir=tmp_path / 'cache',
    )
    assert dataset.domains == ['code', 'en'] and len(dataset) == 2
    row = dataset[1]
    assert row.input_ids.tolist() == [1, 5, 6, 7, 2, 1, 8, 9, 2, 0, 0, 0]
    no = IGNORE_INDEX
    assert row.labels.tolist() == [no, no, 7, 2, no, 8, 9, 2, no, no, no, no]
    assert row.lengths.tolist() == [5, 4, 3]


@given(
    some.lists(
        some.lists(some.integers(1, 90).flatmap(lambda i: some.sampled_from([i, -i])), min_size=1),
        min_size=1,
    ),
    some.sampled_from(['documents', 'best_fit', None]),
)
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_token_is_lost(tmp_path_factory, samples: list[list[int]], packing) -> None:
    folder = tmp_path_factory.mktemp('bin')
    path = write_as_internlm(folder / 'a.bin', samples)
    longest = max(map(len, samples))
    dataset = InternLMBinDataset(
        path, seq_len=max(longest, 4), vocab_size=91, packing=packing, cache_dir=folder / 'cache'
    )
    rows = [dataset[i] for i in range(len(dataset))]
    ids = sorted(int(i) for row in rows for i in row.input_ids if i)
    assert ids == sorted(abs(token) for sample in samples for token in sample)
    learned = sorted(int(i) for row in rows for i in row.labels if i != IGNORE_INDEX)
    assert learned == sorted(t for sample in samples for t in sample[1:] if t > 0)


def test_min_length_and_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = 'internlm_mm.datasets.internlm_bin.print_log'
    monkeypatch.setattr(log, lambda text, **options: said.append(text))
    path = write_as_internlm(tmp_path / 'a.bin', SAMPLES)
    options = dict(seq_len=8, cache_dir=tmp_path / 'cache')
    dataset = InternLMBinDataset(path, vocab_size=70_002, min_length=4, **options)
    assert dataset.num_tokens == 13 and dataset.num_dropped == 1
    assert said == ['a: 1 samples of fewer than min_length=4 tokens are left out']
    assert dataset.template is None
    named = InternLMBinDataset(path, vocab_size=70_002, chat_template='internlm', **options)
    assert named.template is not None and named.template.name == 'internlm'
    with pytest.raises(ValueError, match="no chat template 'internml'"):
        InternLMBinDataset(path, vocab_size=70_002, chat_template='internml', **options)
    with pytest.raises(ValueError, match=r'a\.bin:4: token id 70001 is outside the vocabulary'):
        InternLMBinDataset(path, vocab_size=100, **options)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"tokens": [1,', r'a\.bin:2: not JSON'),
        ('[1, 2]', r"a\.bin:2: 'tokens' is missing"),
        ('{"tokens": []}', r"a\.bin:2: 'tokens' is missing, empty"),
        ('{"tokens": [1, 2.5]}', r"a\.bin:2: 'tokens' has something"),
        ('{"tokens": [1, true]}', r"a\.bin:2: 'tokens' has something"),
        ('{"tokens": [1, -99999999999999999999]}', r'a\.bin:2: .* is no id'),
        ('{"tokens": [1, 2, 3]}', r'a\.bin:2: 3 tokens at byte 30, but a\.bin\.meta says 4'),
    ],
)
def test_damage_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_as_internlm(tmp_path / 'a.bin', SAMPLES[:2])
    first = path.read_text().splitlines()[0]
    path.write_text(f'{first}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(read_bin(path))


def test_meta_of_another_file(tmp_path: Path) -> None:
    path = write_as_internlm(tmp_path / 'a.bin', SAMPLES)
    path.write_text(path.read_text() * 2)  # the original appends when it runs again
    with pytest.raises(ValueError, match=r'a\.bin:5: .* says no such line'):
        list(read_bin(path))
    path.write_text(''.join(path.read_text().splitlines(True)[:3]))
    with pytest.raises(ValueError, match=r'has 3 lines, but a\.bin\.meta 4'):
        list(read_bin(path))
    Path(f'{path}.meta').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'a\.bin\.meta is not a numpy array'):
        list(read_bin(path))
    with open(f'{path}.meta', 'wb') as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r'not integers \[samples, 2\]'):
        list(read_bin(path))


def test_bins_in_linked_folders_are_read(tmp_path: Path) -> None:
    """As InternLM does, which walks with followlinks=True."""
    write_as_internlm(tmp_path / 'elsewhere' / 'x.bin', SAMPLES)
    write_as_internlm(tmp_path / 'data' / 'en' / 'a.bin', SAMPLES)
    (tmp_path / 'data' / 'cn').symlink_to('../elsewhere')
    found = find_bins(tmp_path / 'data')
    assert found == {
        'cn': [tmp_path / 'data' / 'cn' / 'x.bin'],
        'en': [tmp_path / 'data' / 'en' / 'a.bin'],
    }
    (tmp_path / 'data' / 'en' / 'b.bin').symlink_to('gone.bin')
    with pytest.raises(ValueError, match=r'b\.bin is a link to gone\.bin, which is not there'):
        find_bins(tmp_path / 'data')


def test_token_files_go_back_and_forth(tmp_path: Path) -> None:
    path = write_as_internlm(tmp_path / 'a.bin', SAMPLES)
    with TokenFileWriter(tmp_path / 'tokens', vocab_size=90_000, has_loss_mask=True) as writer:
        for sample in read_bin(path):
            writer.add(*sample)
    write_bin(tmp_path / 'b.bin', samples_of(TokenFile(tmp_path / 'tokens')))
    assert (tmp_path / 'b.bin').read_bytes() == path.read_bytes()


def test_what_cannot_be_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='sample 1: id 0 is to be learned'):
        write_bin(tmp_path / 'a.bin', [BinSample(np.array([1, 0]), np.array([1, 1]))])
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r'there is no \.bin file'):
        find_bins(tmp_path)
