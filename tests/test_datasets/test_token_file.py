import json
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import TokenFileWriter

DOCUMENTS = [[1, 2, 3], [999], [7, 0, 7, 7]]
FLAT = [1, 2, 3, 999, 7, 0, 7, 7]


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(1000, 'u2'), (65_536, 'u2'), (65_537, 'u4')])
def test_what_is_written_is_read(write_tokens, vocab_size: int, dtype: str) -> None:
    path = write_tokens('data', DOCUMENTS, vocab_size)
    file = TokenFile(path)
    assert [file.document(i).tolist() for i in range(len(file))] == DOCUMENTS
    assert (file.num_documents, file.num_tokens, file.vocab_size) == (3, 8, vocab_size)
    assert file.shortest_document == 1
    assert file.loss_mask is None
    file.verify()
    # The format, read with numpy alone.
    assert np.fromfile(path / 'tokens.bin', f'<{dtype}').tolist() == FLAT
    assert np.load(path / 'offsets.npy').tolist() == [0, 3, 4, 8]
    meta = json.loads((path / 'meta.json').read_text())
    assert (meta['version'], meta['dtype']) == (1, 'uint16' if dtype == 'u2' else 'uint32')


def test_files_written_with_numpy_are_read(tmp_path: Path) -> None:
    np.array([5, 6, 7], '<u2').tofile(tmp_path / 'tokens.bin')
    np.save(tmp_path / 'offsets.npy', np.array([0, 1, 3]))
    meta = dict(version=1, dtype='uint16', num_documents=2, num_tokens=3, vocab_size=10)
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    file = TokenFile(tmp_path)
    assert file.document(1).tolist() == [6, 7]
    assert file.tokenizer is None
    assert file.max_documents_in(100) == 2


def test_loss_mask(write_tokens) -> None:
    masks = [[0, 1, 1], [1], [1, 0, 0, 1]]
    file = TokenFile(write_tokens('data', DOCUMENTS, masks=masks))
    assert file.loss_mask.tolist() == [0, 1, 1, 1, 1, 0, 0, 1]


def damage(path: Path, name: str, change) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(change(data))


def edit_meta(path: Path, **values) -> None:
    meta = json.loads((path / 'meta.json').read_text())
    (path / 'meta.json').write_text(json.dumps(meta | values))


@pytest.mark.parametrize('name', ['tokens.bin', 'offsets.npy', 'meta.json'])
def test_missing_file(write_tokens, name: str) -> None:
    path = write_tokens('data', DOCUMENTS)
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name} is missing'):
        TokenFile(path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no token file at'):
        TokenFile(tmp_path / 'none')


@pytest.mark.parametrize('name', ['tokens.bin', 'offsets.npy', 'loss_mask.bin'])
def test_truncated_file(write_tokens, name: str) -> None:
    path = write_tokens('data', DOCUMENTS, masks=[[1] * len(d) for d in DOCUMENTS])
    damage(path, name, lambda data: data[:-1])
    with pytest.raises(ValueError, match=rf'{name} has \d+ bytes, but .* truncated'):
        TokenFile(path)


def test_wrong_dtype(write_tokens) -> None:
    path = write_tokens('data', DOCUMENTS)
    edit_meta(path, dtype='uint32')
    with pytest.raises(ValueError, match='needs 32: truncated or of another dtype'):
        TokenFile(path)
    edit_meta(path, dtype='float32')
    with pytest.raises(ValueError, match=r"'float32', valid: uint16, uint32"):
        TokenFile(path)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (dict(version=2), 'version 2, this reader knows 1'),
        (dict(num_tokens='8'), "'num_tokens' is missing or not of type int"),
    ],
)
def test_meta_of_another_kind(write_tokens, values: dict, message: str) -> None:
    path = write_tokens('data', DOCUMENTS)
    edit_meta(path, **values)
    with pytest.raises(ValueError, match=message):
        TokenFile(path)


def test_meta_that_is_not_json(write_tokens) -> None:
    path = write_tokens('data', DOCUMENTS)
    damage(path, 'meta.json', lambda data: data[:-9])
    with pytest.raises(ValueError, match=r'meta\.json is not JSON'):
        TokenFile(path)


def test_offsets_that_do_not_fit(write_tokens) -> None:
    path = write_tokens('data', DOCUMENTS)
    np.save(path / 'offsets.npy', np.array([0, 3, 4, 9]))
    with pytest.raises(ValueError, match='covers tokens 0 to 9, but there are 8'):
        _ = TokenFile(path).offsets
    np.save(path / 'offsets.npy', np.array([0.0, 3, 4, 8]))
    with pytest.raises(ValueError, match='float64'):
        _ = TokenFile(path).offsets
    damage(path, 'offsets.npy', lambda data: b'x' + data[1:])
    with pytest.raises(ValueError, match='not a numpy array'):
        _ = TokenFile(path).offsets


def test_verify_finds_ids_outside_the_vocabulary(write_tokens) -> None:
    path = write_tokens('data', DOCUMENTS)
    edit_meta(path, vocab_size=900)
    with pytest.raises(ValueError, match='token 3 is 999, outside the vocabulary of 900'):
        TokenFile(path).verify()


def test_verify_finds_documents_out_of_order(write_tokens) -> None:
    path = write_tokens('data', DOCUMENTS)
    np.save(path / 'offsets.npy', np.array([0, 4, 3, 8]))
    with pytest.raises(ValueError, match='document 1 has -1 tokens'):
        TokenFile(path).verify()


def test_empty_file(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / 'data', vocab_size=10):
        pass
    file = TokenFile(tmp_path / 'data')
    assert (len(file), file.tokens.tolist(), file.offsets.tolist()) == (0, [], [0])
    file.verify()


def test_workers_open_their_own_maps(write_tokens) -> None:
    file = TokenFile(write_tokens('data', DOCUMENTS))
    file.document(0)
    assert 'tokens' in vars(file)
    assert 'tokens' not in file.__getstate__()
    loader = DataLoader(
        [file], collate_fn=_first_document, num_workers=1, multiprocessing_context='spawn'
    )
    assert list(loader) == [[1, 2, 3]]


def _first_document(files: list[TokenFile]) -> list[int]:
    return files[0].document(0).tolist()


def test_opening_reads_neither_tokens_nor_offsets(write_tokens, monkeypatch) -> None:
    path = write_tokens('data', DOCUMENTS)

    def refuse(*args, **kwargs) -> None:
        raise AssertionError('opened an array')

    for name in ('load', 'memmap', 'fromfile'):
        monkeypatch.setattr(np, name, refuse)
    assert len(TokenFile(path)) == len(DOCUMENTS)  # so thousands of files open at once


def test_index_outside(write_tokens) -> None:
    with pytest.raises(IndexError, match='document 3 of 3'):
        TokenFile(write_tokens('data', DOCUMENTS)).document(3)
