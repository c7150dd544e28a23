import json
import os
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.datasets import PretrainDataset, TokenFile
from internlm_mm.datasets.open_files import OpenFiles
from internlm_mm.datasets.speed import (
    in_turns,
    make_sparse_files,
    measure_loading,
    measure_opening,
    measure_tokenisation,
)
from internlm_mm.tokenizers.training import train_tokenizer
from tests.test_datasets.conftest import WriteTokens


def test_turns_by_hand() -> None:
    now, order = [0.0], []

    def taking(name: str, seconds: list[float]):
        def run() -> None:
            order.append(name)
            now[0] += seconds.pop(0)

        return run

    found = in_turns(
        taking('ours', [2.0, 4.0, 8.0]), taking('other', [1.0, 3.0, 2.0]), 3, lambda: now[0]
    )
    assert order == ['ours', 'other', 'other', 'ours', 'ours', 'other']
    assert found['speeds'] == [0.5, 0.75, 0.25]
    assert (found['speed'], found['best_speed']) == (0.5, 0.5)
    assert (found['seconds'], found['other_seconds']) == (4.0, 2.0)


def test_tokenisation(tmp_path: Path) -> None:
    texts = [f'def f{i}(x):\n    return x + {i}\n' * 3 for i in range(40)]
    file = tmp_path / 'code.jsonl'
    file.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    tokenizer = train_tokenizer(texts, tmp_path / 'tokenizer', vocab_size=300)
    found = measure_tokenisation([file], tmp_path / 'tokenizer', tmp_path / 'out', 2)
    assert found['tokens'] == sum(len(tokenizer.encode(text)) for text in texts)
    assert len(found['speeds']) == 2 and found['tokens_per_second'] > 0
    written = TokenFile(tmp_path / 'out' / 'tokens' / 'train' / 'code')
    assert written.num_tokens == found['tokens'] + 2 * len(texts)  # begin and end


def test_loading(write_tokens: WriteTokens) -> None:
    path = write_tokens('a', [range(1, 200)] * 5)
    found = measure_loading(path, 16, 0.01)
    assert 1e3 < found['tokens_per_second'] < 1e10
    assert found['wall_tokens_per_second'] <= found['tokens_per_second'] * 1.5


def test_files_of_holes_are_whole_token_files(tmp_path: Path) -> None:
    make_sparse_files(tmp_path / 'all', 4, 3_000_000)
    for index in range(4):
        file = TokenFile(tmp_path / 'all' / f'{index:05}')
        file.verify()
        assert (file.num_tokens, file.num_documents) == (3_000_000, 3000)
        assert np.diff(file.offsets).tolist() == [1000] * 3000
        assert os.stat(file.path / 'tokens.bin').st_blocks * 512 < 100_000  # of 6 MB
    dataset = PretrainDataset(tmp_path, seq_len=512)
    assert dataset.num_tokens == 12_000_000
    assert dataset[10**9].lengths.sum() == 512


def test_opening_in_a_process_of_its_own(tmp_path: Path) -> None:
    make_sparse_files(tmp_path / 'all', OpenFiles().limit + 20, 2000)
    found = measure_opening(tmp_path, 64, step=3, batch_size=8)
    assert found['tokens'] == 2000 * (OpenFiles().limit + 20)
    assert 0 < found['imported_bytes'] <= found['opened_bytes'] <= found['most_bytes']
    for key in ('open_seconds', 'open_cpu_seconds', 'row_milliseconds', 'rows_per_cpu_second'):
        assert found[key] > 0, key


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r'data_root .* does not exist'):
        measure_opening(tmp_path / 'none', 64, 1, 1)
