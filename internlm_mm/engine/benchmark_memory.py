"""What fills memory while steps are measured: as the planner reckons, beside what was measured."""

import copy
import resource
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config

from internlm_mm.engine.benchmark_report import most_of_ranks
from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_report import size
from internlm_mm.parallel.mesh import Layout


def host_memory(device: torch.device) -> dict[str, int]:
    """Most bytes of host memory so far, of the rank that has most. Collective.

    Returns:
        `host_resident_bytes`: resident in the process; `host_pinned_bytes` on a GPU: page-locked,
        as torch asked the driver for it, in blocks that it may have rounded up. Drivers count some
        of it as resident and some not.
    """
    # Linux counts in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {'host_resident_bytes': most_of_ranks(resident)}
    if device.type == 'cuda':
        stats = torch.cuda.host_memory_stats()
        found['host_pinned_bytes'] = most_of_ranks(int(stats.get('allocated_bytes.peak', 0)))
    return found


def reckon_memory(config: Config, layout: Layout) -> dict[str, Any]:
    """What the planner expects of the fullest rank; needs that the process is in no group.

    Args:
        config: Of the run.
        layout: Of the run.

    Returns:
        `rank`, `moment` at which it is fullest, `kinds` of bytes on the device then, `bytes` in
        all and `host_bytes`. Only `unknown`, with the reason, where the planner does not know the
        model or the run cannot be rehearsed: what was measured is worth more than this.
    """
    config = copy.deepcopy(config)
    config.setdefault('strategy', {})
    config.strategy.parallel = layout.as_dict()
    try:
        ranks = rehearse(config, layout.world_size, layout.world_size)['ranks']
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {'unknown': str(error)}
    known = [(rank['rank'], rank['memory']) for rank in ranks if rank['memory']]
    if not known:
        return {'unknown': 'the planner knows decoders by their sizes, and not this model'}
    rank, memory = max(known, key=lambda one: one[1]['peak'])
    return {
        'rank': rank,
        'moment': memory['peak_moment'],
        'kinds': dict(memory['moments'][memory['peak_moment']]),
        'bytes': memory['peak'],
        'host_bytes': memory['host'],
    }


def render_memory(report: Mapping[str, Any]) -> str:
    """The waterfall as lines for a person.

    Args:
        report: With `memory`, from `reckon_memory`, and what was measured.
    """
    found = report['memory']
    if 'unknown' in found:
        return f'what fills memory was not reckoned: {found["unknown"]}'
    whole = max(found['bytes'], 1)
    lines = [f'what fills memory, as the planner reckons: rank {found["rank"]}, {found["moment"]}']
    for kind, held in found['kinds'].items():
        if held:
            bar = '#' * round(40 * held / whole)
            name = kind.replace('_', ' ')
            lines.append(f'  {name:<22}{size(held):>15} {held / whole:>7.1%}  {bar}'.rstrip())
    lines.append(f'  {"in all":<22}{size(found["bytes"]):>15}')
    if report['device_type'] == 'cuda':
        measured = report['peak_memory_bytes']
        lines.append(
            f'  {"measured":<22}{size(measured):>15} {measured / whole - 1:>+7.1%}; '
            f'{size(report["reserved_memory_bytes"])} taken from the GPU'
        )
    if found['host_bytes']:
        lines.append(f'  {"host memory":<22}{size(found["host_bytes"]):>15}')
    host = f'{size(report["host_resident_bytes"])} resident in the process'
    if 'host_pinned_bytes' in report:
        host += f', {size(report["host_pinned_bytes"])} page-locked'
    lines.append(f'  host memory, measured: {host}')
    return '\n'.join(lines)
