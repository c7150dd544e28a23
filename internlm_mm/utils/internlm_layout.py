"""InternLM's `parallel`, `zero1` and batch arithmetic in our terms.

Both count alike: ranks that read different rows are GPUs / (tensor x pipeline), and a step is
`micro_num x micro_bsz` rows of each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from internlm_mm.utils.config_draft import Draft
from internlm_mm.utils.suggest import did_you_mean

_TENSOR_MODES = ('mtp', 'msp', 'fsp', 'isp')
_SCHEDULES = {'1f1b': '1f1b', 'zbh1': '1f1b', 'zbv': 'zbv_zero_bubble'}


@dataclass(slots=True)
class Degrees:
    """How many ranks share what.

    Attributes:
        tensor: As in `strategy.parallel`.
        context: Likewise.
        pipeline: Likewise.
        shard: `data_shard`; -1 is all data ranks.
        replicate: `data_replicate`; -1 is as many as there are, None is 1.
        reshard: `strategy.reshard`.
        schedule: `strategy.pipeline`, or {}.
        data_ranks: Ranks that read different rows; None if nobody has said how many GPUs.
        keys: Keys that each axis comes from.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    shard: int = -1
    replicate: int | None = None
    reshard: str = 'step'
    schedule: dict[str, Any] = field(default_factory=dict)
    data_ranks: int | None = None

    @property
    def parallel(self) -> dict[str, int]:
        """`strategy.parallel`."""
        axes = dict(tensor=self.tensor, context=self.context, pipeline=self.pipeline)
        degrees = {axis: degree for axis, degree in axes.items() if degree > 1}
        degrees['data_shard'] = self.shard
        return degrees if self.replicate is None else degrees | {'data_replicate': self.replicate}


def read_degrees(draft: Draft, gpus: int | None) -> Degrees:
    """Degrees of an InternLM config.

    Args:
        draft: Of the conversion.
        gpus: Of the job, or None.

    Raises:
        ValueError: If they do not divide the GPUs, or are no degrees.
    """
    made = Degrees()
    size, size_key = _size(draft, 'parallel.tensor', 1)
    mode = draft.look('parallel.tensor.mode', 'mtp')
    if mode not in _TENSOR_MODES:
        hint = did_you_mean(mode, _TENSOR_MODES)
        raise ValueError(f'{draft.source.path}: parallel.tensor.mode={mode!r} is unknown.{hint}')
    if mode == 'isp':
        made.context = size
    else:
        made.tensor = size
    made.pipeline, pipeline_key = _size(draft, 'parallel.pipeline', 1)
    weight, weight_key = _size(draft, 'parallel.weight', 1)
    if weight > 1 and mode != 'isp':
        raise ValueError(
            f'{draft.source.path}: {weight_key}={weight} needs parallel.tensor.mode="isp"'
        )
    zero, zero_key = _size(draft, 'parallel.zero1', -1)
    exact = _shard(made, zero, weight)
    if draft.look('parallel.zero1.fsdp', False) or weight > 1:
        made.reshard = 'layer'
    elif draft.look('hybrid_zero_optimizer.overlap_sync_param', False):
        made.reshard = 'never'
    made.schedule = _schedule(draft, made.pipeline)
    if gpus is not None:
        made.data_ranks = _data_ranks(draft, made, gpus, zero, zero_key, weight)
    _explain(draft, made, (size_key, pipeline_key, weight_key, zero_key), mode, exact)
    return made


def _size(draft: Draft, key: str, default: int) -> tuple[int, str]:
    """A degree, which is a number or `dict(size=...)`, and its key."""
    name = f'{key}.size' if isinstance(draft.look(key), dict) else key
    size = draft.take(name, int, default)
    if size < 1 and key != 'parallel.zero1':
        raise ValueError(f'{draft.source.path}: {name}={size} must be at least 1')
    return size, name


