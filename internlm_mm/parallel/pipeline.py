"""Pipeline parallelism: layers cut into stages, micro-batches sent through them.

The order of the micro-batches is a schedule of `torch.distributed.pipelining`, or one registered in
SCHEDULES that has the same interface.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.torch_version import TorchVersion

from internlm_mm.registry import SCHEDULES
from internlm_mm.structures import Batch
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


def cut_stages(
    model: nn.Module, plan: PipelinePlan, rank: int
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """This rank's part of a model.

    Args:
        model: Whole; has `layers`, an `nn.ModuleDict`, `embed_tokens`, `norm`, `lm_head` and
            `objective`.
        plan: Which layers each stage has.
        rank: On the pipeline axis.

    Returns:
        All that the rank holds as one module with the model's names, for everything but computing;
        and its stages by index, which share their parameters with it.
    """
    stages = {}
    for index in plan.stages_of(rank):
        stage: Any = deepcopy(model)
        stage.layers = nn.ModuleDict({name: stage.layers[name] for name in plan.layers[index]})
        if index > 0:
            stage.embed_tokens = None
        if index < plan.num_stages - 1:
            stage.norm = stage.lm_head = stage.objective = None
        stages[index] = stage
    if len(stages) == 1:
        return stage, stages
    part: Any = deepcopy(model)
    part.embed_tokens = part.norm = part.lm_head = part.objective = None
    part.layers = nn.ModuleDict({n: m for one in stages.values() for n, m in one.layers.items()})
    for stage in stages.values():
        part.embed_tokens = stage.embed_tokens or part.embed_tokens
        if stage.lm_head is not None:
            part.norm, part.lm_head, part.objective = stage.norm, stage.lm_head, stage.objective
    return part, stages


def _keep_forward_only(schedule: Any) -> None:
    """Take the backward out of a V-shaped schedule: torch's own evaluation would still begin it."""
    kept = ('FORWARD', 'SEND_F', 'RECV_F', 'UNSHARD', 'RESHARD')
    schedule.pipeline_order_with_comms = {
        rank: [action for action in actions if action.computation_type.name in kept]
        for rank, actions in schedule.pipeline_order_with_comms.items()
    }


