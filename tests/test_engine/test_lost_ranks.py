"""Who is to blame when ranks fail: each is a thread here, on a store as ranks have it."""

import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from internlm_mm.engine.lost_ranks import LostRanks, is_consequence
from internlm_mm.utils.launch import host_name
from tests.marks import slow
from tests.runs import FAULTY, start_ranks

GLOO = RuntimeError('[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1')
TICK = 0.1


class Job:
    """Ranks of a job whose processes are threads."""

    def __init__(self, world_size: int, silent_seconds: float = 60.0) -> None:
        self.store = dist.TCPStore(
            '127.0.0.1', 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False
        )
        self.ended: dict[int, int] = {}
        self.ranks = [
            LostRanks(
                dist.TCPStore(
                    '127.0.0.1', self.store.port, is_master=False, wait_for_workers=False
                ),
                rank,
                world_size,
                lambda: 17,
                TICK,
                silent_seconds,
                lambda code, rank=rank: self.ended.update({rank: code}),
            )
            for rank in range(world_size)
        ]
        time.sleep(3 * TICK)

    def kill(self, rank: int) -> None:
        """No process, no answer."""
        self.ranks[rank].stop()

    def tell(self, errors: dict[int, BaseException]) -> dict[int, str | None]:
        """What each rank is told that reports an error, all at the same time."""
        told = {}
        threads = [
            threading.Thread(target=lambda r=rank, e=error: told.update({r: self.ranks[r].tell(e)}))
            for rank, error in errors.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return told

    def wait_for_ends(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.ended) < count:
            assert time.monotonic() < deadline, self.ended
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def _stop_threads():
    yield
    for thread in threading.enumerate():
        if thread.name == 'lost_ranks':
            thread.join(20)


def test_a_dead_rank_is_named() -> None:
    job = Job(4)
    job.kill(2)
    for message in job.tell({0: GLOO, 1: GLOO, 3: GLOO}).values():
        assert message is not None
        assert message.startswith(f'rank 2 (host {host_name()}) ended without a word after step 17')
    assert job.ended == {}  # all of them could speak for themselves


def test_two_dead_ranks_are_named() -> None:
    job = Job(3)
    job.kill(1)
    job.kill(2)
    (message,) = job.tell({0: GLOO}).values()
    assert f'rank 1 (host {host_name()}), rank 2 (host' in str(message)


def test_the_error_of_one_rank_is_told_by_the_others(capsys: pytest.CaptureFixture) -> None:
    job = Job(3)
    told = job.tell({1: ValueError('no such file\nand more'), 2: GLOO})
    assert told[1] is None
    assert told[2] == f'rank 1 (host {host_name()}) failed after step 17: ValueError: no such file'
    job.wait_for_ends(1)  # rank 0 would have waited for long
    assert job.ended == {0: 1}
    assert 'rank 1' in capsys.readouterr().err


def test_a_hanging_rank_is_named_and_ends(capsys: pytest.CaptureFixture) -> None:
    job = Job(3)
    told = job.tell({0: GLOO, 2: GLOO})
    for message in told.values():
        assert message is not None
        assert message.startswith('rank 1 ') and 'did not answer' in message
    job.wait_for_ends(1)
    assert job.ended == {1: 1}
    assert 'waited in vain for rank 1' in capsys.readouterr().err


def test_all_are_there_but_the_network_failed() -> None:
    job = Job(2)
    for message in job.tell({0: GLOO, 1: GLOO}).values():
        assert 'all of them are there' in str(message)


def test_a_rank_that_dies_while_all_wait_for_gpus_is_noticed(
    capsys: pytest.CaptureFixture,
) -> None:
    job = Job(3, silent_seconds=30 * TICK)  # a busy machine may hold a thread up for a while
    time.sleep(40 * TICK)
    assert job.ended == {}  # signs of life are enough
    job.kill(1)
    job.wait_for_ends(2)
    assert job.ended == {0: 1, 2: 1}
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith('rank 1 ') and 'ended without a word' in line for line in lines)
    assert len(lines) == 2


def test_the_one_that_keeps_the_store_is_gone(capsys: pytest.CaptureFixture) -> None:
    job = Job(3)
    job.kill(0)
    job.kill(2)
    del job.store  # it was rank 0's
    (message,) = job.tell({1: GLOO}).values()
    assert str(message).startswith('rank 0') and 'where the ranks meet' in str(message)


def test_who_waits_is_told_that_the_keeper_is_gone(capsys: pytest.CaptureFixture) -> None:
    job = Job(2)
    job.kill(0)
    del job.store
    job.wait_for_ends(1)
    assert job.ended == {1: 1}
    assert capsys.readouterr().err.startswith('rank 0')


