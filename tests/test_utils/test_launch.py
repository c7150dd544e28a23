"""Launchers, by the variables that they really set (Open MPI 4.1, MPICH 4.0, slurm 22.05)."""

import random
import socket
import subprocess
from pathlib import Path

import pytest

from internlm_mm.utils import launch
from internlm_mm.utils.launch import (
    Launch,
    enter_launch,
    first_host,
    free_port,
    guess_launch,
    host_name,
    let_gpu_memory_grow,
    ranks_here,
    read_launch,
    settings,
)

TORCHRUN = {
    'RANK': '3',
    'LOCAL_RANK': '1',
    'GROUP_RANK': '1',
    'WORLD_SIZE': '4',
    'LOCAL_WORLD_SIZE': '2',
    'MASTER_ADDR': 'gpu07',
    'MASTER_PORT': '41879',
    'TORCHELASTIC_RUN_ID': 'none',
}
SRUN = {  # the second task of `srun -N 2 -n 2`
    'SLURMD_NODENAME': 'node2',
    'SLURM_GTIDS': '1',
    'SLURM_JOB_ID': '17',
    'SLURM_JOB_NODELIST': 'node[1-2]',
    'SLURM_LAUNCH_NODE_IPADDR': '127.0.0.1',
    'SLURM_LOCALID': '0',
    'SLURM_NODEID': '1',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_STEPID': '0',
    'SLURM_STEP_ID': '0',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_STEP_NUM_NODES': '2',
    'SLURM_STEP_NUM_TASKS': '2',
    'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
}
SBATCH = {  # inside the script of `sbatch -N 2 -n 4`, without srun
    'SLURMD_NODENAME': 'node1',
    'SLURM_JOB_ID': '17',
    'SLURM_JOB_NODELIST': 'node[1-2]',
    'SLURM_LOCALID': '0',
    'SLURM_NODEID': '0',
    'SLURM_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '0',
    'SLURM_TASKS_PER_NODE': '3,1',
}
OPEN_MPI = {
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
    'OMPI_COMM_WORLD_NODE_RANK': '1',
    'OMPI_COMM_WORLD_RANK': '1',
    'OMPI_COMM_WORLD_SIZE': '2',
    'PMIX_NAMESPACE': '1607204865',
    'PMIX_RANK': '1',
}
MPICH = {'MPI_LOCALNRANKS': '2', 'MPI_LOCALRANKID': '1', 'PMI_RANK': '1', 'PMI_SIZE': '2'}


