"""Pipeline parallelism: layers cut into stages, micro-batches sent through them.

`internlm_mm.parallel.pipeline_plan` says which layers are computed where.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.torch_version import TorchVersion

from internlm_mm.parallel.pipeline_plan import PipelinePlan, is_v_shaped
from internlm_mm.registry import SCHEDULES
from internlm_mm.structures import Batch


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
