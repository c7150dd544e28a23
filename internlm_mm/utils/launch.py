"""What the launcher told this process. The only file that reads the environment."""

import contextlib
import os
import random
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from internlm_mm.utils.suggest import did_you_mean

_PORT_RANGE = Path('/proc/sys/net/ipv4/ip_local_port_range')
_KERNEL_PORTS = (32_768, 61_000)  # where nothing tells
_FIRST_PORT = 10_000

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')

HINTS = {
    'pytorch': 'torchrun --nproc-per-node N {command} --launcher pytorch',
    'slurm': 'srun python {command} --launcher slurm',
    'mpi': 'mpirun -n N python {command} --launcher mpi',
}
"""How each launcher is used, for messages."""


class NotStarted(ValueError):
    """A launcher that has not started this process.

    Args:
        launcher: One of HINTS.
        reason: What shows it.
    """

    def __init__(self, launcher: str, reason: str) -> None:
        self.launcher, self.reason = launcher, reason
        super().__init__(self.told('tools/train.py CONFIG'))

    def told(self, command: str) -> str:
        """The message, with how `command` is started by the launcher."""
        hint = HINTS[self.launcher].format(command=command)
        return f'--launcher {self.launcher}: {self.reason}. Start with: {hint}'


_ALLOCATOR_KEYS = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_HIP_ALLOC_CONF')

_MPI_KEYS = {  # rank, world size, rank and size on this machine
    'Open MPI': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
        'OMPI_COMM_WORLD_LOCAL_SIZE',
    ),
    'MPICH and Intel MPI': ('PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS'),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's place in the job.

    Attributes:
        rank: Index of the process among all, from 0.
        world_size: Processes in the job.
        local_rank: Index of the process on its machine, among those that see the same GPUs;
            chooses the GPU.
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
        ValueError: If the launcher is unknown, its variables are missing because the process was
            not started by it, or another one started several processes that would not know each
            other.
    """
    env = os.environ if env is None else env
    if launcher == 'none':
        _check_alone(env)
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
        return _read_slurm(env)
    if launcher == 'mpi':
        return _read_mpi(env)
    raise ValueError(f'launcher={launcher!r} is unknown.{did_you_mean(launcher, LAUNCHERS)}')


def enter_launch(launch: Launch, gpus: int) -> None:
    """Tell this process its place as torchrun would, for one that a program of ours has started.

    Args:
        launch: Read back with `read_launch('pytorch')`.
        gpus: Of this machine. 0 hides them from a process that has not touched one yet. Fewer than
            processes are shared: to try things out, not to be fast.
    """
    if 0 < gpus <= launch.local_rank:
        # NCCL refuses two ranks on a GPU of one host; on hosts by other names it does not look.
        os.environ['NCCL_HOSTID'] = f'{host_name()}-{launch.local_rank // gpus}'
        launch = replace(launch, local_rank=launch.local_rank % gpus)
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    if not gpus:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


def let_gpu_memory_grow() -> None:
    """Have torch take GPU memory in segments that grow, unless its allocator is set otherwise.

    A segment that cannot grow leaves pieces behind that fit nothing. torch reads this once, when it
    is first asked for memory of a GPU.
    """
    if not any(key in os.environ for key in _ALLOCATOR_KEYS):
        os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:True'


def guess_launch(env: Mapping[str, str] | None = None) -> tuple[Launch, bool]:
    """This process's place before anybody has said who the launcher is, as far as it can be told.

    Args:
        env: The environment; the process's own when None.

    Returns:
        The place, alone where several processes do not show; and whether the launcher itself keeps
        a store at `master_addr`, as torchrun does, and not rank 0.
    """
    env = os.environ if env is None else env
    started = _started(env)
    if {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'} <= env.keys():
        started.setdefault('pytorch', 2)  # as torchrun tells it, without torchrun
    for launcher, count in started.items():
        if count > 1:
            try:
                return read_launch(launcher, env), env.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
            except ValueError:  # which whoever needs it is told
                continue
    return Launch(), False


SETTINGS = ('NCCL_', 'TORCH_', 'CUDA_', 'PYTORCH_', 'GLOO_', 'OMP_', 'MKL_', 'KMP_')
"""What names of variables begin with that change how fast a job runs, or whether."""


def settings(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that torch, NCCL, gloo and OpenMP read, by name, for reports.

    Args:
        env: The environment; the process's own when None.
    """
    env = os.environ if env is None else env
    return {name: env[name] for name in sorted(env) if name.startswith(SETTINGS)}


def ranks_here(env: Mapping[str, str] | None = None) -> int | None:
    """Processes of the job on this machine, as torchrun tells them; None where nobody does.

    Args:
        env: The environment; the process's own when None.
    """
    told = (os.environ if env is None else env).get('LOCAL_WORLD_SIZE', '')
    return int(told) if told.isdigit() else None


def first_host(nodelist: str) -> str:
    """First host of a slurm node list.

    Args:
        nodelist: For example 'gpu[07-09,12],login1'.

    Returns:
        For example 'gpu07'.
    """
    match = re.match(r'(?:[^,\[\]]|\[[^\[\]]+\])+', nodelist)
    if match is None:
        raise ValueError(f'SLURM_STEP_NODELIST={nodelist!r} is not a list of hosts')
    return re.sub(r'\[([^,\-\]]+)[^\]]*\]', r'\1', match[0])


def host_name() -> str:
    """Name of this machine, for messages that must say where something happened."""
    return socket.gethostname()