def _shard(made: Degrees, zero: int, weight: int) -> bool:
    """Set how masters and optimizer state are spread; whether that is just as it was.

    Without weight parallelism k consecutive data ranks share them (k <= 0: all), and copies of
    that are as many as are left. With it they lie on `weight x zero1` ranks, tensor ranks
    included, which are context ranks here.
    """
    if zero <= 0:
        return True
    over = weight * zero
    made.replicate = -1
    made.shard = max(over // made.context, 1)
    return over % made.context == 0


def _schedule(draft: Draft, pipeline: int) -> dict[str, Any]:
    chunks = draft.take('model.num_chunks', int, 1)
    mode = str(draft.look('parallel.pipeline.mode', '1f1b')).lower()
    if mode not in _SCHEDULES:
        hint = did_you_mean(mode, _SCHEDULES)
        raise ValueError(f'{draft.source.path}: parallel.pipeline.mode={mode!r} is unknown.{hint}')
    if pipeline == 1:
        return {}
    if chunks > 1:
        return {'schedule': 'interleaved_1f1b', 'stages_per_rank': chunks}
    return {} if _SCHEDULES[mode] == '1f1b' else {'schedule': _SCHEDULES[mode]}


def _data_ranks(
    draft: Draft, made: Degrees, gpus: int, zero: int, zero_key: str, weight: int
) -> int:
    model = made.tensor * made.context * made.pipeline
    if gpus < 1 or gpus % model:
        raise ValueError(
            f'--gpus {gpus}: {draft.source.path} needs a multiple of {model} '
            f'(tensor {made.tensor * made.context} x pipeline {made.pipeline})'
        )
    ranks = gpus // model
    groups, rest = divmod(ranks * made.context, weight)  # groups among which zero1 divides
    if rest or (zero > 0 and groups % zero):
        by = f' by parallel.weight={weight}' if weight > 1 else ''
        raise ValueError(
            f'--gpus {gpus}: {zero_key}={zero} does not divide the {ranks * made.context} data '
            f'ranks{by} of {draft.source.path}'
        )
    return ranks


def _explain(
    draft: Draft, made: Degrees, keys: tuple[str, str, str, str], mode: str, exact: bool
) -> None:
    size_key, pipeline_key, weight_key, zero_key = keys
    note = '' if exact else 'context ranks share masters and optimizer state, always'
    used = (size_key, pipeline_key, zero_key)
    draft.put('strategy', 'parallel', made.parallel, *used, note=note, changed=not exact)
    axis = 'context' if mode == 'isp' else 'tensor'
    degree = made.context if mode == 'isp' else made.tensor
    extra = {
        'isp': ': keys and values are gathered where InternEvo exchanged heads',
        'mtp': '; sequences are always cut with the matrices',
    }.get(mode, '')
    text = f'strategy.parallel.{axis}={degree}{extra if degree > 1 else ""}'
    draft.say(size_key, text, 'mapped')
    draft.say('parallel.tensor.mode', text, 'mapped')
    draft.say(pipeline_key, f'strategy.parallel.pipeline={made.pipeline}', 'mapped')
    if exact:
        meaning = 'all data ranks' if made.shard < 0 else f'{made.shard} data ranks'
        share = f'masters, gradients and optimizer state over {meaning}'
        what = 'strategy.parallel.data_shard'
        draft.say(zero_key, f'{what}={made.shard}: {share}', 'mapped')
    if made.reshard != 'step':
        reasons = ['parallel.zero1.fsdp', weight_key] if made.reshard == 'layer' else []
        draft.put('strategy', 'reshard', made.reshard, *reasons)
    else:
        draft.say(weight_key, 'as here: weights are gathered once a step', 'dropped')
    draft.say('parallel.zero1.fsdp', f'strategy.reshard={made.reshard!r}', 'mapped')
    sync = {'never': 'weights are gathered right after the update'}.get(
        made.reshard, 'weights are gathered as the next step begins'
    )
    key = 'hybrid_zero_optimizer.overlap_sync_param'
    draft.say(key, f'strategy.reshard={made.reshard!r}: {sync}', 'mapped')
    chunks, pipe_mode = 'model.num_chunks', 'parallel.pipeline.mode'
    if made.schedule:
        draft.put('strategy', 'pipeline', made.schedule, chunks, pipe_mode)
    else:
        one = f'strategy.parallel.pipeline={made.pipeline}'
        draft.say(chunks, f'one stage a rank; {one}', 'dropped')
        draft.say(pipe_mode, f"schedule '1f1b'; {one}", 'dropped')


@dataclass(frozen=True, slots=True)
class Batches:
    """Rows of a step.

    Attributes:
        micro_num: Micro-batches of a data rank in the original.
        micro_bsz: Rows of one of them there.
        micro_batch_size: Rows of one of them here.
        rampup: (start, increment, interval) in micro-batches of the original, or None.
    """

    micro_num: int
    micro_bsz: int
    micro_batch_size: int
    rampup: tuple[int, int, int] | None


def read_batches(draft: Draft, made: Degrees) -> Batches:
    """Batch sizes of an InternLM config.

    Raises:
        ValueError: If a number is not positive, or a pipeline would have too few micro-batches.
    """
    path = draft.source.path
    micro_num = draft.take('data.micro_num', int, 1)
    micro_bsz = draft.take('data.micro_bsz', int)
    for name, value in (('micro_num', micro_num), ('micro_bsz', micro_bsz)):
        if value < 1:
            raise ValueError(f'{path}: data.{name}={value} must be at least 1')
    accumulation = draft.take('data.gradient_accumulation', int, micro_num)
    if accumulation != micro_num and made.pipeline == 1:
        raise ValueError(
            f'{path}: data.gradient_accumulation={accumulation} must equal '
            f'data.micro_num={micro_num} without a pipeline, in the original too'
        )
    micro = _micro_batch_size(micro_num * micro_bsz, micro_bsz, made)
    if micro is None:
        raise ValueError(
            f'{path}: data.micro_num={micro_num} x data.micro_bsz={micro_bsz} rows do not make '
            f'the {made.pipeline} micro-batches that parallel.pipeline needs; raise data.micro_num'
        )
    return Batches(micro_num, micro_bsz, micro, _rampup(draft, micro_num, micro, micro_bsz, made))


def _micro_batch_size(rows: int, wanted: int, made: Degrees) -> int | None:
    """The largest up to the one wanted that gives every stage of a pipeline something to do."""
    for size in range(wanted, 0, -1):
        count, ranks = rows // size, made.pipeline
        in_rounds = 'stages_per_rank' in made.schedule and count % max(count // ranks, 1)
        if rows % size == 0 and count >= ranks and not in_rounds:
            return size
    return None


def _rampup(
    draft: Draft, micro_num: int, micro: int, micro_bsz: int, made: Degrees
) -> tuple[int, int, int] | None:
    key = 'data.rampup_batch_size'
    text = draft.look(key, '')
    if text in ('', None):
        draft.say(key, 'as here: every step is whole')
        return None
    if not isinstance(text, str) or not re.fullmatch(r'\s*\d+\s+\d+\s+\d+\s*', text):
        raise ValueError(f'{draft.source.path}: {key}={text!r}: expected "START INCREMENT EVERY"')
    start, increment, every = map(int, text.split())
    if min(start, increment, every) < 1:
        raise ValueError(f'{draft.source.path}: {key}={text!r}: numbers must be at least 1')
    if start >= micro_num:
        draft.say(key, f'it starts at data.micro_num={micro_num}: every step is whole')
        return None
    stages = [*range(start, micro_num, increment), micro_num]
    if micro != micro_bsz or any(stage < made.pipeline for stage in stages):
        raise ValueError(
            f'{draft.source.path}: {key}={text!r} begins with fewer micro-batches than the '
            f'{made.pipeline} stages of parallel.pipeline'
        )
    return start, increment, every


def parse_skip_batches(draft: Draft) -> list[tuple[int, int]]:
    """`"1-3,5"` as [(1, 3), (5, 5)]; both count from 0, ends included.

    Raises:
        ValueError: If it is not of that form.
    """
    text = draft.look('data.skip_batches', '') or ''
    found = []
    for part in filter(None, str(text).replace(' ', '').split(',')):
        match = re.fullmatch(r'(\d+)(?:-(\d+))?', part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(
                f'{draft.source.path}: data.skip_batches={text!r}: {part!r} is no step, and no '
                'interval FIRST-LAST'
            )
        found.append((int(match[1]), int(match[2] or match[1])))
    return found
