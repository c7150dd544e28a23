"""The wheel, installed elsewhere, runs without the repository; so does an editable installation."""

import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_mm.__main__ import commands

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
ALONE = {'PATH': '/usr/bin:/bin'}  # no PYTHONPATH: what is imported is what was installed
OUTSIDE = """\
from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm_7b_pretrain import *

model.update(num_layers=3)
"""


def pip(*arguments: object) -> None:
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q', *arguments]
    subprocess.run(
        [str(part) for part in command], env=ALONE | {'HOME': str(Path.home())}, check=True
    )


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp('sources')
    listed = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard'],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


@pytest.fixture(scope='module')
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-deps', '--no-build-isolation', '-w', folder, sources)
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make virtual environments that see our packages but not our checkout."""

    def make(*install: object) -> Path:
        folder = tmp_path_factory.mktemp('venv')
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
        site = next(folder.glob('lib/python*/site-packages'))
        # A plain path line does not run the .pth files in there, ours of the checkout included.
        (site / 'shared.pth').write_text(sysconfig.get_path('purelib') + '\n')
        python = folder / 'bin' / 'python'
        pip('--python', python, 'install', '--no-deps', '--no-build-isolation', *install)
        return python

    return make


def run(python: Path, folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [python, '-m', 'internlm_mm', *arguments],
        cwd=folder,
        env=ALONE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def check_works(python: Path, folder: Path) -> None:
    assert 'print_config' in run(python, folder)
    assert "type='internlm_mm.models.InternLM'" in run(
        python, folder, 'print_config', 'internlm_7b_pretrain'
    )
    (folder / 'mine.py').write_text(OUTSIDE)
    assert 'num_layers=3' in run(python, folder, 'print_config', 'mine.py')
    explained = run(python, folder, 'print_config', 'mine.py', '--explain', 'model.num_layers')
    assert 'internlm_7b.py' in explained and 'mine.py:6' in explained


def test_the_wheel_carries_everything(wheel: Path, sources: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f'internlm_mm/{file}'
        for folder in ('configs', 'tools')
        for file in (
            path.relative_to(sources).as_posix() for path in (sources / folder).rglob('*.py')
        )
    }
    expected |= {p.relative_to(sources).as_posix() for p in (sources / 'internlm_mm').rglob('*.py')}
    assert expected <= names
    others = {name for name in names - expected if '.dist-info/' not in name}
    assert not others, 'nothing but the package'
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_the_wheel_works_outside_the_repository(
    wheel: Path, environment: Callable[..., Path], tmp_path: Path
) -> None:
    python = environment(wheel)
    where = 'import internlm_mm; print(internlm_mm.__file__)'
    printed = subprocess.run(
        [python, '-c', where], cwd=tmp_path, env=ALONE, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(str(python.parents[1]))
    check_works(python, tmp_path)
    for name in commands():
        assert run(python, tmp_path, name, '--help').startswith('usage: ')


def test_an_editable_installation_works(
    sources: Path, environment: Callable[..., Path], tmp_path: Path
) -> None:
    check_works(environment('-e', sources), tmp_path)
