"""Work outside the model: once, in order of its owner, and told to every process."""

import os
import threading

import pytest

from internlm_mm.evaluation import Outside, OutsideWorker


def test_answers_keep_their_order_and_owners_theirs() -> None:
    done: dict[int, list[int]] = {owner: [] for owner in range(3)}

    def work(owner: int, number: int):
        done[owner].append(number)
        return owner, number

    requests = [
        Outside(lambda owner=number % 3, number=number: work(owner, number), number % 3)
        for number in range(30)
    ]
    answers = OutsideWorker(threads=4)(requests)
    assert answers == [(number % 3, number) for number in range(30)]
    assert done == {owner: list(range(owner, 30, 3)) for owner in range(3)}
    assert OutsideWorker()([]) == []


def test_threads_work_side_by_side() -> None:
    barrier = threading.Barrier(3, timeout=20)
    requests = [Outside(lambda: barrier.wait() >= 0, owner) for owner in range(3)]
    assert OutsideWorker(threads=3)(requests) == [True] * 3


def test_an_error_is_told() -> None:
    with pytest.raises(RuntimeError, match='work outside the model failed: KeyError: 2'):
        OutsideWorker()([Outside(dict), Outside(lambda: {}[2])])


def rank_works(fails: bool) -> list[int] | str:
    import torch.distributed as dist

    worker = OutsideWorker(dist.get_rank(), dist.get_world_size())
    if not fails:
        return worker([Outside(os.getpid, owner) for owner in (0, 1, 2, 0)])
    try:
        worker([Outside(os.getpid), Outside(lambda: 1 // 0, 1)])
    except RuntimeError as error:
        return str(error)
    return ''


def test_ranks_share_it_out_and_know_all_of_it(two_ranks) -> None:
    first, second = two_ranks(rank_works, False)
    assert first == second and len(set(first)) == 2
    assert first[0] == first[2] == first[3] != first[1]
    told = two_ranks(rank_works, True)
    assert told[0] == told[1] and 'ZeroDivisionError' in told[0]
