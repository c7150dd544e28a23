from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_mm.datasets import TokenFile, TokenFileWriter
from internlm_mm.datasets import token_stream as module
from internlm_mm.datasets.token_stream import TokenStream
from internlm_mm.structures import IGNORE_INDEX

FILES = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=1, max_size=4
)  # lengths of documents


def write(folder: Path, files: list[list[int]]) -> tuple[list[TokenFile], list[list[int]]]:
    """Token files of these lengths, each token its own id; and their documents."""
    opened, documents, next_id = [], [], 0
    for index, lengths in enumerate(files):
        path = folder / str(index)
        with TokenFileWriter(path, vocab_size=10_000, overwrite=True) as writer:
            for length in lengths:
                documents.append(list(range(next_id, next_id + length)))
                next_id += length
                writer.add(documents[-1])
        opened.append(TokenFile(path))
    return opened, documents


@given(FILES, st.data(), st.integers(1, 6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_piece_equals_a_list_of_documents(
    tmp_path: Path, files: list[list[int]], data: st.DataObject, min_length: int
) -> None:
    opened, documents = write(tmp_path, files)
    kept = [document for document in documents if len(document) >= min_length]
    stream = TokenStream(opened, min_length)
    assert stream.num_tokens == sum(map(len, kept))
    assert stream.num_dropped == len(documents) - len(kept)
    if not kept:
        return
    start = data.draw(st.integers(0, stream.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, stream.num_tokens + 5))
    tokens, labels, lengths = stream.read(start, stop)

    flat = [token for document in kept for token in document]
    targets = [t for document in kept for t in [*document[1:], IGNORE_INDEX]]
    cuts = sorted({start, min(stop, len(flat)), *np.cumsum([0, *map(len, kept)])})
    cuts = [cut for cut in cuts if start <= cut <= stop]
    assert tokens.tolist() == flat[start:stop]
    assert labels.tolist() == targets[start:stop]
    assert lengths.tolist() == [b - a for a, b in pairwise(cuts)]
    assert len(lengths) <= stream.max_fragments(stop - start)


def test_filter_across_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, '_BLOCK', 4)
    opened, documents = write(tmp_path, [[1, 5] * 10 + [1] * 9 + [7, 1]])
    stream = TokenStream(opened, 2)
    flat = [token for document in documents if len(document) > 1 for token in document]
    for start in range(len(flat)):
        assert stream.read(start, start + 9).tokens.tolist() == flat[start : start + 9]


def test_offsets_are_left_alone_when_nothing_is_short(tmp_path: Path) -> None:
    opened, _ = write(tmp_path, [[5, 6]])
    TokenStream(opened, 5)
    assert 'offsets' not in vars(opened[0])


def test_loss_mask_hides_labels_not_tokens(write_tokens) -> None:
    path = write_tokens('x', [[1, 2, 3, 4], [5, 6]], masks=[[1, 0, 1, 0], [0, 1]])
    for min_length in (1, 2):
        tokens, labels, _ = TokenStream([TokenFile(path)], min_length).read(0, 6)
        assert tokens.tolist() == [1, 2, 3, 4, 5, 6]
        assert labels.tolist() == [-100, 3, -100, -100, 6, -100]
    assert TokenStream([TokenFile(path)]).read(0, 2).labels.tolist() == [-100, 3]


def test_damaged_ids_are_noticed_when_read(write_tokens) -> None:
    path = write_tokens('x', [[1, 2, 3]], vocab_size=10)
    np.array([1, 2, 60_000], '<u2').tofile(path / 'tokens.bin')
    stream = TokenStream([TokenFile(path)])
    stream.read(0, 1)
    with pytest.raises(ValueError, match='token 2 is 60000, outside the vocabulary of 10'):
        stream.read(1, 3)
