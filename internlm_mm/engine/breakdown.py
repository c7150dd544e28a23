"""Where a step's time goes: every moment of a profiled step belongs to one kind of work.

What a trace holds is turned into spans, each of one kind. Where several run at a time the first of
KINDS counts, so that communication is what no computation hides, and the parts sum to the whole.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.optim.hybrid_zero import NORM_AND_CLIP

STEP = 'internlm_mm.step'
DATA_WAIT = 'internlm_mm.data_wait'
OPTIMIZER = 'internlm_mm.optimizer'
"""Ranges of the host that a trace must mark; in OPTIMIZER, NORM_AND_CLIP is told apart."""

KINDS = (
    'matmul',
    'attention',
    'norm and clip',
    'optimizer',
    'elementwise',
    'exposed communication',
    'exposed host copies',
    'data wait',
    'host optimizer',
    'idle',
)
COMMUNICATION, HOST_COPIES, WAITING, HOST_OPTIMIZER, IDLE = KINDS[5:]

_Event = Mapping[str, Any]

# Kernels of torch.compile are named after all they fuse: a product's name in them means its
# neighbours, but for templates ("triton_tem").
_FUSED = re.compile(r'triton_(poi|red|per|for|unk)_')
_COMMUNICATION = re.compile(
    r'nccl|rccl|nvshmem|multimem|symm_mem|gloo|c10d|all_?gather_into|^memcpy ptop'
)
_ATTENTION = re.compile(r'flash|fmha|sdpa|attention|attn|dot_do_o|convert_dq|varlen')
_MATMUL = re.compile(
    r'gemm|gemv|cutlass|cublas|nvjet|wgmma|xmma|splitk|_scaled_mm|grouped_mm|triton_tem|triton_mm'
)
_CPU_MATMUL = re.compile(r'(^|::|_)(addmm|addbmm|baddbmm|bmm|mm|addmv|mv|dot|linear|matmul)(_|$)')
# Operators that only call others: between them it is autograd's and Python's time.
_WRAPPER = re.compile(r'^autograd::|backward\d*$|accumulategrad$')
_HOST_COPY = re.compile(r'htod|dtoh|host.*device|device.*host')


class Span(NamedTuple):
    """A stretch of time, in microseconds, and what it went into."""

    start: float
    end: float
    kind: str


def kernel_kind(name: str) -> str:
    """What a kernel or copy of a GPU is for, by its name; 'elementwise' is everything else."""
    name = name.lower()
    if _FUSED.search(name):
        return 'elementwise'
    if name.startswith('memcpy') and _HOST_COPY.search(name):
        return HOST_COPIES
    for pattern, kind in (
        (_COMMUNICATION, COMMUNICATION),
        (_ATTENTION, 'attention'),
        (_MATMUL, 'matmul'),
    ):
        if pattern.search(name):
            return kind
    return 'elementwise'


def operator_kind(name: str) -> str:
    """What an operator of the CPU does in the time in which it calls no other."""
    name = name.lower()
    if _COMMUNICATION.search(name):
        return COMMUNICATION
    if _ATTENTION.search(name):
        return 'attention'
    if _CPU_MATMUL.search(name):
        return 'matmul'
    return IDLE if _WRAPPER.search(name) else 'elementwise'


def break_down(events: Iterable[_Event]) -> dict[str, Any]:
    """The parts of the profiled steps of a Chrome trace.

    Args:
        events: `traceEvents` of torch's profiler, with the ranges STEP, DATA_WAIT and OPTIMIZER.
            Each STEP waits for the device before it ends.

    Returns:
        `steps`, how many; `step_ms`, the mean; `parts_ms`, by KINDS, which sum to it;
        `communication_ms`, exposed or not; `kernels`, on a GPU those that took most time, each with
        its kind, milliseconds and calls a step.

    Raises:
        ValueError: If no step is marked.
    """
    complete = [event for event in events if event.get('ph') == 'X']
    marked = [event for event in complete if event.get('cat') == 'user_annotation']
    steps = _ranges(marked, STEP)
    if not steps:
        raise ValueError(f'the trace has no range {STEP!r}')
    updates = _ranges(marked, OPTIMIZER)
    host = [Span(*wait, WAITING) for wait in _ranges(marked, DATA_WAIT)]
    if any(event.get('cat') == 'kernel' for event in complete):
        clips = _ranges(marked, NORM_AND_CLIP)
        spans = list(_gpu_spans(complete, updates, clips))
        host += [Span(*update, HOST_OPTIMIZER) for update in updates]
    else:
        thread = next(event['tid'] for event in marked if event['name'] == STEP)
        spans = list(_cpu_spans(complete, thread))
    parts = partition([*spans, *host], steps)
    kernels = _longest(complete, steps)
    busy = [span for span in spans if span.kind == COMMUNICATION]
    return {
        'steps': len(steps),
        'step_ms': sum(end - start for start, end in steps) / len(steps) / 1e3,
        'parts_ms': {kind: parts[kind] / len(steps) / 1e3 for kind in KINDS},
        'communication_ms': partition(busy, steps)[COMMUNICATION] / len(steps) / 1e3,
        **({'kernels': kernels} if kernels else {}),
    }


def partition(spans: Iterable[Span], windows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Time of each kind inside the windows; of kinds at a time the first in KINDS gets it all.

    Args:
        spans: In any order, overlapping or not.
        windows: Apart from each other.

    Returns:
        Microseconds by kind; 'idle' is where there is no span. They sum to the windows' length.
    """
    order = {kind: index for index, kind in enumerate(KINDS)}
    changes = [(start, 0, 1) for start, _ in windows] + [(end, 0, -1) for _, end in windows]
    for start, end, kind in spans:
        if end > start:
            changes += [(start, 1 + order[kind], 1), (end, 1 + order[kind], -1)]
    changes.sort()
    active = [0] * (1 + len(KINDS))
    totals = [0.0] * len(KINDS)
    before = 0.0
    for time, which, change in changes:
        if active[0] and time > before:
            running = next((i for i, count in enumerate(active[1:]) if count), order[IDLE])
            totals[running] += time - before
        active[which] += change
        before = time
    return dict(zip(KINDS, totals, strict=True))


