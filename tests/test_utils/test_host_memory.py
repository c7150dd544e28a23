import os
from pathlib import Path

import pytest

from internlm_mm.utils.host_memory import _LIMITS, available_memory, total_memory

MEMINFO = 'MemTotal:       1000 kB\nMemFree:  10 kB\nSwapTotal:  24 kB\nHugePages_Total:       0\n'


def machine(folder: Path, **files: str) -> Path:
    names = {
        'meminfo': 'proc/meminfo',
        'two': 'sys/fs/cgroup/memory.max',
        'one': 'sys/fs/cgroup/memory/memory.limit_in_bytes',
    }
    for key, text in files.items():
        path = folder / names[key]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({}, 1024 * 1024),
        ({'two': 'max\n'}, 1024 * 1024),
        ({'two': '4096\n'}, 4096 + 24 * 1024),
        ({'one': '8192\n'}, 8192 + 24 * 1024),
        ({'one': '9223372036854771712\n'}, 1024 * 1024),
    ],
)
def test_the_machine_or_its_container(tmp_path: Path, files: dict, expected: int) -> None:
    assert total_memory(machine(tmp_path, meminfo=MEMINFO, **files)) == expected


def test_memory_that_is_left(tmp_path: Path) -> None:
    assert available_memory(tmp_path / 'none') is None
    left = 'MemTotal: 8000 kB\nMemAvailable: 3000 kB\nSwapTotal: 0 kB\n'
    assert available_memory(machine(tmp_path, meminfo=left)) == 3000 * 1024
    assert available_memory(machine(tmp_path, two='2048000\n')) == 2000 * 1024  # of a container
    assert (available_memory() or 1) > 0


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert total_memory(tmp_path) is None


@pytest.mark.skipif(not Path('/proc/meminfo').exists(), reason='needs Linux')
def test_this_machine() -> None:
    found = total_memory()
    installed = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    assert found is not None and 2**28 < found
    if not any(Path('/', name).exists() for name in _LIMITS):
        assert found >= installed
