import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_mm.datasets import BatchSizeRampup, EvalLoader, RandomTokens, TokenLoader
from internlm_mm.datasets.packing import Row
from internlm_mm.registry import DATALOADERS
from internlm_mm.structures import IGNORE_INDEX, Batch

SEQ = 4


class Numbered:
    """Row i holds nothing but i."""

    seq_len = SEQ
    domains = ()

    def __init__(self, num_rows: int = 50) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        ids = np.full(SEQ, index)
        return Row(input_ids=ids, labels=ids, lengths=np.array([SEQ]), max_docs=1)


class Counted(Numbered):
    """Counts the rows that were read, in whatever process."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = multiprocessing.get_context('fork').Value('i', 0)

    def __getitem__(self, index: int) -> Row:
        with self.reads.get_lock():
            self.reads.value += 1
        return super().__getitem__(index)


class Failing(Numbered):
    """Raises, or ends its process, at row 5."""

    def __init__(self, kill: bool) -> None:
        super().__init__()
        self.kill = kill

    def __getitem__(self, index: int) -> Row:
        if index == 5 and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5:
            raise ValueError('row 5 is broken')
        return super().__getitem__(index)


def rows_of(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def rows_of_step(step: list[Batch]) -> list[int]:
    return [row for batch in step for row in rows_of(batch)]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.one_of(st.none(), st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))),
)
@settings(deadline=None, max_examples=50)
def test_how_a_step_is_cut_never_changes_its_rows(
    micro: int, ranks: int, accumulation: int, resume_at: int, growth: tuple[int, int, int] | None
) -> None:
    unit = micro * ranks
    size = unit * (accumulation + 2)
    rampup = None
    if growth is not None:
        start, increment, interval = growth
        rampup = BatchSizeRampup(start * unit, increment * unit, interval)
    loaders = [
        TokenLoader(
            Numbered(),
            global_batch_size=size,
            micro_batch_size=micro,
            data_rank=rank,
            data_world_size=ranks,
            rampup=rampup,
        )
        for rank in range(ranks)
    ]
    consumed = sum(loaders[0].batch_size(iteration) for iteration in range(resume_at))
    for loader in loaders:
        loader.seek(resume_at, consumed)
    iterators = [iter(loader) for loader in loaders]
    for iteration in range(resume_at, resume_at + 3):
        steps = [next(iterator) for iterator in iterators]
        assert len({len(step) for step in steps}) == 1
        assert all(batch.input_ids.shape == (micro, SEQ) for step in steps for batch in step)
        rows = [row for step in steps for row in rows_of_step(step)]
        expected = loaders[0].batch_size(iteration)
        assert rows == list(range(consumed, consumed + expected))
        consumed += expected


@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_change_nothing(num_workers: int) -> None:
    rampup = dict(start=6, increment=6, interval=1)
    options = dict(global_batch_size=12, micro_batch_size=2, rampup=rampup)
    plain = TokenLoader(Numbered(), **options)
    parallel = TokenLoader(Numbered(), num_workers=num_workers, **options)
    for loader in (plain, parallel):
        loader.seek(1, 6)
    expected = [rows_of_step(step) for step in islice(plain, 5)]
    assert [rows_of_step(step) for step in islice(parallel, 5)] == expected
    assert expected[0] == list(range(6, 18))


def test_seek_is_for_the_next_iterator() -> None:
    loader = TokenLoader(Numbered(), global_batch_size=2, micro_batch_size=1)
    running = iter(loader)
    loader.seek(100, 7)
    assert rows_of_step(next(running)) == [0, 1]
    assert rows_of_step(next(iter(loader))) == [7, 8]


@pytest.mark.parametrize('num_workers', [0, 1])
def test_random_state_is_left_alone(num_workers: int) -> None:
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
    )
    dataset = RandomTokens(vocab_size=9, seq_len=8, document_lengths=[3])
    loader = TokenLoader(dataset, global_batch_size=2, micro_batch_size=2, num_workers=num_workers)
    list(islice(loader, 3))
    list(EvalLoader(Numbered(3), micro_batch_size=2, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


@pytest.mark.parametrize('num_workers', [0, 1])
def test_error_in_a_row_comes_through(num_workers: int) -> None:
    loader = TokenLoader(
        Failing(kill=False), global_batch_size=2, micro_batch_size=2, num_workers=num_workers
    )
    with pytest.raises(ValueError, match='row 5 is broken'):
        list(islice(loader, 5))


def run_apart(folder: Path, program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, since PyTorch watches all loaders of a process at once."""
    script = folder / 'script.py'
    script.write_text(program)
    root = Path(__file__).parents[2]
    env = {'PYTHONPATH': str(root)}
    return subprocess.run(
        [sys.executable, script], cwd=root, timeout=60, env=env, text=True, check=False, **options
    )


