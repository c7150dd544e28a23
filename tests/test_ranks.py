import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import Ranks


def die() -> None:
    os._exit(7)


def one_more(number: int) -> int:
    return number + 1


def test_ranks_that_died_are_told_of_and_replaced(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    assert ranks(one_more, 1) == [2, 2]
    with pytest.raises(RuntimeError, match='rank 0 ended with exit code 7'):
        ranks(die)
    assert ranks(one_more, 2) == [3, 3]
    with pytest.raises(RuntimeError, match=r'(?s)rank 0:.*rank 1:.*TypeError'):
        ranks(one_more, 'text')
    assert ranks(one_more, 3) == [4, 4]
    ranks.close()


def kill_once(mark: Path) -> int:
    if not mark.exists() and dist.get_rank() == 1:
        mark.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return dist.get_rank()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_what_a_signal_ended_is_called_once_more(tmp_path: Path, capfd) -> None:
    ranks = Ranks(tmp_path)
    assert ranks(kill_once, tmp_path / 'mark') == [0, 1]
    told = capfd.readouterr().err
    assert 'kill_once once more: rank 1 ended with exit code -11' in told
    assert 'in kill_once' in told  # where it was
    with pytest.raises(RuntimeError, match='ended with exit code -11'):
        ranks(kill)
    ranks.close()
