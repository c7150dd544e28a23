"""Which layers a pipeline's stages have, and in which order micro-batches pass through them.

The order is a schedule of `torch.distributed.pipelining`, or one registered in SCHEDULES that has
the same interface.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from internlm_mm.registry import SCHEDULES
from internlm_mm.utils.suggest import did_you_mean

for _name, _schedule in {
    'gpipe': schedules.ScheduleGPipe,
    '1f1b': schedules.Schedule1F1B,
    'interleaved_1f1b': schedules.ScheduleInterleaved1F1B,
    'interleaved_zero_bubble': schedules.ScheduleInterleavedZeroBubble,
    'zbv_zero_bubble': schedules.ScheduleZBVZeroBubble,
}.items():
    SCHEDULES.register_module(name=_name, module=_schedule)

_V_SHAPED = (schedules.ScheduleZBVZeroBubble, schedules.ScheduleDualPipeV)
_SPLIT_BACKWARD = (*_V_SHAPED, schedules.ScheduleInterleavedZeroBubble)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Which layers are computed where, and in which order micro-batches pass.

    Attributes:
        schedule: A name in SCHEDULES.
        ranks: Ranks of the pipeline axis.
        layers: Names of the layers of each stage.
    """

    schedule: str
    ranks: int
    layers: tuple[tuple[str, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages in all."""
        return len(self.layers)

    @property
    def stages_per_rank(self) -> int:
        """Stages on each rank."""
        return self.num_stages // self.ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages on a rank of the pipeline axis."""
        if is_v_shaped(SCHEDULES.get(self.schedule)):
            return [rank, self.num_stages - 1 - rank]
        return list(range(rank, self.num_stages, self.ranks))

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline axis that has a stage."""
        return next(rank for rank in range(self.ranks) if stage in self.stages_of(rank))


def plan_pipeline(
    layer_names: Sequence[str],
    ranks: int,
    options: Mapping[str, Any] | None,
    compiled: bool = False,
) -> PipelinePlan:
    """Cut a model's layers into stages.

    Args:
        layer_names: In the model's order.
        ranks: Ranks of the pipeline axis.
        options: `strategy.pipeline`: `schedule`, a name in SCHEDULES; `stages_per_rank`, by default
            1, or 2 for schedules that interleave; `layers`, how many layers each stage has, by
            default as many each, and one more in the middle where they do not divide.
        compiled: Whether layers are compiled.

    Raises:
        ValueError: With the key, the value and what would be valid.
    """
    name, per_rank, counts = read_options(options)
    schedule = SCHEDULES.get(name)
    if compiled and splits_backward(schedule):
        raise ValueError(
            f'strategy.pipeline.schedule={name!r} does not work with strategy.compile=True: torch '
            'takes the backward of a layer apart, which a compiled one does not allow. '
            "Use compile=False, or 'interleaved_1f1b'"
        )
    num_stages = ranks * per_rank
    if counts is None:
        counts = even_split(len(layer_names), num_stages)
    if len(counts) != num_stages or sum(counts) != len(layer_names) or min(counts) < 1:
        nearest = even_split(len(layer_names), num_stages)
        raise ValueError(
            f'strategy.pipeline.layers={list(counts)}: expected {num_stages} stages '
            f'({ranks} ranks of {per_rank}) of at least 1 layer, {len(layer_names)} in all, '
            f'as in {nearest}'
        )
    names = iter(layer_names)
    layers = tuple(tuple(next(names) for _ in range(count)) for count in counts)
    return PipelinePlan(name, ranks, layers)


def read_options(options: Mapping[str, Any] | None) -> tuple[str, int, Sequence[int] | None]:
    """`schedule`, `stages_per_rank` and `layers` of `strategy.pipeline`; see `plan_pipeline`.

    Raises:
        ValueError: With the key, the value and what would be valid.
    """
    options = dict(options or {})
    name = options.pop('schedule', '1f1b')
    schedule = SCHEDULES.get(name) if isinstance(name, str) else None
    if schedule is None:
        hint = did_you_mean(str(name), SCHEDULES.module_dict)
        raise ValueError(f'strategy.pipeline.schedule={name!r} is unknown.{hint}')
    single = issubclass(schedule, PipelineScheduleSingle)
    per_rank = options.pop('stages_per_rank', 1 if single else 2)
    counts = options.pop('layers', None)
    for key, value in options.items():
        hint = did_you_mean(key, ('schedule', 'stages_per_rank', 'layers'))
        raise ValueError(f'strategy.pipeline.{key}={value!r} is unknown.{hint}')
    valid = {1} if single else {2} if is_v_shaped(schedule) else None
    if not isinstance(per_rank, int) or per_rank < 1 or (valid and per_rank not in valid):
        expected = 'a positive int' if valid is None else f'{min(valid)}'
        raise ValueError(
            f'strategy.pipeline.stages_per_rank={per_rank!r}: {name!r} takes {expected}'
        )
    return name, per_rank, counts


def layer_names(model: nn.Module) -> list[str]:
    """Names of a model's layers, in their order.

    Raises:
        ValueError: If they are not in an `nn.ModuleDict`, whose names survive a cut.
    """
    layers = getattr(model, 'layers', None)
    if not isinstance(layers, nn.ModuleDict):
        raise ValueError(
            f'strategy.parallel.pipeline: {type(model).__name__} has no nn.ModuleDict `layers`'
        )
    return list(layers)


def even_split(num_layers: int, num_stages: int) -> list[int]:
    """As many layers each; what is over goes to the middle, since the ends have other work, too.

    Raises:
        ValueError: If there are more stages than layers.
    """
    if num_layers < num_stages:
        raise ValueError(
            f'strategy.parallel.pipeline: {num_stages} stages need at least {num_stages} layers, '
            f'the model has {num_layers}'
        )
    counts = [num_layers // num_stages] * num_stages
    # The head costs most, then the embedding.
    order = [*range(1, num_stages - 1), 0, num_stages - 1]
    for stage in order[: num_layers % num_stages]:
        counts[stage] += 1
    return counts


def is_v_shaped(schedule: Any) -> bool:
    """Whether the first rank has the first and the last stage, and so on inwards.

    A schedule from outside says so with a class attribute `v_shaped = True`.
    """
    return getattr(schedule, 'v_shaped', issubclass(schedule, _V_SHAPED))


def splits_backward(schedule: Any) -> bool:
    """Whether gradients of weights are computed later than those of activations.

    A schedule from outside says so with a class attribute `splits_backward = True`.
    """
    return getattr(schedule, 'splits_backward', issubclass(schedule, _SPLIT_BACKWARD))


def check_reshard(plan: PipelinePlan, reshard: str) -> None:
    """Refuse to give parameters up in between the two halves of a backward.

    Zero-bubble schedules compute gradients of weights later than those of activations. By then
    FSDP2 would have put the sharded parameters back into the layers, and torch would look for
    gradients of those: they would be lost without a word.

    Args:
        plan: Names the schedule.
        reshard: See `internlm_mm.parallel.data.RESHARD`.

    Raises:
        ValueError: If they do not go together.
    """
    if splits_backward(SCHEDULES.get(plan.schedule)) and reshard == 'layer':
        raise ValueError(
            f"strategy.reshard='layer' does not work with strategy.pipeline.schedule="
            f"{plan.schedule!r}, which halves backward: use reshard='step', or another schedule"
        )