def test_killed_worker_raises(tmp_path: Path) -> None:
    # PyTorch may tell of the death a second time, wherever the process is then, as in the middle of
    # printing the first.
    done = run_apart(
        tmp_path,
        'from itertools import islice\n'
        'from internlm_mm.datasets import TokenLoader\n'
        'from tests.test_datasets.test_loader import Failing\n'
        'if __name__ == "__main__":\n'
        '    sizes = dict(global_batch_size=2, micro_batch_size=2)\n'
        '    list(islice(TokenLoader(Failing(kill=True), num_workers=1, **sizes), 5))\n',
        capture_output=True,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r'RuntimeError\W.*(exited unexpectedly|killed by signal)', done.stderr)


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='macOS does not say who signals')
def test_workers_outlive_a_launchers_signals(tmp_path: Path) -> None:
    done = run_apart(
        tmp_path,
        'import multiprocessing, subprocess\n'
        'from itertools import islice\n'
        'from internlm_mm.datasets import RandomTokens, TokenLoader\n'
        'data = RandomTokens(vocab_size=9, seq_len=8)\n'
        'loader = TokenLoader(data, global_batch_size=1, micro_batch_size=1, num_workers=1)\n'
        'iterator = iter(loader)\n'
        'next(iterator)\n'
        '(worker,) = multiprocessing.active_children()\n'
        "for name in ('INT', 'TERM'):\n"
        "    subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)  # not its parent\n"
        'for step, (batch,) in enumerate(islice(iterator, 20), start=1):\n'
        '    assert batch.input_ids[0].tolist() == data[step].input_ids.tolist()\n'
        'worker.terminate()\n'
        'worker.join(10)\n'
        'assert worker.exitcode == 0, worker.exitcode\n'
        'raise SystemExit(8)\n',
    )
    assert done.returncode == 8


def test_a_process_that_fails_ends_its_workers(tmp_path: Path) -> None:
    done = run_apart(
        tmp_path,
        'from internlm_mm.datasets import RandomTokens, TokenLoader\n'
        'data = RandomTokens(vocab_size=9, seq_len=8)\n'
        'loader = TokenLoader(data, global_batch_size=1, micro_batch_size=1, num_workers=1)\n'
        'iterator = iter(loader)\n'
        'next(iterator)\n'
        'raise SystemExit(7)\n',
    )
    assert done.returncode == 7


def test_length_is_an_epochs_steps() -> None:
    assert len(TokenLoader(Numbered(50), global_batch_size=8, micro_batch_size=8)) == 6
    assert len(TokenLoader(Numbered(5), global_batch_size=8, micro_batch_size=8)) == 1