def _longest(
    events: Sequence[_Event], steps: Sequence[tuple[float, float]], count: int = 40
) -> list[dict[str, Any]]:
    """The kernels of the steps that took most time, whatever ran beside them."""
    time, calls = Counter[str](), Counter[str]()
    for event in events:
        inside = any(start <= event['ts'] < end for start, end in steps)
        if event.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset') and inside:
            time[event['name']] += event['dur']
            calls[event['name']] += 1
    return [
        {
            'name': name,
            'kind': kernel_kind(name),
            'ms': spent / len(steps) / 1e3,
            'calls': calls[name] / len(steps),
        }
        for name, spent in time.most_common(count)
    ]


def _ranges(events: Iterable[_Event], name: str) -> list[tuple[float, float]]:
    return sorted((e['ts'], e['ts'] + e['dur']) for e in events if e['name'] == name)


def _gpu_spans(
    events: Sequence[_Event],
    updates: Sequence[tuple[float, float]],
    clips: Sequence[tuple[float, float]],
) -> Iterator[Span]:
    """Kernels and copies; what the host launched inside these ranges is theirs."""
    launches = {
        event['args']['correlation']: event['ts']
        for event in events
        if event.get('cat') in ('cuda_runtime', 'cuda_driver')
        and 'correlation' in event.get('args', {})
    }
    for event in events:
        if event.get('cat') not in ('kernel', 'gpu_memcpy', 'gpu_memset'):
            continue
        kind = kernel_kind(event['name'])
        launched = launches.get(event.get('args', {}).get('correlation'))
        if launched is not None and kind not in (COMMUNICATION, HOST_COPIES):
            if _inside(launched, clips):
                kind = 'norm and clip'
            elif _inside(launched, updates):
                kind = 'optimizer'
        yield Span(event['ts'], event['ts'] + event['dur'], kind)


