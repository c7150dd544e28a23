"""How much memory the processes of this machine can have."""

from pathlib import Path

_LIMITS = ('sys/fs/cgroup/memory.max', 'sys/fs/cgroup/memory/memory.limit_in_bytes')
"""What a container is given: cgroup 2 and 1."""


def host_memory(root: Path = Path('/')) -> int | None:
    """Memory and swap of this machine, or of the container that it runs in, in bytes.

    Args:
        root: Where Linux's files lie.

    Returns:
        None where the system does not say.
    """
    try:
        lines = (root / 'proc/meminfo').read_text().splitlines()
    except OSError:
        return None
    kilobytes = {key: int(rest.split()[0]) for key, _, rest in (x.partition(':') for x in lines)}
    memory = kilobytes['MemTotal'] * 1024
    for name in _LIMITS:
        try:
            limit = (root / name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():  # 'max' is none
            memory = min(memory, int(limit))
    return memory + kilobytes.get('SwapTotal', 0) * 1024
