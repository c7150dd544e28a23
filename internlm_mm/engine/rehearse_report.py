"""A rehearsal as a page for a person: the map, the groups, shapes and memory."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WIDEST = 4
"""Nodes of a stage, and ranks of a memory table, that are written out before they are left out."""


def render(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: From `internlm_mm.engine.rehearse.rehearse`.
    """
    lines = [*_head(report), '', *_map(report), '', *_node(report)]
    for rank in report['ranks']:
        lines += ['', *_groups(rank)]
    lines += ['', *_shapes(report['ranks'][0]), '', *_memory(report)]
    lines.append(f'rehearsed in {report["seconds"]:.1f} s; nothing was trained')
    return '\n'.join(lines)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: '0-7', '0,8,...,1016', '1,2,7'."""
    if len(numbers) < 3:
        return ','.join(map(str, numbers))
    step = numbers[1] - numbers[0]
    even = all(b - a == step for a, b in pairwise(numbers))
    if even and step == 1:
        return f'{numbers[0]}-{numbers[-1]}'
    if even and len(numbers) > 3:
        return f'{numbers[0]},{numbers[1]},...,{numbers[-1]}'
    return ','.join(map(str, numbers))


def size(number_of_bytes: float) -> str:
    """Bytes in GiB, or in MiB where that says more."""
    gib = number_of_bytes / 2**30
    return f'{gib:.2f} GiB' if gib >= 0.1 else f'{number_of_bytes / 2**20:.2f} MiB'


def _head(report: Mapping[str, Any]) -> list[str]:
    step, how = report['step'], report['techniques']
    degrees = ', '.join(f'{axis}={degree}' for axis, degree in report['layout'].items())
    batches = _count(step['micro_batches_at_most'], 'micro-batch', 'es')
    if step['micro_batches'] != step['micro_batches_at_most']:
        batches = f'{step["micro_batches"]} to {batches}'
    share = step['rows'] // step['data_ranks']
    options = [f'compute in {how["param"]}, reduce in {how["reduce"]}', f'reshard={how["reshard"]}']
    options += [f'recompute={how["recompute"]}'] if how['recompute'] else []
    options += [f'float8 {how["float8"]}'] if how['float8'] else []
    options += ['compiled'] if how['compile'] else []
    options += ['offload'] if how['offload'] else []
    options += [how['schedule']] if how['schedule'] else []
    return [
        f'rehearsal  {_count(report["world_size"], "GPU")}: {_count(report["nodes"], "node")} of '
        f'{report["gpus_per_node"]}',
        f'model      {report["model"]["type"]}, {report["model"]["parameters"]:,} parameters',
        f'layout     {degrees}',
        f'           {"; ".join(options)}',
        *([f'recompute  {how["recompute_chosen"]}'] if how.get('recompute_chosen') else []),
        f'attention  {how["attention"]}',
        f'step       {step["rows"]} rows = {step["tokens"]:,} tokens: {batches} of '
        f'{_count(step["micro_batch_size"], "row")} on each of '
        f'{_count(step["data_ranks"], "data rank")}',
        f'           {_count(share, "row")}, {share * step["seq_len"]:,} tokens a data rank; '
        f'{step["tokens"] // report["world_size"]:,} tokens a GPU',
        f'data       {report["data"]["checked"]}; rows of {step["seq_len"]} tokens, '
        f'documents {report["data"]["documents"]}',
        *([f'start      {report["start"]}'] if report['start'] else []),
    ]


def _count(number: int, noun: str, ending: str = 's') -> str:
    return f'{number} {noun}{ending if number != 1 else ""}'


def _map(report: Mapping[str, Any]) -> list[str]:
    """Who holds which layers: a line a rank of the pipeline axis, its nodes from left to right."""
    rows = [('pipeline', 'layers', 'node: ranks')]
    for stage in report['stages']:
        parts = ['embedding'] if stage['embedding'] else []
        for layers in stage['layers'].values():
            numbers = [int(name) for name in layers if name.isdigit()]
            parts.append(ranges(numbers) if len(numbers) == len(layers) else ','.join(layers))
        parts += ['norm, head'] if stage['head'] else []
        cells = _cells(stage['first_rank'], stage['num_ranks'], report['gpus_per_node'])
        if len(cells) > WIDEST:
            cells = [*cells[: WIDEST - 2], '...', cells[-1]]
        rows.append((str(stage['pipeline_rank']), ' | '.join(parts), '   '.join(cells)))
    return ['who holds what', *_table(rows)]


def _cells(first: int, count: int, per_node: int) -> list[str]:
    """Neighbouring ranks by node: ['0: 0-7', '1: 8-15', ...]."""
    end, cells = first + count, []
    for node in range(first // per_node, (end - 1) // per_node + 1):
        inside = range(max(first, node * per_node), min(end, (node + 1) * per_node))
        cells.append(f'{node}: {ranges(inside)}')
    return cells


def _node(report: Mapping[str, Any]) -> list[str]:
    """The GPUs of the first node, and where each stands on the axes."""
    layout, per_node = report['layout'], report['gpus_per_node']
    rows: list[tuple[str, ...]] = [('GPU', *(str(gpu) for gpu in range(per_node)))]
    inner = 1
    for axis in reversed(layout):
        degree = layout[axis]
        if degree > 1:
            rows.append((axis, *(str(gpu // inner % degree) for gpu in range(per_node))))
        inner *= degree
    return ['inside node 0', *_table([rows[0], *reversed(rows[1:])])]


def _groups(rank: Mapping[str, Any]) -> list[str]:
    place = ', '.join(f'{axis} {number}' for axis, number in rank['coordinate'].items())
    rows = []
    for kind, group in rank['groups'].items():
        if len(group['ranks']) > 1:
            where = 'inside the node' if group['inside_node'] else 'across nodes'
            rows.append((kind, str(len(group['ranks'])), ranges(group['ranks']), where))
    title = f'rank {rank["rank"]}: node {rank["node"]}, GPU {rank["gpu"]}; {place}'
    counted = rank['parameters']
    held = (
        f"  holds {counted['here']:,} of its stage's {counted['of']:,} parameters, "
        f'{size(counted["bytes"])} of masters'
    )
    return [title, held, *(_table(rows) if rows else ['  in no group but the whole'])]


def _shapes(rank: Mapping[str, Any]) -> list[str]:
    """Parameters of a rank; layers that are alike share a line."""
    alike: dict[tuple, list[str]] = {}
    for shape in rank['shapes']:
        first, _, rest = shape['name'].partition('.')
        layer, _, inside = rest.partition('.')
        is_layer = first == 'layers' and layer.isdigit()
        name = f'layers.*.{inside}' if is_layer else shape['name']
        key = (name, tuple(shape['global']), tuple(shape['local']), ', '.join(shape['cut']))
        alike.setdefault(key, []).append(layer if is_layer else '')
    rows: list[tuple[str, ...]] = [('parameter', 'layers', 'whole', 'here', 'cut along')]
    for (name, whole, local, cut), layers in alike.items():
        numbers = [int(layer) for layer in layers if layer]
        rows.append((name, ranges(numbers), _by(whole), _by(local), cut or '-'))
    return [f'parameters of rank {rank["rank"]}', *_table(rows)]


def _memory(report: Mapping[str, Any]) -> list[str]:
    known = [rank for rank in report['ranks'] if rank['memory']]
    if not known:
        return [
            'memory     not reckoned: the planner knows decoders by their sizes, and '
            f'{report["model"]["type"]} has others, or other parameters'
        ]
    left_out = len(known) - WIDEST
    if left_out > 0:
        known = [*known[: WIDEST - 1], known[-1]]
    kinds = known[0]['memory']['kinds']
    rows: list[tuple[str, ...]] = [('', *(f'rank {rank["rank"]}' for rank in known))]
    peaks = [rank['memory']['moments'][rank['memory']['peak_moment']] for rank in known]
    for kind in kinds:
        rows.append(
            (
                kind.replace('_', ' '),
                *(
                    f'{size(rank["memory"]["kinds"][kind])} ({peak[kind] / 2**30:.2f})'
                    for rank, peak in zip(known, peaks, strict=True)
                ),
            )
        )
    rows.append(('fullest', *(rank['memory']['peak_moment'] for rank in known)))
    rows.append(('then in all', *(size(rank['memory']['peak']) for rank in known)))
    if any(rank['memory']['host'] for rank in known):
        rows.append(('host memory', *(size(rank['memory']['host']) for rank in known)))
    more = [f'  {left_out} more ranks were rehearsed: --rehearse-json has all'] * (left_out > 0)
    return [
        'memory, the most of each kind (and in GiB when the rank is fullest)',
        *_table(rows),
        *more,
        '  Tensors only: what CUDA and NCCL take for themselves comes on top.',
    ]


def _by(shape: Sequence[int]) -> str:
    return ' x '.join(map(str, shape))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '
        + '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