def _inside(time: float, ranges: Sequence[tuple[float, float]]) -> bool:
    """Whether a time lies in one of several ranges, which ascend and do not overlap."""
    last = bisect_right(ranges, time, key=lambda one: one[0]) - 1
    return last >= 0 and time <= ranges[last][1]


def _cpu_spans(events: Sequence[_Event], thread: Any) -> Iterator[Span]:
    """What the thread that trains does in each moment, and other threads' communication."""
    own = []
    for event in events:
        if event.get('cat') not in ('cpu_op', 'user_annotation'):
            continue
        start, end = event['ts'], event['ts'] + event['dur']
        if event['tid'] == thread:
            own.append((start, -end, event['name'], event['cat'] == 'cpu_op'))
        elif operator_kind(event['name']) == COMMUNICATION:
            yield Span(start, end, COMMUNICATION)
    own.sort()
    outside = _Open(0.0, IDLE, None)
    stack: list[_Open] = []  # what contains this moment, outermost first
    at = 0.0
    for start, negative_end, name, is_operator in own:
        while stack and stack[-1].end <= start:
            done = stack.pop()
            yield Span(at, done.end, done.kind)
            at = max(at, done.end)
        outer = stack[-1] if stack else outside
        yield Span(at, start, outer.kind)
        at = start
        stack.append(_enter(-negative_end, name, is_operator, outer.within))
    while stack:
        done = stack.pop()
        yield Span(at, done.end, done.kind)
        at = max(at, done.end)


class _Open(NamedTuple):
    """An operator or range that has begun: its own kind, and that of all in it if it decides so."""

    end: float
    kind: str
    within: str | None


def _enter(end: float, name: str, is_operator: bool, within: str | None) -> _Open:
    if within == WAITING or name == DATA_WAIT:
        return _Open(end, WAITING, WAITING)
    if not is_operator:  # a range: what is in it are operators, and Python between them
        is_optimizer = name == OPTIMIZER or name.startswith('Optimizer.step#')
        is_graph = 'compiled' in name.lower()  # with kernels in it that tell of nothing
        kind = (within or 'elementwise') if is_graph else IDLE
        if name == NORM_AND_CLIP:
            within = 'norm and clip'
        return _Open(end, kind, 'optimizer' if is_optimizer else within)
    kind = operator_kind(name)
    if kind == COMMUNICATION:
        return _Open(end, kind, within)
    if within is None and kind == 'attention':
        within = kind  # whatever it is made of
    return _Open(end, within or kind, within)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that torch's profiler exported."""
    return json.loads(path.read_text(encoding='utf-8'))['traceEvents']


def render_breakdown(found: Mapping[str, Any]) -> str:
    """The waterfall as lines for a person, with the rest to the timed step if there is one."""
    timed = found.get('timed_step_ms')
    whole = timed or found['step_ms']
    lines = [
        f'where a step goes: {found["steps"]} profiled steps of {found["step_ms"]:,.1f} ms'
        + (f', timed without the profiler {timed:,.1f} ms' if timed else '')
    ]
    parts = dict(found['parts_ms'])
    if 'remainder_ms' in found:
        parts['remainder'] = found['remainder_ms']
    for kind, value in parts.items():
        bar = '#' * round(40 * max(value, 0) / whole)
        lines.append(f'  {kind:<22}{value:>12,.1f} ms {value / whole:>7.1%}  {bar}'.rstrip())
    if found['communication_ms']:
        hidden = 1 - parts[COMMUNICATION] / found['communication_ms']
        lines.append(
            f'  communication ran for {found["communication_ms"]:,.1f} ms, '
            f'{hidden:.1%} of it behind computation'
        )
    if 'remainder_ms' in found:
        lines.append('  remainder: the timed step less the parts, the cost of profiling')
    return '\n'.join(lines)
