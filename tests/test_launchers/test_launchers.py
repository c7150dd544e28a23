"""The same run through every launcher, for real: two processes give the losses of one."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm_mm.utils.launch import free_port
from tests.runs import FAULTY, REPOSITORY, train
from tests.test_launchers.local_slurm import LocalSlurm, missing_programs

TRAIN = [sys.executable, str(REPOSITORY / 'tools' / 'train.py'), str(FAULTY)]
# Sums over ranks are rounded in another order than over micro-batches.
TOLERANCE = 1e-5

needs_mpi = pytest.mark.skipif(
    shutil.which('mpirun') is None, reason='mpirun is not installed (Debian: openmpi-bin)'
)
needs_slurm = pytest.mark.skipif(
    bool(missing_programs()),
    reason=f'not installed: {", ".join(missing_programs())} (Debian: slurm-wlm munge)',
)


def trace(work_dir: Path) -> list[list[float]]:
    """Step, loss, gradient norm and learning rate of every step, by rank 0."""
    lines = (line.split()[:4] for line in (work_dir / 'trace_0.txt').read_text().splitlines())
    return [[int(step), *map(float.fromhex, numbers)] for step, *numbers in lines]


@pytest.fixture(scope='session')
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    folder = tmp_path_factory.mktemp('one_process')
    code, text = train([FAULTY, '--work-dir', folder / 'work'], folder / 'log')
    assert code == 0, text
    return trace(folder / 'work')


def assert_same_losses(work_dir: Path, expected: list[list[float]]) -> None:
    found = trace(work_dir)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(lambda a, b: math.isclose(a, b, rel_tol=TOLERANCE), ours, theirs))
    assert (work_dir / 'trace_1.txt').exists()


def run(*command: object, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'MASTER_PORT': str(free_port())}
    options = {'env': environment, 'timeout': 120, 'cwd': REPOSITORY} | options
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone')
    return run(*launcher, '--nproc-per-node=2', *TRAIN[1:], '--launcher=pytorch', *arguments)


def mpirun(*arguments: object) -> subprocess.CompletedProcess:
    options = ['--allow-run-as-root', '--oversubscribe']
    version = subprocess.run(['mpirun', '--version'], capture_output=True, text=True).stdout
    return run('mpirun', *(options if 'Open MPI' in version else []), '-n', 2, *TRAIN, *arguments)


def test_torchrun(one_process: list[list[float]], tmp_path: Path) -> None:
    result = torchrun('--work-dir', tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_losses(tmp_path, one_process)


def test_torchrun_ends_when_one_rank_crashes(tmp_path: Path) -> None:
    fault = ['custom_hooks.1.kind=raise', 'custom_hooks.1.rank=1', 'custom_hooks.1.step=2']
    slow = 'env_cfg.dist_cfg.timeout=1800'  # far longer than `run` waits
    result = torchrun('--work-dir', tmp_path, '--cfg-options', *fault, slow)
    assert result.returncode != 0
    assert 'planted on rank 1' in result.stderr


@pytest.mark.launcher
@needs_mpi
def test_mpirun(one_process: list[list[float]], tmp_path: Path) -> None:
    result = mpirun('--launcher', 'mpi', '--work-dir', tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_losses(tmp_path, one_process)


@pytest.mark.launcher
@needs_mpi
def test_mpirun_ends_when_one_rank_crashes_and_without_its_launcher(tmp_path: Path) -> None:
    fault = ['custom_hooks.1.kind=raise', 'custom_hooks.1.rank=1', 'custom_hooks.1.step=2']
    result = mpirun('--launcher', 'mpi', '--work-dir', tmp_path, '--cfg-options', *fault)
    assert result.returncode == 1
    assert 'planted on rank 1' in result.stderr
    result = mpirun('--work-dir', tmp_path / 'other')
    assert result.returncode == 2
    assert 'Add --launcher mpi' in result.stderr
    assert not (tmp_path / 'other').exists()


@pytest.fixture(scope='module')
def slurm() -> Iterator[LocalSlurm]:
    # Not under pytest's folders: names of sockets are short.
    folder = Path(tempfile.mkdtemp(prefix='imm_'))
    try:
        with LocalSlurm(folder) as running:
            running.env['OMP_NUM_THREADS'] = '1'
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.launcher
@needs_slurm
def test_srun_over_two_nodes(
    slurm: LocalSlurm, one_process: list[list[float]], tmp_path: Path
) -> None:
    command = [*TRAIN, '--launcher', 'slurm', '--work-dir', tmp_path]
    result = run('srun', '--nodes=2', '--ntasks=2', *command, env=slurm.env)
    assert result.returncode == 0, result.stderr
    assert_same_losses(tmp_path, one_process)


@pytest.mark.launcher
@needs_slurm
def test_srun_on_one_node_ends_when_one_rank_crashes(slurm: LocalSlurm, tmp_path: Path) -> None:
    fault = ['custom_hooks.1.kind=raise', 'custom_hooks.1.rank=1', 'custom_hooks.1.step=2']
    command = [*TRAIN, '--launcher', 'slurm', '--work-dir', tmp_path, '--cfg-options', *fault]
    srun = ['srun', '--kill-on-bad-exit=1', '--nodes=1', '--ntasks=2']
    result = run(*srun, *command, env=slurm.env)
    assert result.returncode == 1, result.stderr
    assert 'planted on rank 1' in result.stderr


@pytest.mark.launcher
@needs_slurm
def test_a_batch_job_that_is_told_to_stop_saves_and_goes_back_into_the_queue(
    slurm: LocalSlurm, one_process: list[list[float]], tmp_path: Path
) -> None:
    work_dir = tmp_path / 'work'
    script = [REPOSITORY / 'tools' / 'slurm_train.sh', FAULTY, '--work-dir', work_dir]
    wait = ['custom_hooks.1.kind=wait', 'custom_hooks.1.step=3', 'custom_hooks.1.delay=2']
    submitted = run(
        *('sbatch', '--parsable', '--nodes=2', '--ntasks-per-node=1', f'--output={tmp_path}/log'),
        *(*script, '--cfg-options', *wait, 'default_hooks.checkpoint.interval=100'),
        env=slurm.env | {'PYTHON': sys.executable},
    )
    job = submitted.stdout.strip()
    assert job.isdigit(), submitted.stderr

    def log() -> str:
        return (tmp_path / 'log').read_text() if (tmp_path / 'log').exists() else ''

    def state() -> str:
        return run('squeue', '--noheader', '--format=%T', f'--job={job}', env=slurm.env).stdout

    def wait_for(is_true, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, f'{state()}\n{log()}'
            time.sleep(0.2)

    wait_for((work_dir / 'waiting').exists)
    # What slurm does by itself before the time limit.
    run('scancel', '--signal=TERM', job, env=slurm.env)
    wait_for(lambda: 'goes back into the queue' in log() and 'PENDING' in state())
    assert (work_dir / 'iter_4').is_dir()
    assert not (work_dir / 'iter_8').exists()
    # Slurm lets a requeued job wait for two minutes; its credentials differ by the second.
    time.sleep(2)
    run('scontrol', 'update', f'JobId={job}', 'StartTime=now', env=slurm.env)
    wait_for(lambda: f'job {job}, start 1' in log() and (work_dir / 'iter_8').is_dir())
    wait_for(lambda: 'RUNNING' not in state() and 'COMPLETING' not in state())
    assert_same_losses(work_dir, one_process)
    assert log().count('goes back into the queue') == 1
