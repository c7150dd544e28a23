"""How much memory the processes of this machine can have."""

from pathlib import Path

_LIMITS = ('sys/fs/cgroup/memory.max', 'sys/fs/cgroup/memory/memory.limit_in_bytes')
"""What a container is given: cgroup 2 and 1."""


def total_memory(root: Path = Path('/')) -> int | None:
    """Memory and swap of this machine, or of the container that it runs in, in bytes.

    Args:
        root: Where Linux's files lie.

    Returns:
        None where the system does not say.
    """
    told = _meminfo(root)
    if not told:
        return None
    memory = told['MemTotal']
    for name in _LIMITS:
        try:
            limit = (root / name).read_text(encoding='utf-8').strip()
        except OSError:
            continue
        if limit.isdigit():  # 'max' is none
            memory = min(memory, int(limit))
    return memory + told.get('SwapTotal', 0)


def available_memory(root: Path = Path('/')) -> int | None:
    """Bytes that programs can still have here without swapping, or that this container can have.

    Args:
        root: Where Linux's files lie.

    Returns:
        None where the system does not say.
    """
    whole = total_memory(root)
    return None if whole is None else min(whole, _meminfo(root).get('MemAvailable', whole))


def _meminfo(root: Path) -> dict[str, int]:
    """In bytes, but for what is counted in pages; nothing where there is no such file."""
    try:
        lines = (root / 'proc/meminfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return {}
    parts = (line.partition(':') for line in lines)
    return {key: int(number.split()[0]) * 1024 for key, _, number in parts}