def test_batch_sizes_grow() -> None:
    rampup = dict(start=2, increment=2, interval=2)
    loader = TokenLoader(Numbered(), global_batch_size=6, micro_batch_size=2, rampup=rampup)
    assert [loader.batch_size(iteration) for iteration in range(6)] == [2, 2, 4, 4, 6, 6]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(global_batch_size=5), 'global_batch_size=5 rows do not divide'),
        (dict(data_rank=2, data_world_size=2), r'data_rank=2 is not in range\(2\)'),
        (
            dict(rampup=dict(start=3, increment=2, interval=1)),
            'a batch size of rampup=3 rows do not divide',
        ),
        (dict(rampup=dict(start=10, increment=2, interval=1)), r'rampup\.start=10 is more than'),
        (
            dict(rampup=dict(start=2, incr=2, interval=1)),
            r"rampup\.incr\. Did you mean 'increment'\?",
        ),
        (dict(rampup=dict(start=2)), 'rampup lacks increment, interval'),
    ],
)
def test_options_that_are_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLoader(Numbered(), **(dict(global_batch_size=8, micro_batch_size=2) | options))


def test_position_that_is_none() -> None:
    loader = TokenLoader(Numbered(), global_batch_size=8, micro_batch_size=2)
    with pytest.raises(ValueError, match='rows=-1'):
        loader.seek(0, -1)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_evaluation_sees_every_row_once(rows: int, micro: int, ranks: int) -> None:
    loaders = [
        EvalLoader(Numbered(rows), micro_batch_size=micro, data_rank=rank, data_world_size=ranks)
        for rank in range(ranks)
    ]
    passes = [list(loader) for loader in loaders]
    assert {len(batches) for batches in passes} == {len(loaders[0])}
    batches = [batch for one in passes for batch in one]
    assert all(batch.input_ids.shape == (micro, SEQ) for batch in batches)
    trained = [
        int(row)
        for batch in batches
        for row, labels in zip(batch.input_ids[:, 0], batch.labels, strict=True)
        if (labels != IGNORE_INDEX).any()
    ]
    assert sorted(trained) == list(range(rows))
    assert sum(batch.num_targets for batch in batches) == rows * SEQ


def test_evaluation_of_some_rows_spreads_them() -> None:
    loader = EvalLoader(Numbered(100), micro_batch_size=2, max_rows=4)
    assert [rows_of(batch) for batch in loader] == [[0, 25], [50, 75]]
    assert [rows_of(batch) for batch in loader] == [[0, 25], [50, 75]]  # and again
    assert len(EvalLoader(Numbered(3), micro_batch_size=2, max_rows=100)) == 2


def test_evaluation_with_workers() -> None:
    loader = EvalLoader(Numbered(9), micro_batch_size=2, num_workers=2)
    assert [rows_of(batch) for batch in loader][:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize('options', [dict(micro_batch_size=0), dict(max_rows=0)])
def test_evaluation_of_nothing(options: dict) -> None:
    with pytest.raises(ValueError, match='must be at least 1'):
        EvalLoader(Numbered(), **(dict(micro_batch_size=2) | options))


def test_loaders_are_registered() -> None:
    config = dict(type='TokenLoader', dataset=Numbered(), global_batch_size=2, micro_batch_size=1)
    assert isinstance(DATALOADERS.build(config), TokenLoader)
    config = dict(type='EvalLoader', dataset=Numbered(), micro_batch_size=1)
    assert isinstance(DATALOADERS.build(config), EvalLoader)


def test_micro_batches_of_every_step() -> None:
    options = dict(global_batch_size=16, micro_batch_size=2, data_world_size=2)
    loader = TokenLoader(RandomTokens(vocab_size=8, seq_len=4), **options)
    assert loader.micro_batch_counts == [4]
    rampup = dict(start=4, increment=8, interval=3)
    loader = TokenLoader(RandomTokens(vocab_size=8, seq_len=4), rampup=rampup, **options)
    assert loader.micro_batch_counts == [1, 3, 4]
    seen = {loader.micro_batches(iteration) for iteration in range(20)}
    assert seen == set(loader.micro_batch_counts)


@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_read_a_whole_step_ahead(num_workers: int) -> None:
    """Or a step of many batches would wait for most of them, however fast they are read."""
    dataset = Counted()
    loader = TokenLoader(dataset, global_batch_size=10, micro_batch_size=1, num_workers=num_workers)
    steps = iter(loader)
    next(steps)
    deadline = time.monotonic() + 30
    while dataset.reads.value < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dataset.reads.value >= 20
