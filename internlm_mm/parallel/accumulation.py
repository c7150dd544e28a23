"""Lets the products of weights' gradients add up over micro-batches themselves."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from internlm_mm.ops.gradient_sum import AddingLinear, find_sums_with
from internlm_mm.parallel.data import layers_of
from internlm_mm.parallel.gathered import WaitingGradient, memory_of, waiting_gradients
from internlm_mm.parallel.mesh import Layout
from internlm_mm.parallel.pipeline_plan import PipelinePlan, splits_backward
from internlm_mm.registry import SCHEDULES


def against_accumulation(layout: Layout, fuse: bool, plan: PipelinePlan | None) -> list[str]:
    """Techniques of a run that have gradients of weights made in another way.

    Args:
        layout: Of the job.
        fuse: Whether matrices that read the same input are multiplied as one.
        plan: Of the pipeline, or None.

    Returns:
        Predicates of `fuse_accumulation`.
    """
    found = []
    if layout.tensor > 1:
        found.append(f'does not go with strategy.parallel.tensor={layout.tensor}')
    if fuse:
        found.append('does not go with strategy.kernels.fuse=True')
    if plan is not None and splits_backward(SCHEDULES.get(plan.schedule)):
        found.append(f'does not go with strategy.pipeline.schedule={plan.schedule!r}')
    return found


def check_accumulation(wanted: bool | str, obstacles: list[str]) -> None:
    """Raise ValueError if it is asked for by name and does not go.

    Args:
        wanted: See `internlm_mm.parallel.kernels.Kernels.fuse_accumulation`.
        obstacles: Predicates, as from `against_accumulation`.
    """
    if obstacles and wanted is True:
        raise ValueError(f'strategy.kernels.fuse_accumulation=True {"; ".join(obstacles)}')


def fuse_accumulation(
    model: nn.Module,
    wanted: bool | str,
    device: torch.device,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    obstacles: list[str],
) -> str:
    """Send the gradients of linear layers and of the head to where FSDP2 lets them wait.

    Args:
        model: Changed in place. To be called when it is sharded, before anything is computed.
        wanted: See `internlm_mm.parallel.kernels.Kernels.fuse_accumulation`.
        device: Where it computes.
        param_dtype: What its layers compute in.
        reduce_dtype: What gradients are summed in.
        obstacles: Techniques of this run that it does not go with.

    Returns:
        What was done, or why nothing, for the log.

    Raises:
        ValueError: If it is asked for by name and does not go.
    """
    if not wanted:
        return 'off'
    found = waiting_gradients(model)
    if found is None:
        obstacles = [*obstacles, f'does not know the FSDP2 of torch {torch.__version__}']
    check_accumulation(wanted, obstacles)
    if obstacles:
        return f'off: it {"; ".join(obstacles)}'
    if wanted == 'auto' and not _pays(device, param_dtype, reduce_dtype):
        return 'off: it pays on CUDA, for sums in float32 of gradients in 16 bits'
    assert found is not None
    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    layers = [
        waiting.module
        for waiting in found
        if id(waiting.module) in inside and _is_plain(waiting.module) and waiting.name == 'weight'
    ]
    if wanted == 'auto' and not layers:
        return 'off: no linear layer has a plain weight that is trained'
    anchor = torch.zeros(1, device=device, dtype=param_dtype, requires_grad=True)  # one for all
    for layer in layers:
        layer.__class__ = AddingLinear
        layer.gradient_anchor = anchor
    sums = _Sums(model)
    model.gradient_sums = sums  # type: ignore[assignment]  # for as long as the model
    find_sums_with(sums)
    return f'{len(layers)} linear layers, and the loss at the head'


def _pays(device: torch.device, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> bool:
    narrow = param_dtype in (torch.bfloat16, torch.float16)
    return device.type == 'cuda' and narrow and reduce_dtype == torch.float32


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and 'forward' not in vars(module)


class _Sums:
    """Finds the waiting gradient of a weight by the weight's memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[int, WaitingGradient] = {}
        self._is_complete = False

    def __call__(self, weight: Tensor) -> WaitingGradient | None:
        memory = memory_of(weight)
        if memory not in self._found and not self._is_complete:
            self._look()
        return self._found.get(memory)

    def _look(self) -> None:
        """Again while some were never gathered: layers are, one after the other."""
        all_of_them = waiting_gradients(self._model) or []
        known = [(one.memory, one) for one in all_of_them]
        self._found = {memory: one for memory, one in known if memory is not None}
        self._is_complete = len(self._found) == len(all_of_them)
