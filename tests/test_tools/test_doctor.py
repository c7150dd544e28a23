import json
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_mm.__main__ import main, tools_folder


def test_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(['doctor', '--no-rates', '--json'])
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report['problems'] else 0)
    assert report['attention']['sdpa']['packed'] == {'works': True}
    assert report['rates'] == {}
    main(['doctor', '--no-rates'])
    shown = capsys.readouterr().out.splitlines()
    for heading in ('devices', 'versions', 'problems'):
        assert heading in shown
    assert any(line.startswith('attention in ') for line in shown)


def test_a_launcher_that_started_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('RANK', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_RANK', 'PMI_RANK'):
        monkeypatch.delenv(name, raising=False)
    for launcher, message in (
        ('pytorch', 'RANK is not set. Start with: torchrun --nproc-per-node N tools/doctor.py --'),
        ('slurm', 'SLURM_STEP_NUM_TASKS is not set. Start with: srun python tools/doctor.py --'),
        ('mpi', 'PMI_RANK is set. Start with: mpirun -n N python tools/doctor.py --launcher mpi'),
    ):
        assert main(['doctor', '--launcher', launcher]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f'error: --launcher {launcher}: ') and message in told


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
    command += ['--standalone', str(tools_folder() / 'doctor.py')]
    command += ['--launcher', 'pytorch', '--quick', '--json']
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    (line,) = (line for line in run.stdout.splitlines() if line.startswith('{'))
    report = json.loads(line)
    assert report['ranks'] == 2 and report['rates']['all_reduce'] > 0
