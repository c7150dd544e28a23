"""What is written, counted, refused, and left where writing fails; reading: test_token_file.py."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import WINDOWS, TokenFileWriter

DOCUMENTS = [[1, 2, 3], [999], [7, 0, 7, 7]]


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=60), st.sampled_from([*WINDOWS, 100, 10**6])
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bound_on_documents_in_a_window(tmp_path: Path, lengths: list[int], window: int) -> None:
    with TokenFileWriter(tmp_path / 'data', vocab_size=9, overwrite=True) as writer:
        writer.add_many(np.zeros(sum(lengths), int), np.array(lengths))
    starts = np.cumsum([0, *lengths[:-1]])
    exact = max(int(((starts >= s) & (starts < s + window)).sum()) for s in starts)
    bound = TokenFile(tmp_path / 'data').max_documents_in(window)
    assert bound == exact if window in WINDOWS else bound >= exact


@pytest.mark.parametrize(
    ('ids', 'mask', 'message'),
    [
        ([10], None, 'token id 10 is outside the vocabulary of 10'),
        ([-1], None, 'token id -1'),
        ([], None, 'documents of'),
        ([1], [1], 'or none may have one'),
    ],
)
def test_writer_refuses(tmp_path: Path, ids: list[int], mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with TokenFileWriter(tmp_path / 'data', vocab_size=10) as writer:
            writer.add(ids, mask)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_before_it_is_whole(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / 'data', vocab_size=10) as writer:
        writer.add([1])
        assert not (tmp_path / 'data').exists()
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_failure_keeps_the_older_file(write_tokens, tmp_path: Path) -> None:
    path = write_tokens('data', DOCUMENTS)
    with pytest.raises(FileExistsError):
        TokenFileWriter(path, vocab_size=10)
    with pytest.raises(RuntimeError, match='stop'):
        with TokenFileWriter(path, vocab_size=10, overwrite=True) as writer:
            writer.add([1])
            raise RuntimeError('stop')
    assert TokenFile(path).num_tokens == 8
    with TokenFileWriter(path, vocab_size=10, overwrite=True) as writer:
        writer.add([1])
    assert TokenFile(path).num_tokens == 1
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_only_token_files_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / 'home').mkdir()
    with pytest.raises(FileExistsError, match='is no token file'):
        TokenFileWriter(tmp_path / 'home', vocab_size=10, overwrite=True)
