"""What the launcher told this process. The only file that reads the environment."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from internlm_mm.utils.suggest import did_you_mean

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's place in the job.

    Attributes:
        rank: Index of the process among all, from 0.
        world_size: Processes in the job.
        local_rank: Index of the process on its machine; chooses the GPU.
        master_addr: Host of rank 0.
        master_port: Port rank 0 listens on while the processes find each other.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = '127.0.0.1'
    master_port: int = 29500


def read_launch(launcher: str, env: Mapping[str, str] | None = None) -> Launch:
    """Read rank, world size and rendezvous from what `launcher` put into the environment.

    Args:
        launcher: One of `LAUNCHERS`.
        env: The environment; the process's own when None.

    Raises:
        ValueError: If the launcher is unknown, or its variables are missing because the process was not
            started by it.
    """
    env = os.environ if env is None else env
    if launcher == 'none':
        return Launch()
    if launcher == 'pytorch':
        return Launch(
            rank=_number(env, 'RANK', launcher),
            world_size=_number(env, 'WORLD_SIZE', launcher),
            local_rank=_number(env, 'LOCAL_RANK', launcher),
            master_addr=env.get('MASTER_ADDR', '127.0.0.1'),
            master_port=int(env.get('MASTER_PORT', 29500)),
        )
    if launcher == 'slurm':
        # Steps and requeued jobs share a job id with nobody else on the host, so the port is free.
        job = _number(env, 'SLURM_JOB_ID', launcher)
        nodes = env.get('SLURM_STEP_NODELIST') or env.get('SLURM_NODELIST') or '127.0.0.1'
        return Launch(
            rank=_number(env, 'SLURM_PROCID', launcher),
            world_size=_number(env, 'SLURM_NTASKS', launcher),
            local_rank=_number(env, 'SLURM_LOCALID', launcher),
            master_addr=env.get('MASTER_ADDR') or first_host(nodes),
            master_port=int(env.get('MASTER_PORT') or 20_000 + job % 40_000),
        )
    if launcher == 'mpi':
        rank_key, world_key, local_key, local_size_key = _mpi_keys(env)
        world_size = int(env[world_key])
        address = env.get('MASTER_ADDR')
        if address is None and env.get(local_size_key) not in (None, str(world_size)):
            raise ValueError(
                '--launcher mpi over several machines needs MASTER_ADDR, the host of rank 0: '
                'mpirun -x MASTER_ADDR=HOST ...'
            )
        return Launch(
            rank=int(env[rank_key]),
            world_size=world_size,
            local_rank=int(env[local_key]),
            master_addr=address or '127.0.0.1',
            master_port=int(env.get('MASTER_PORT', 29500)),
        )
    raise ValueError(f'launcher={launcher!r} is unknown.{did_you_mean(launcher, LAUNCHERS)}')


def first_host(nodelist: str) -> str:
    """First host of a slurm node list.

    Args:
        nodelist: For example 'gpu[07-09,12],login1'.

    Returns:
        For example 'gpu07'.
    """
    match = re.match(r'([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)', nodelist)
    if match is None:
        raise ValueError(f'SLURM_NODELIST={nodelist!r} is not a list of hosts')
    prefix, numbers, suffix = match.groups()
    return prefix + (re.split('[,-]', numbers)[0] if numbers else '') + suffix


def host_name() -> str:
    """Name of this machine, for messages that must say where something happened."""
    return socket.gethostname()


def _mpi_keys(env: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Names of (rank, world size, local rank, local size): Open MPI, then MPICH and Intel MPI."""
    for keys in (
        (
            'OMPI_COMM_WORLD_RANK',
            'OMPI_COMM_WORLD_SIZE',
            'OMPI_COMM_WORLD_LOCAL_RANK',
            'OMPI_COMM_WORLD_LOCAL_SIZE',
        ),
        ('PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS'),
    ):
        if keys[0] in env:
            return keys
    raise ValueError(
        '--launcher mpi: neither OMPI_COMM_WORLD_RANK nor PMI_RANK is set. Start the program with mpirun.'
    )


def _number(env: Mapping[str, str], key: str, launcher: str) -> int:
    if key not in env:
        hint = {
            'pytorch': 'torchrun --nproc-per-node N tools/train.py CONFIG --launcher pytorch',
            'slurm': 'srun python tools/train.py CONFIG --launcher slurm',
        }[launcher]
        raise ValueError(f'--launcher {launcher}: {key} is not set. Start with: {hint}')
    return int(env[key])
