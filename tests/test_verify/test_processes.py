"""Processes: started, watched, ended."""

import json
import os
import time
from pathlib import Path

import pytest

from internlm_mm.verify.processes import LayoutError, run_processes, tail


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


def test_processes_are_told_their_place(tmp_path: Path) -> None:
    run_processes(job(tmp_path), 1, 'cpu', f'{__name__}:note_environment')
    text = (tmp_path / 'log_0.txt').read_text()
    assert text.split() == [
        'RANK=0', 'LOCAL_RANK=0', 'WORLD_SIZE=1', 'MASTER_ADDR=127.0.0.1', 'CUDA_VISIBLE_DEVICES=',
    ]  # fmt: skip


def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match='rank 1 ended with code 1') as error:
        run_processes(job(tmp_path), 2, 'cpu', f'{__name__}:fail_on_rank_1')
    assert 'FloatingPointError: planted' in str(error.value)


def test_time_runs_out(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match='not finished after 1 s'):
        run_processes(job(tmp_path), 1, 'cpu', f'{__name__}:sleep', timeout=1)


def test_tail(tmp_path: Path) -> None:
    path = tmp_path / 'log'
    assert tail(path) == ''
    path.write_text('a\nb\nc\n\n')
    assert tail(path, lines=2) == 'b\nc'
