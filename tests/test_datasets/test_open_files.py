import mmap
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.datasets import PretrainDataset, TokenFile
from internlm_mm.datasets.open_files import OpenFiles
from tests.test_datasets.conftest import WriteTokens


def mapped(file: TokenFile) -> set[str]:
    return {'tokens', 'offsets', 'loss_mask'} & vars(file).keys()


def test_the_longest_unused_goes(write_tokens: WriteTokens) -> None:
    a, b, c = (TokenFile(write_tokens(name, [[1, 2, 3]])) for name in 'abc')
    files = OpenFiles(2)
    for file in (a, b, a, c):
        assert files.use(file).document(0).tolist() == [1, 2, 3]
    assert len(files) == 2
    assert (mapped(a), mapped(b), mapped(c)) == ({'tokens', 'offsets'}, set(), mapped(a))
    assert files.use(b).document(0).tolist() == [1, 2, 3]  # maps again
    assert not mapped(a)


def test_what_was_read_stays_when_its_file_goes(write_tokens: WriteTokens) -> None:
    a, b = (TokenFile(write_tokens(name, [[i] * 5])) for i, name in enumerate('ab'))
    files = OpenFiles(1)
    kept = files.use(a).document(0)
    files.use(b)
    assert kept.tolist() == [0] * 5


def test_another_process_maps_for_itself(write_tokens: WriteTokens) -> None:
    files = OpenFiles(3)
    _ = files.use(TokenFile(write_tokens('a', [[1]]))).tokens
    copy = pickle.loads(pickle.dumps(files))
    assert (len(files), len(copy), copy.limit) == (1, 0, 3)


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """At most some dozen more descriptors than are open now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir('/proc/self/fd'))) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_the_process_may_have_open(
    tmp_path: Path, write_tokens: WriteTokens, few_descriptors: int
) -> None:
    for index in range(60):
        write_tokens(f'domain{index % 3}/{index:02}', [[index, index, 999]])
    dataset = PretrainDataset(tmp_path, seq_len=3, shuffle=False)
    # With the limit of this process nearly used up, half of it would still be too many.
    dataset._streams[0]._open_files.limit = 5
    found = sorted(dataset[index].input_ids[0] for index in range(60))
    assert found == list(range(60))
    assert len(dataset._streams[0]._open_files) == 5
    assert all(stream._open_files is dataset._streams[0]._open_files for stream in dataset._streams)


def test_the_limit_follows_the_process_s(few_descriptors: int) -> None:
    assert OpenFiles().limit == few_descriptors // 6
    with pytest.raises(ValueError, match='limit must be at least 1, got 0'):
        OpenFiles(0)


@pytest.mark.skipif(not hasattr(mmap, 'MADV_RANDOM'), reason='no advice on this system')
def test_a_row_does_not_read_the_pages_around_it(tmp_path: Path, write_tokens: WriteTokens) -> None:
    """A fresh file of 32 MB, dropped from the page cache: few of its pages come back."""
    path = write_tokens('a', [np.zeros(16_000_000, np.int64)])
    descriptor = os.open(path / 'tokens.bin', os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    file = TokenFile(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    assert file.tokens[8_000_000:8_004_096].sum() == 0
    read = (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before) * 512
    assert read <= 64 * 1024  # 8 KiB were asked for; readahead would have taken up to megabytes
