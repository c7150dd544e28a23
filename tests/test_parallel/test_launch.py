import datetime
import socket

import pytest
import torch
import torch.distributed as dist

from internlm_mm.parallel.launch import join_process_group, with_host_backend
from internlm_mm.utils.launch import Launch, free_port
from tests.ranks import forking_context

CPU = torch.device('cpu')
MINUTE = datetime.timedelta(seconds=60)


def test_one_process_joins_nothing() -> None:
    assert join_process_group('none', Launch(), CPU, MINUTE) == 1
    assert not dist.is_initialized()


def join(rank: int, port: int, answers) -> None:
    launch = Launch(
        rank=rank, world_size=2, local_rank=rank, master_addr='127.0.0.1', master_port=port
    )
    local_size = join_process_group('slurm', launch, CPU, MINUTE)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    answers.put((rank, local_size, dist.get_backend(), total.item()))
    dist.destroy_process_group()


def test_launchers_without_a_store_of_their_own_meet_at_rank_0() -> None:
    context = forking_context()
    answers = context.SimpleQueue()
    port = free_port()
    processes = [context.Process(target=join, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(answers.get() for _ in range(2)) == [(0, 2, 'gloo', 3), (1, 2, 'gloo', 3)]


@pytest.mark.parametrize('launcher', ['slurm', 'pytorch'])
def test_a_port_that_is_taken_is_told(launcher: str, monkeypatch) -> None:
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        launch = Launch(world_size=2, master_addr='127.0.0.1', master_port=port)
        places = {'RANK': 0, 'WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        for key, value in places.items():  # torch reads them under torchrun
            monkeypatch.setenv(key, str(value))
        with pytest.raises(ValueError, match=f'MASTER_PORT={port}: another program listens'):
            join_process_group(launcher, launch, CPU, MINUTE)
    assert not dist.is_initialized()


def local_size_of_a_group_that_is_there() -> int:
    return join_process_group('none', Launch(), CPU, MINUTE)


def test_a_group_that_is_there_is_used(two_ranks) -> None:
    assert two_ranks(local_size_of_a_group_that_is_there) == [2, 2]


@pytest.mark.parametrize(
    ('backend', 'cuda', 'name'),
    [
        (None, False, 'gloo'),
        (None, True, 'cpu:gloo,cuda:nccl'),
        ('nccl', True, 'cpu:gloo,cuda:nccl'),
        ('gloo', True, 'gloo'),
        ('cpu:gloo,cuda:ucc', True, 'cpu:gloo,cuda:ucc'),
        ('mpi', False, 'mpi'),
    ],
)
def test_counts_always_find_a_backend_for_host_memory(
    backend: str | None, cuda: bool, name: str
) -> None:
    assert with_host_backend(backend, cuda) == name