def free_port() -> int:
    """A port of this machine that nobody listens on just now.

    Outside of the range that the kernel itself takes ports from, as far as there is room: of
    those, any program's connection may take it before it is used.
    """
    ports = range(*_KERNEL_PORTS)
    if _PORT_RANGE.is_file():
        first, last = map(int, _PORT_RANGE.read_text().split())
        ports = range(first, last + 1)
    others = [port for port in range(_FIRST_PORT, 2**16) if port not in ports]
    draw = random.SystemRandom()  # programs that begin from one seed do not take the same
    for port in [*draw.sample(others, min(len(others), 64)), 0]:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(('', port))
            return one.getsockname()[1]
    raise OSError('there is no free port on this machine')


def _read_slurm(env: Mapping[str, str]) -> Launch:
    # SLURM_NTASKS and SLURM_PROCID exist in a batch script, too, where only one process runs.
    world_size = _number(env, 'SLURM_STEP_NUM_TASKS', 'slurm')
    job, step = _number(env, 'SLURM_JOB_ID', 'slurm'), _number(env, 'SLURM_STEP_ID', 'slurm')
    address = env.get('MASTER_ADDR')
    if not address and env.get('SLURM_STEP_NUM_NODES') == '1':
        address = '127.0.0.1'
    return Launch(
        rank=_number(env, 'SLURM_PROCID', 'slurm'),
        world_size=world_size,
        local_rank=_gpu_index(env, _number(env, 'SLURM_LOCALID', 'slurm')),
        master_addr=address or _slurm_address(first_host(env.get('SLURM_STEP_NODELIST', ''))),
        master_port=int(env.get('MASTER_PORT') or _port(f'{job}.{step}')),
    )


def _slurm_address(node: str) -> str:
    """Where a node can be reached: its name or, if that means nothing here, what slurm dials."""
    if _resolves(node):
        return node
    shown = ''
    try:
        shown = subprocess.run(
            ['scontrol', 'show', 'node', node, '--oneliner'],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        pass  # reported below, with the way out
    for key in ('NodeAddr', 'NodeHostName'):
        match = re.search(rf'\b{key}=(\S+)', shown)
        if match and _resolves(match[1]):
            return match[1]
    raise ValueError(
        f'--launcher slurm: the first node, {node!r}, has no address here; '
        'export MASTER_ADDR=HOST_OF_RANK_0 before srun'
    )


def _read_mpi(env: Mapping[str, str]) -> Launch:
    keys = next((keys for keys in _MPI_KEYS.values() if keys[0] in env), None)
    if keys is None:
        names = ' nor '.join(keys[0] for keys in _MPI_KEYS.values())
        raise NotStarted('mpi', f'neither {names} is set')
    rank_key, world_key, local_key, local_size_key = keys
    world_size = _number(env, world_key, 'mpi')
    address = env.get('MASTER_ADDR')
    if not address and _number(env, local_size_key, 'mpi') != world_size:
        raise ValueError(
            '--launcher mpi over several machines needs MASTER_ADDR, the host of rank 0: '
            'mpirun -x MASTER_ADDR=HOST ... (MPICH: -genv MASTER_ADDR HOST)'
        )
    return Launch(
        rank=_number(env, rank_key, 'mpi'),
        world_size=world_size,
        local_rank=_gpu_index(env, _number(env, local_key, 'mpi')),
        master_addr=address or '127.0.0.1',
        # Open MPI names every job; jobs of MPICH on one machine must be given ports.
        master_port=int(
            env.get('MASTER_PORT')
            or (_port(env['PMIX_NAMESPACE']) if 'PMIX_NAMESPACE' in env else 29500)
        ),
    )


def _check_alone(env: Mapping[str, str]) -> None:
    """Refuse several processes that would each train alone and overwrite each other's files."""
    for launcher, count in _started(env).items():
        if count > 1:
            raise ValueError(
                f'{count} processes were started, but launcher is none: each would train alone. '
                f'Add --launcher {launcher}'
            )


def _started(env: Mapping[str, str]) -> dict[str, int]:
    """How many processes each launcher has started, as far as it has told this one."""
    told = {
        'pytorch': env.get('WORLD_SIZE') if 'TORCHELASTIC_RUN_ID' in env else None,
        'slurm': env.get('SLURM_STEP_NUM_TASKS') if 'SLURM_PROCID' in env else None,
        'mpi': env.get('OMPI_COMM_WORLD_SIZE') or env.get('PMI_SIZE'),
    }
    return {name: int(count) for name, count in told.items() if count and count.isdigit()}


def _gpu_index(env: Mapping[str, str], local_rank: int) -> int:
    """Which of the GPUs that this process sees is its own.

    A scheduler may bind processes to GPUs (`--gpus-per-task=1`); each then sees one, its own. If
    they share one after all, NCCL says so.
    """
    visible = env.get('CUDA_VISIBLE_DEVICES', '')
    return 0 if visible and ',' not in visible else local_rank


def _port(job: str) -> int:
    """A port that all processes of a job agree on, below those that systems give to clients."""
    return 20_000 + zlib.crc32(job.encode()) % 12_000


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _number(env: Mapping[str, str], key: str, launcher: str) -> int:
    value = env.get(key)
    if value is None:
        raise NotStarted(launcher, f'{key} is not set')
    if not value.isdigit():
        raise ValueError(f'--launcher {launcher}: {key}={value!r} is not a number')
    return int(value)