@pytest.fixture
def resolvable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of hosts that mean something; add to it."""
    names: set[str] = set()
    monkeypatch.setattr(launch, '_resolves', names.__contains__)
    return names


def scontrol(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def show(command: list[str], **options: object) -> subprocess.CompletedProcess:
        assert command == ['scontrol', 'show', 'node', 'node1', '--oneliner']
        return subprocess.CompletedProcess(command, 0, text)

    monkeypatch.setattr(subprocess, 'run', show)


def test_one_process() -> None:
    assert read_launch('none', {}) == Launch(0, 1, 0)


def test_torchrun() -> None:
    assert read_launch('pytorch', TORCHRUN) == Launch(3, 4, 1, 'gpu07', 41879)


@pytest.mark.parametrize(('told', 'found'), [('8', 8), ('', None), ('many', None)])
def test_processes_of_this_machine(told: str, found: int | None) -> None:
    assert ranks_here({'LOCAL_WORLD_SIZE': told}) == found
    assert ranks_here({}) is None


def test_slurm(resolvable: set[str]) -> None:
    resolvable.add('node1')
    found = read_launch('slurm', SRUN)
    assert (found.rank, found.world_size, found.local_rank) == (1, 2, 0)
    assert found.master_addr == 'node1'
    assert 20_000 <= found.master_port < 32_000
    # All tasks of a step agree; two steps of a job do not meet by mistake.
    assert read_launch('slurm', SRUN | {'SLURM_PROCID': '0'}).master_port == found.master_port
    assert read_launch('slurm', SRUN | {'SLURM_STEP_ID': '1'}).master_port != found.master_port


def test_slurm_on_one_node_needs_no_name(resolvable: set[str]) -> None:
    one = {'SLURM_STEP_NUM_NODES': '1', 'SLURM_STEP_NODELIST': 'node1', 'SLURM_LOCALID': '1'}
    found = read_launch('slurm', SRUN | one)
    assert (found.master_addr, found.local_rank) == ('127.0.0.1', 1)


def test_slurm_names_that_are_no_hosts(
    resolvable: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol(monkeypatch, 'NodeName=node1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=box7 Port=1')
    resolvable.add('10.0.0.7')
    assert read_launch('slurm', SRUN).master_addr == '10.0.0.7'
    scontrol(monkeypatch, 'NodeName=node1 NodeAddr=node1 NodeHostName=box7 Version=22.05.8')
    resolvable.add('box7')
    assert read_launch('slurm', SRUN).master_addr == 'box7'
    scontrol(monkeypatch, '')
    with pytest.raises(ValueError, match=r"'node1', has no address here; export MASTER_ADDR"):
        read_launch('slurm', SRUN)
    assert read_launch('slurm', SRUN | {'MASTER_ADDR': 'box'}).master_addr == 'box'


def test_slurm_without_scontrol(resolvable: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ValueError, match='MASTER_ADDR'):
        read_launch('slurm', SRUN)


def test_a_batch_script_is_no_task() -> None:
    with pytest.raises(ValueError, match=r'SLURM_STEP_NUM_TASKS is not set. Start with: srun'):
        read_launch('slurm', SBATCH)
    assert read_launch('none', SBATCH) == Launch()  # one process, started by hand in the job


@pytest.mark.parametrize('env', [OPEN_MPI, MPICH], ids=['Open MPI', 'MPICH'])
def test_mpi(env: dict[str, str]) -> None:
    found = read_launch('mpi', env)
    assert (found.rank, found.world_size, found.local_rank) == (1, 2, 1)
    assert found.master_addr == '127.0.0.1'
    assert read_launch('mpi', env | {'MASTER_PORT': '4711'}).master_port == 4711


def test_two_jobs_of_open_mpi_take_two_ports() -> None:
    ports = {
        read_launch('mpi', OPEN_MPI | {'PMIX_NAMESPACE': f'{job}'}).master_port for job in (1, 2)
    }
    assert len(ports) == 2


@pytest.mark.parametrize('env', [OPEN_MPI, MPICH], ids=['Open MPI', 'MPICH'])
def test_mpi_over_machines_must_be_told_the_first(env: dict[str, str]) -> None:
    size = 'OMPI_COMM_WORLD_LOCAL_SIZE' if 'PMIX_RANK' in env else 'MPI_LOCALNRANKS'
    with pytest.raises(ValueError, match='MASTER_ADDR'):
        read_launch('mpi', env | {size: '1'})
    assert read_launch('mpi', env | {size: '1', 'MASTER_ADDR': 'box'}).master_addr == 'box'


@pytest.mark.parametrize(
    ('visible', 'gpu'), [('0', 0), ('GPU-8f7c', 0), ('0,1', 1), ('', 1), (None, 1)]
)
def test_a_task_that_sees_one_gpu_takes_it(visible: str | None, gpu: int) -> None:
    env = MPICH if visible is None else MPICH | {'CUDA_VISIBLE_DEVICES': visible}
    assert read_launch('mpi', env).local_rank == gpu


@pytest.mark.parametrize(
    ('env', 'launcher'),
    [(TORCHRUN, 'pytorch'), (SRUN, 'slurm'), (OPEN_MPI, 'mpi'), (MPICH, 'mpi')],
)
def test_processes_that_would_not_know_each_other_are_refused(
    env: dict[str, str], launcher: str
) -> None:
    with pytest.raises(ValueError, match=f'each would train alone. Add --launcher {launcher}'):
        read_launch('none', env)


@pytest.mark.parametrize(
    ('env', 'launcher'),
    [(TORCHRUN, 'pytorch'), (SRUN, 'slurm'), (OPEN_MPI, 'mpi'), (MPICH, 'mpi')],
)
def test_a_place_is_known_before_the_launcher_is(
    env: dict[str, str], launcher: str, resolvable: set[str]
) -> None:
    resolvable.add('node1')
    assert guess_launch(env) == (read_launch(launcher, env), False)
    assert guess_launch(env | {'TORCHELASTIC_USE_AGENT_STORE': 'True'})[1]


def test_who_tells_no_place_is_alone(resolvable: set[str]) -> None:
    by_hand = {key: TORCHRUN[key] for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT')}
    assert guess_launch(by_hand) == (Launch(3, 4, 1, '127.0.0.1', 41879), False)
    for env in ({}, SBATCH, TORCHRUN | {'WORLD_SIZE': '1', 'RANK': '0'}, {'RANK': '3'}):
        found, has_store = guess_launch(env)
        assert found.world_size == 1 and found.rank == 0 and not has_store
    assert guess_launch(SRUN) == (Launch(), False)  # whose first node has no address here


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_a_launcher_that_did_not_launch(launcher: str) -> None:
    with pytest.raises(ValueError, match=f'--launcher {launcher}: .* set. Start with: '):
        read_launch(launcher, {})


def test_nonsense() -> None:
    with pytest.raises(ValueError, match=r"RANK='x' is not a number"):
        read_launch('pytorch', TORCHRUN | {'RANK': 'x'})
    with pytest.raises(ValueError, match=r"'slrum' is unknown. Did you mean 'slurm'\?"):
        read_launch('slrum', {})
    with pytest.raises(ValueError, match='is not a list of hosts'):
        first_host('')


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('node1', 'node1'),
        ('node1,node2', 'node1'),
        ('node[1-2]', 'node1'),
        ('gpu[07-09,12],login1', 'gpu07'),
        ('gpu[12,07-09]', 'gpu12'),
        ('login1,gpu[07-09]', 'login1'),
        ('rack[1-2]-n[03-04]', 'rack1-n03'),
        ('a100-[001-064].cluster.example', 'a100-001.cluster.example'),
        ('127.0.0.1', '127.0.0.1'),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize('gpus', [2, 0])
def test_enter_launch_is_read_back(monkeypatch, gpus: int) -> None:
    environment = {'CUDA_VISIBLE_DEVICES': '0,1'}
    monkeypatch.setattr(launch.os, 'environ', environment)
    place = Launch(rank=3, world_size=4, local_rank=1, master_addr='gpu07', master_port=41879)
    enter_launch(place, gpus)
    assert read_launch('pytorch') == place
    assert environment['CUDA_VISIBLE_DEVICES'] == ('0,1' if gpus else '')


def test_more_processes_than_gpus_share_them(monkeypatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(launch.os, 'environ', environment)
    hosts = []
    for rank in range(4):
        environment.pop('NCCL_HOSTID', None)
        enter_launch(Launch(rank=rank, world_size=4, local_rank=rank), 2)
        assert read_launch('pytorch').local_rank == rank % 2
        hosts.append(environment.get('NCCL_HOSTID'))
    # Two ranks on a GPU have hosts of different names, as NCCL sees them.
    assert hosts[:2] == [None, None]
    assert hosts[2] == hosts[3] is not None


def test_host_name() -> None:
    assert host_name()


def test_nobody_listens_on_a_free_port() -> None:
    with socket.socket() as one:
        one.bind(('127.0.0.1', free_port()))


def test_free_ports_are_not_those_that_connections_take(monkeypatch, tmp_path: Path) -> None:
    first, last = map(int, Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split())
    random.seed(0)
    found = [free_port() for _ in range(20)]
    random.seed(0)
    assert [free_port() for _ in range(20)] != found  # whatever the seed
    assert all(10_000 <= port < 2**16 for port in found)
    if last - first < 40_000:
        assert not any(first <= port <= last for port in found)
    told = tmp_path / 'range'
    monkeypatch.setattr('internlm_mm.utils.launch._PORT_RANGE', told)
    assert not 32_768 <= free_port() <= 60_999  # where nothing tells
    told.write_text('1024\t65535\n')
    assert free_port() > 1023  # there are no others


def test_a_port_that_is_taken_is_passed_over(monkeypatch) -> None:
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        taken, ports = one.getsockname()[1], []

        class Draw:
            def sample(self, others: list[int], count: int) -> list[int]:
                ports.extend([taken, others[0]])
                return ports

        monkeypatch.setattr('random.SystemRandom', Draw)
        assert free_port() != taken and ports[0] == taken


def test_settings_of_a_job() -> None:
    env = {'NCCL_DEBUG': 'INFO', 'PATH': '/bin', 'OMP_NUM_THREADS': '4', 'API_KEY': 'secret'}
    assert settings(env) == {'NCCL_DEBUG': 'INFO', 'OMP_NUM_THREADS': '4'}


ALLOCATOR = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_HIP_ALLOC_CONF')


@pytest.mark.parametrize('key', [None, *ALLOCATOR])
@pytest.mark.parametrize('value', ['max_split_size_mb:512', ''])
def test_the_allocator_is_as_the_user_says(
    monkeypatch: pytest.MonkeyPatch, key: str | None, value: str
) -> None:
    for one in ALLOCATOR:
        monkeypatch.delenv(one, raising=False)
    if key is not None:
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(launch.os, 'environ', dict(launch.os.environ))
    let_gpu_memory_grow()
    found = {one: launch.os.environ[one] for one in ALLOCATOR if one in launch.os.environ}
    told = {'PYTORCH_ALLOC_CONF': 'expandable_segments:True'} if key is None else {key: value}
    assert found == told
