"""Data parallelism: parameters, gradients and optimizer state sharded over ranks (FSDP2, HSDP)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    UnshardHandle,
    fully_shard,
)

from internlm_mm.parallel.adapters import left_whole
from internlm_mm.parallel.reducing import ReduceIntoComputeMemory, add_in_one_pass

RESHARD = ('never', 'step', 'layer')
"""How long gathered parameters are kept: from one update to the next, from a step's first forward
to its last backward, or for a layer's forward and again for its backward."""


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of a model: what is sharded, compiled and recomputed one by one.

    A model offers them as `layers`, an `nn.ModuleDict` or `nn.ModuleList`. One without is treated
    whole.
    """
    layers = getattr(model, 'layers', None)
    if isinstance(layers, nn.ModuleDict):
        yield from layers.values()
    elif isinstance(layers, nn.ModuleList):
        yield from layers


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: str,
    offload: bool = False,
) -> None:
    """Shard every layer, then what is left, in place; frozen parameters as `left_whole` says.

    Args:
        model: On the meta device or not; its parameters become DTensors in their own dtype, the
            masters.
        mesh: Axes (shard,) or (replicate, shard).
        param_dtype: What layers compute in.
        reduce_dtype: What gradients are summed in.
        reshard: See `RESHARD`; 'never' also wants a `GatherAhead`.
        offload: Whether masters and gradients, and so the optimizer's state and its update, stay
            in host memory. Allocate such a model with `allocate`.
    """
    # Inputs are not cast: activations have the parameters' dtype already, rotary tables stay fp32.
    options: dict[str, Any] = {
        'mesh': mesh,
        'mp_policy': MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
        # Pinned memory is what copies to and from a GPU in the background; without one there is
        # nobody to pin it for.
        'offload_policy': CPUOffloadPolicy(pin_memory=mesh.device_type == 'cuda')
        if offload
        else OffloadPolicy(),
    }
    shards = mesh.size(mesh.ndim - 1)
    options['ignored_params'] = left_whole(model, shards, reshard, offload)
    # The outermost unit is needed at both ends of the step; giving it up in between gains nothing.
    for layer in layers_of(model):
        fully_shard(layer, reshard_after_forward=reshard == 'layer', **options)
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the step's tokens over all ranks, so gradients add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if mesh.device_type == 'cuda' and mesh.ndim == 1 and not offload:
                module.set_custom_reduce_scatter(ReduceIntoComputeMemory(shards))
    if mesh.device_type == 'cuda':
        add_in_one_pass(model)


def begin_micro_batch(model: nn.Module, is_last: bool, reshard: str) -> None:
    """Reduce gradients, and give parameters up, only in a step's last micro-batch.

    Args:
        model: A model that `shard_model` has sharded; any other is left alone.
        is_last: Whether this is the step's last micro-batch.
        reshard: See `RESHARD`.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)
        model.set_reshard_after_backward(is_last or reshard == 'layer')


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Give a model that was built on the meta device its memory, which is not filled.

    Args:
        model: Changed in place.
        device: Where the model computes.
        offload: As `shard_model` was told: parameters in host memory, buffers on the device.
    """
    model.to_empty(device=torch.device('cpu') if offload else device)
    if offload:
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))


class GatherAhead:
    """Keeps parameters gathered between steps, for `reshard='never'`.

    `start` begins to gather every unit's parameters, in the order of the next forward, and
    returns: the gather goes on behind whatever the host does next, and the forward waits for each
    unit where it needs it. Until then the model's parameters are the sharded ones, with their
    gradients, for all who look. The whole parameters of a step are given up at the end of its last
    backward, since the update makes them stale, so that this costs no memory that the step does
    not need itself.

    Args:
        model: What `shard_model` has sharded, or a module that holds such models.
    """

    def __init__(self, model: nn.Module) -> None:
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._pending: list[UnshardHandle] = []
        # What is loaded would not be in the copies that were gathered before.
        model.register_load_state_dict_pre_hook(lambda *_: self.drop())

    def start(self) -> None:
        """Gather the parameters as they are now. Collective; call it after every update."""
        self.drop()
        for unit in self._units:
            handle = unit.unshard(async_op=True)
            assert handle is not None  # async_op asks for one
            self._pending.append(handle)

    def drop(self) -> None:
        """Give up whatever is gathered, also what is on its way. Call it before weights change."""
        for handle in self._pending:
            handle.wait()  # a gather that was begun cannot be called off
        self._pending = []
        for unit in self._units:
            unit.reshard()
