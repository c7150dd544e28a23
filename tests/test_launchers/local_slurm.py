"""A whole slurm on this machine, for tests: its own munge, controller and nodes, all on 127.0.0.1.

Nothing outside one temporary folder is written, and nothing needs root. To try commands by hand:

    python tests/test_launchers/local_slurm.py srun -n 2 hostname
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DAEMONS = ('munged', 'slurmctld', 'slurmd')
PROGRAMS = ('srun', 'sbatch', 'scontrol', 'squeue')
_PATH = os.pathsep.join([os.environ.get('PATH', ''), '/usr/sbin', '/usr/local/sbin'])

_CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
ReturnToService=2
KillWait=20
InactiveLimit=0
MinJobAge=60
SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_setup_env_fail
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of slurm and munge is not installed."""
    return [name for name in (*DAEMONS, *PROGRAMS) if shutil.which(name, path=_PATH) is None]


class LocalSlurm:
    """A slurm that lives as long as the `with` block.

    Args:
        folder: Where its files go; no longer than 80 characters, or socket names do not fit.
        num_nodes: Pretended machines, called node1, node2, ..., of four CPUs each.

    Attributes:
        env: Environment in which srun, sbatch and scontrol talk to it.
    """

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder, self.num_nodes = Path(folder), num_nodes
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith('SLURM')
        } | {'SLURM_CONF': str(self.folder / 'slurm.conf'), 'PATH': _PATH}
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> 'LocalSlurm':
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self, *command: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        """Run a command that finds this slurm."""
        return subprocess.run(
            command,
            env=self.env | options.pop('env', {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )

    def stop(self) -> None:
        """End jobs and daemons."""
        if self._is_up():
            self.run('scancel', '--full', '--signal=KILL', f'--user={getpass.getuser()}')
            self.run('scancel', f'--user={getpass.getuser()}')
            deadline = time.monotonic() + 10  # steps outlive the daemons that started them
            while self.run('squeue', '--noheader').stdout and time.monotonic() < deadline:
                time.sleep(0.1)
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _start(self) -> None:
        ports = _free_ports(1 + self.num_nodes)
        host = socket.gethostname().split('.')[0]
        nodes = '\n'.join(
            f'NodeName=node{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 '
            'RealMemory=1024 State=UNKNOWN'
            for index, port in enumerate(ports[1:], start=1)
        )
        (self.folder / 'state').mkdir(parents=True)
        (self.folder / 'slurm.conf').write_text(
            _CONFIG.format(
                host=host,
                user=getpass.getuser(),
                folder=self.folder,
                controller_port=ports[0],
                nodes=nodes,
            )
        )
        (self.folder / 'cgroup.conf').write_text(
            f'CgroupPlugin={_cgroup_plugin(self.env)}\nCgroupMountpoint={self.folder}\n'
        )
        key = self.folder / 'munge.key'
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        paths = {'socket': 'munge.socket', 'key-file': key.name, 'pid-file': 'munged.pid'}
        paths |= {'log-file': 'munged.log', 'seed-file': 'munged.seed'}
        options = [f'--{option}={self.folder / name}' for option, name in paths.items()]
        self._spawn('munged', '--foreground', '--force', *options)
        self._wait('munge', lambda: (self.folder / 'munge.socket').exists())
        self._spawn('slurmctld', '-D', '-i')
        for index in range(1, self.num_nodes + 1):
            (self.folder / f'spool_node{index}').mkdir()
            self._spawn('slurmd', '-D', '-N', f'node{index}')
        self._wait('its nodes', self._is_ready)

    def _spawn(self, *command: str) -> None:
        with open(self.folder / f'{command[0]}_{len(self._processes)}.out', 'w') as output:
            self._processes.append(
                subprocess.Popen(
                    command, env=self.env, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder
                )
            )

    def _wait(self, what: str, is_true, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not is_true():
            dead = [process.args for process in self._processes if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = sorted(self.folder.glob('*.log')) + sorted(self.folder.glob('*.out'))
                text = '\n'.join(f'--- {log.name}\n{log.read_text()[-1500:]}' for log in logs)
                raise RuntimeError(f'{what} did not come up; ended: {dead}\n{text}')
            time.sleep(0.1)

    def _is_up(self) -> bool:
        return len(self._processes) > 1 and self._processes[1].poll() is None

    def _is_ready(self) -> bool:
        listed = self.run('sinfo', '--noheader', '--Node', '--format=%T')
        return listed.stdout.split() == ['idle'] * self.num_nodes


def _cgroup_plugin(env: dict[str, str]) -> str:
    """The plugin that leaves control groups alone; before 23.02 the one for version 1 does."""
    version = subprocess.run(['srun', '--version'], env=env, capture_output=True, text=True)
    release = version.stdout.split()[-1:] or ['99']
    return 'cgroup/v1' if release[0] < '23.02' else 'disabled'


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(('127.0.0.1', 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == '__main__':
    if missing := missing_programs():
        sys.exit(f'not installed: {", ".join(missing)} (Debian: apt install slurm-wlm munge)')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # tidies up, too
    with tempfile.TemporaryDirectory(prefix='slurm') as temporary:
        with LocalSlurm(Path(temporary) / 'run') as slurm:
            code = subprocess.run(sys.argv[1:] or ['sinfo', '-N', '-l'], env=slurm.env).returncode
    sys.exit(code)