class Pipeline:
    """Runs micro-batches through the stages of all ranks.

    Args:
        stages: This rank's stages by index.
        plan: Which layers each stage has, and the schedule.
        mesh: The pipeline axis.
        device: Where the stages are.
        hidden_size: Width of what is passed from stage to stage.
        dtype: Its dtype.
        tokens_shared_by: Ranks that each pass only a share of a row's tokens.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        plan: PipelinePlan,
        mesh: DeviceMesh,
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
        tokens_shared_by: int,
    ) -> None:
        v_shaped = is_v_shaped(SCHEDULES.get(plan.schedule))
        if v_shaped and device.type == 'cpu' and TorchVersion(torch.__version__) < '2.13':
            raise ValueError(
                f'strategy.pipeline.schedule={plan.schedule!r} on CPUs needs torch 2.13 or newer, '
                f'this is {torch.__version__}: a rank would send to itself, which gloo cannot'
            )
        self.stages, self.plan, self.mesh, self.device = stages, plan, mesh, device
        self.has_loss = plan.num_stages - 1 in stages
        self._hidden_size, self._dtype, self._shared = hidden_size, dtype, tokens_shared_by
        self._batches: Sequence[Batch] = ()
        self._sums: list[dict[str, Tensor]] = []
        self._loss: Callable[[Tensor], Tensor] = lambda loss: loss
        self._schedules: dict[tuple, Any] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for index, stage in stages.items():
            stage.register_forward_pre_hook(self._take_batch, with_kwargs=True, prepend=True)
            if index == plan.num_stages - 1:
                stage.register_forward_hook(self._keep_sums)

    def forward_backward(
        self, batches: Sequence[Batch], loss: Callable[[Tensor], Tensor]
    ) -> list[dict[str, Tensor]]:
        """Accumulate and reduce the gradient of a step. Collective over the pipeline.

        Args:
            batches: The step's micro-batches, the same on every rank of the pipeline.
            loss: From a micro-batch's summed loss to what goes backward.

        Returns:
            What the model returned for each micro-batch, on the last stage's rank; else nothing.
        """
        self._loss = loss
        return self._run(batches, training=True)

    def evaluate(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Forward only. Collective over the pipeline."""
        return self._run(batches, training=False)

    def share_shapes(self, sums: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        """Let ranks without a loss know what there is to sum, as zeros. Collective, once a kind."""
        if kind not in self._shapes:
            shapes = [{key: tuple(value.shape) for key, value in sums.items()}]
            last = self.plan.rank_of(self.plan.num_stages - 1)
            torch.distributed.broadcast_object_list(
                shapes, group=self.mesh.get_group(), group_src=last, device=torch.device('cpu')
            )
            self._shapes[kind] = shapes[0]
        if self.has_loss:
            return dict(sums)
        found = self._shapes[kind]
        return {key: torch.zeros(shape, device=self.device) for key, shape in found.items()}

    def _run(self, batches: Sequence[Batch], training: bool) -> list[dict[str, Tensor]]:
        self._batches, self._sums = batches, []
        rows, seq = batches[0].input_ids.shape
        schedule = self._schedule(len(batches), (rows, seq), training)
        numbers = torch.arange(len(batches))
        inputs: dict[str, Any] = {} if 0 in self.stages else {'number': numbers}
        if 0 in self.stages and len(self.stages) > 1:
            inputs['number'] = numbers
        first = (numbers,) if 0 in self.stages else ()
        if training:
            target = numbers if self.has_loss else None
            schedule.step(*first, target=target, return_outputs=False, **inputs)
        else:
            schedule.step(*first, return_outputs=False, **inputs)
        return self._sums

    def _schedule(self, count: int, shape: tuple[int, int], training: bool) -> Any:
        key = (count, shape, training)
        if key not in self._schedules:
            stages = [self._stage(index, shape, training) for index in self.stages]
            schedule = SCHEDULES.get(self.plan.schedule)
            single = issubclass(schedule, PipelineScheduleSingle)
            if not training and not is_v_shaped(schedule):
                # Forward only, and as few micro-batches as there are.
                schedule = schedules.ScheduleGPipe if single else schedules.ScheduleLoopedBFS
            self._schedules[key] = schedule(
                stages[0] if single else stages,
                n_microbatches=count,
                loss_fn=(lambda loss, _number: self._loss(loss)) if training else None,
                scale_grads=False,
            )
            if not training and is_v_shaped(schedule):
                _keep_forward_only(self._schedules[key])
        return self._schedules[key]

    def _stage(self, index: int, shape: tuple[int, int], training: bool) -> PipelineStage:
        rows, seq = shape
        last = index == self.plan.num_stages - 1
        passed = (rows, seq // self._shared, self._hidden_size)
        # Requiring a gradient is how torch is told that one will come back.
        hidden = torch.empty(passed, dtype=self._dtype, device='meta', requires_grad=training)
        number = torch.empty(1, dtype=torch.int64, device='meta')
        wide = torch.promote_types(self._dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device='meta', requires_grad=training)
        return PipelineStage(
            self.stages[index],
            index,
            self.plan.num_stages,
            self.device,
            input_args=number if index == 0 else hidden,
            output_args=loss if last else hidden,
            group=self.mesh.get_group(),
        )

    def _take_batch(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """What torch passes, a number and what the stage before has computed -> the arguments."""
        if module.embed_tokens is not None:
            return (self._batches[int(args[0])],), {}
        return (self._batches[int(kwargs['number'])], args[0]), {}

    def _keep_sums(self, _module: Any, _args: tuple, sums: dict[str, Tensor]) -> Tensor:
        self._sums.append({key: value.detach() for key, value in sums.items()})
        return sums['loss']
