"""Processes: started, watched, ended."""

import json
import os
import time
from pathlib import Path

import pytest

from internlm_mm.verify.processes import LayoutError, Processes, run_processes, tail


def job(folder: Path) -> Path:
    path = folder / 'job.json'
    path.write_text(json.dumps([]))  # nothing to do: processes meet and leave
    return path


def note_environment() -> None:
    keys = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'CUDA_VISIBLE_DEVICES')
    print(*(f'{key}={os.environ.get(key)}' for key in keys), flush=True)


def fail_on_rank_1() -> None:
    if os.environ['RANK'] == '1':
        raise FloatingPointError('planted')
    time.sleep(3600)  # longer than `run_processes` waits, which would then say something else


def sleep() -> None:
    time.sleep(3600)


def run(folder: Path, world_size: int, prelude: str, timeout: float = 600) -> None:
    processes = Processes([world_size], 'cpu', f'{__name__}:{prelude}')
    run_processes(job(folder), processes.take(world_size), timeout)


def test_processes_are_told_their_place(tmp_path: Path) -> None:
    run(tmp_path, 1, 'note_environment')
    text = (tmp_path / 'log_0.txt').read_text()
    assert text.split() == [
        'RANK=0', 'LOCAL_RANK=0', 'WORLD_SIZE=1', 'MASTER_ADDR=127.0.0.1', 'CUDA_VISIBLE_DEVICES=',
    ]  # fmt: skip


def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match='rank 1 ended with code 1') as error:
        run(tmp_path, 2, 'fail_on_rank_1')
    assert 'FloatingPointError: planted' in str(error.value)


def test_time_runs_out(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match='not finished after 1 s'):
        run(tmp_path, 1, 'sleep', timeout=1)


def test_those_of_later_layouts_wait_for_their_turn(tmp_path: Path) -> None:
    processes = Processes([1, 2, 2, 1], 'cpu', ahead=2)
    first = processes.take(1)
    ready = list(processes._ready)
    assert [len(waiting) for waiting in ready] == [2, 2]
    assert all(one.process.is_alive() for waiting in ready for one in waiting)
    run_processes(job(tmp_path), first)
    # The layout with two processes that comes next; of those after it one process is left.
    assert processes.take(2) is ready[0]
    assert [len(waiting) for waiting in processes._ready] == [2, 1]
    last = processes.take(1)  # the second layout of two was left out
    assert not any(one.process.is_alive() for one in ready[1])
    run_processes(job(tmp_path), last)
    for one in ready[0]:
        one.connection.close()
        one.process.join()


def test_those_that_nobody_took_are_ended() -> None:
    processes = Processes([1, 1, 1], 'cpu', ahead=1)
    (taken,) = processes.take(1)
    (waiting,) = processes._ready[0]
    processes.close()
    assert not waiting.process.is_alive()
    taken.connection.close()  # as when the parent is gone
    taken.process.join(30)
    assert taken.process.exitcode == 0


def test_tail(tmp_path: Path) -> None:
    path = tmp_path / 'log'
    assert tail(path) == ''
    path.write_text('a\nb\nc\n\n')
    assert tail(path, lines=2) == 'b\nc'