def test_after_the_end_nothing_is_watched() -> None:
    job = Job(2)
    for rank in job.ranks:
        rank.stop()
    del job.store
    time.sleep(20 * TICK)
    assert job.ended == {}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (GLOO, True),
        (dist.DistBackendError('NCCL error'), True),
        (dist.DistNetworkError('closed'), True),
        (RuntimeError('[unbound_buffer.cc:119] gloo: Timed out waiting 5000ms for recv'), True),
        (caused(OSError('saving iter_3 failed on rank 0'), GLOO), True),
        (RuntimeError('planted on rank 1'), False),
        (RuntimeError('CUDA out of memory'), False),
        (ValueError('NCCL is no loss function'), False),
    ],
    ids=str,
)
def test_errors_that_are_only_consequences(error: Exception, expected: bool) -> None:
    assert is_consequence(error) is expected


# ------------------------------------------------------------------------------- whole runs


def faulty(work_dir: Path, kind: str, rank: int, **options: object) -> list[object]:
    pairs = {'custom_hooks.1.kind': kind, 'custom_hooks.1.rank': rank, 'custom_hooks.1.step': 3}
    pairs |= {key.replace('__', '.'): value for key, value in options.items()}
    words = [f'{key}={value}' for key, value in pairs.items()]
    return [FAULTY, '--work-dir', work_dir, '--cfg-options', *words]


@pytest.mark.parametrize(
    ('axis', 'lost'),
    [
        slow('data_shard', 0), ('data_shard', 1), slow('data_replicate', 1), slow('tensor', 1),
        slow('context', 0), ('pipeline', 0), slow('pipeline', 1),
    ],
)  # fmt: skip
def test_a_killed_process_is_named(tmp_path: Path, axis: str, lost: int) -> None:
    """Whatever the others wait for: a gather, a message from stage to stage."""
    # Collectives would wait far longer than `Run.wait`, which raises TimeoutError.
    options = {f'strategy__parallel__{axis}': 2, 'env_cfg__dist_cfg__timeout': 1800}
    argv = faulty(tmp_path / 'work', 'kill', lost, **options)
    ranks = start_ranks(argv, tmp_path / 'log')
    assert ranks[lost].wait() == -signal.SIGKILL
    assert ranks[1 - lost].wait() == 1, ranks[1 - lost].text
    assert_names(ranks[1 - lost].text, lost)


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 3])
def test_all_others_of_four_name_it(tmp_path: Path, lost: int) -> None:
    """Two stages of two shards: one shares nothing with the dead rank but the job."""
    options = {'strategy__parallel__pipeline': 2, 'strategy__parallel__data_shard': 2}
    options |= {'train_cfg__micro_batch_size': 1, 'env_cfg__dist_cfg__timeout': 1800}
    argv = faulty(tmp_path / 'work', 'kill', lost, **options)
    ranks = start_ranks(argv, tmp_path / 'log', limits=[None] * 4)
    codes = [rank.wait(90) for rank in ranks]
    assert codes == [-signal.SIGKILL if rank == lost else 1 for rank in range(4)]
    for rank in range(4):
        if rank != lost:
            assert_names(ranks[rank].text, lost)


def assert_names(text: str, lost: int) -> None:
    """The last line says who it was."""
    last = text.splitlines()[-1]
    # Where the ranks meet is gone with rank 0, perhaps before its host is known.
    names = (f'rank {lost} (host {host_name()})', 'rank 0, where the ranks meet')
    assert last.startswith(names[: 1 if lost else 2]), text
    assert 'ended without a word after step 3' in last


def test_the_process_that_failed_is_named(tmp_path: Path) -> None:
    ranks = start_ranks(faulty(tmp_path / 'work', 'raise', 1), tmp_path / 'log')
    assert ranks[1].wait() == 1
    ranks[0].process.terminate()  # as launchers do with those that are left
    assert ranks[0].wait() == 1, ranks[0].text
    last = ranks[0].text.splitlines()[-1]
    assert 'rank 1' in last and 'RuntimeError: planted on rank 1' in last, ranks[0].text
    assert 'ended without a word' not in ranks[1].text


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_ends(tmp_path: Path) -> None:
    argv = faulty(
        tmp_path / 'work', 'wait', 1, custom_hooks__1__delay=300, env_cfg__dist_cfg__timeout=5
    )
    ranks = start_ranks(argv, tmp_path / 'log')
    assert [rank.wait(90) for rank in ranks] == [1, 1]
    last = ranks[0].text.splitlines()[-1]
    assert last.startswith('rank 1 ') and 'did not answer after step 3' in last, ranks[0].text
    assert 'waited in vain for rank 1' in ranks[1].text
