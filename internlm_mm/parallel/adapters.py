"""Low-rank adapters under parallelism: which frozen weights are sharded, how adapters are split.

Models are known by names alone: a linear layer with an adapter has children `lora_A` and `lora_B`,
may have `lora_magnitude_vector`, and tells by `change()` what it applies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from internlm_mm.ops import low_rank_linear, row_norms
from internlm_mm.ops.four_bit import FOUR_BIT
from internlm_mm.ops.needs import obstacles
from internlm_mm.parallel.mesh import Layout
from internlm_mm.utils.seeds import name_seed

_TOKENS = Shard(1)  # of [rows, seq, hidden]


def adapted_layers(model: nn.Module) -> Iterator[Any]:
    """The linear layers of a model that have an adapter."""
    return (module for module in model.modules() if is_adapted(module))


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear layer with an adapter."""
    return hasattr(module, 'lora_A') and hasattr(module, 'change')


def check_adapters(model: nn.Module, fuse: bool, float8: bool) -> None:
    """Refuse techniques that would pass adapters by.

    Args:
        model: With adapters or not.
        fuse: Whether products of several layers are one.
        float8: Whether products are rounded to 8 bits.

    Raises:
        ValueError: Naming the technique.
    """
    if not (fuse or float8) or next(adapted_layers(model), None) is None:
        return
    key = 'strategy.kernels.fuse=True' if fuse else 'strategy.float8'
    raise ValueError(
        f'{key} does not go with model.adapter: it takes linear layers as they are, without '
        'adapters. Leave it out'
    )


def check_four_bit(
    model: nn.Module,
    layout: Layout,
    reshard: str,
    offload: bool,
    dtype: torch.dtype,
    elsewhere: bool = False,
) -> None:
    """Refuse frozen weights in 4 bits where they would be cut, or cannot be made.

    Args:
        model: With adapters or not.
        layout: Of the job.
        reshard: See `internlm_mm.parallel.data.RESHARD`.
        offload: Whether parameters live in host memory.
        dtype: What layers compute in.
        elsewhere: Whether the model will run on another machine, whose packages are not known.

    Raises:
        ValueError: Naming the key.
    """
    if not any(module.four_bit for module in adapted_layers(model)):
        return
    missing = [] if elsewhere else obstacles(FOUR_BIT, 'cpu', dtype)
    found = [f'needs {FOUR_BIT.module}, which {reason}' for reason in missing]
    shards = layout.data_shard * layout.context
    if layout.tensor > 1:
        found.append(f'does not go with strategy.parallel.tensor={layout.tensor}')
    if shards > 1 and reshard != 'never':
        found.append(
            f'is held whole on every rank, and {shards} ranks share parameters: set '
            "strategy.parallel.data_shard=1, or strategy.reshard='never'"
        )
    if offload:
        found.append('does not go with strategy.offload=True')
    if dtype == torch.float64:
        found.append("does not go with strategy.precision.param='float64'")
    if found:
        raise ValueError(f'model.adapter.four_bit=True {"; ".join(found)}')


def round_weights(model: nn.Module) -> None:
    """Hold frozen weights in 4 bits where the model asks for it, once all have been loaded."""
    for module in adapted_layers(model):
        if module.four_bit and module.scales is None:
            module.round_weight()


def check_stages(model: nn.Module, stages: Iterator[tuple[str, ...]]) -> None:
    """Refuse a pipeline of which a stage has nothing to train: no gradient would pass it.

    Args:
        model: Whole.
        stages: Names of each stage's layers.

    Raises:
        ValueError: Naming the stage.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    for number, names in enumerate(stages):
        layers: Any = model.layers
        if not any(p.requires_grad for name in names for p in layers[name].parameters()):
            raise ValueError(
                f'strategy.parallel.pipeline: nothing is trained in stage {number} (layers '
                f'{names[0]} to {names[-1]}): model.adapter.targets must match a layer of every '
                'stage'
            )


def round_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold what is not trained in the dtype that it computes in: it needs no masters."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def part_ways(model: nn.Module, seed: int, rank: int) -> None:
    """Let ranks drop different inputs, where any are dropped: else all rows would lose the same.

    Args:
        model: This rank's part.
        seed: The run's.
        rank: Of all.
    """
    if any(module.dropout for module in adapted_layers(model)):
        torch.manual_seed(name_seed(seed, f'dropout of rank {rank}'))


def left_whole(model: nn.Module, shards: int, reshard: str, offload: bool) -> set[nn.Parameter]:
    """Frozen parameters that FSDP2 is to leave alone.

    That is all of them where there is nobody to share them with, or where `reshard='never'` asks
    for whole parameters on every rank: gathered copies would only double them.

    Args:
        model: Not sharded yet.
        shards: Ranks that parameters are sharded over.
        reshard: See `internlm_mm.parallel.data.RESHARD`.
        offload: Whether parameters live in host memory, from where FSDP2 fetches them.
    """
    if offload or (shards > 1 and reshard != 'never'):
        return set()
    return {parameter for parameter in model.parameters() if not parameter.requires_grad}


@torch.no_grad()
def follow_base(model: nn.Module) -> None:
    """Let learnt lengths of rows be those of the frozen weights. Collective.

    To be called when frozen weights have been initialised or loaded, and before any adapter is.

    Args:
        model: Placed; one without learnt lengths is left alone.
    """
    for module in adapted_layers(model):
        lengths = module.lora_magnitude_vector
        if lengths is not None:
            assign(lengths.weight, _whole(row_norms(_whole_rows(module.weight))))


def assign(parameter: Tensor, full: Tensor) -> None:
    """Fill a parameter, or this rank's part of it, from the whole tensor."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    mesh = parameter.device_mesh
    placed = full.to(mesh.device_type)
    cut = distribute_tensor(placed, mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(cut.to_local())


def _whole_rows(weight: Tensor) -> Tensor:
    # Squares of parts of a row would be a sum that waits to be added up, which has no root yet.
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class AdaptedColumn(ParallelStyle):
    """A linear layer with an adapter, split by its outputs.

    `lora_B` is split as the weight is; `lora_A` is the same on every rank, each of which has a part
    of its gradient.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _split(module, device_mesh, Shard(0), Shard(0), {'lora_A': Replicate()}, Shard(0))
        module.forward = partial(_column, module, device_mesh)
        return module


class AdaptedRow(ParallelStyle):
    """A linear layer with an adapter, split by its inputs; the result is shared out by tokens.

    `lora_A` is split as the weight is; `lora_B` is the same on every rank, and is applied to a part
    of the sum, so that both products are added up over ranks at once.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _split(module, device_mesh, Shard(1), Replicate(), {'lora_A': Shard(1)}, Replicate())
        module.forward = partial(_row, module, device_mesh)
        return module


ADAPTED = {'column': AdaptedColumn, 'row': AdaptedRow}
"""Styles of `internlm_mm.parallel.tensor.STYLES` for layers with adapters."""


def _split(
    module: nn.Module,
    mesh: DeviceMesh,
    weight: Placement,
    bias: Placement,
    parts: dict[str, Placement],
    others: Placement,
) -> None:
    """Lay out a layer's own parameters, and those of its adapter: `parts`, or `others`."""
    _distribute(module, 'weight', mesh, weight)
    if module.bias is not None:
        _distribute(module, 'bias', mesh, bias)
    for name, child in module.named_children():
        _distribute(child, 'weight', mesh, parts.get(name, others))


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = module.get_parameter(name)
    placed = distribute_tensor(parameter.data, mesh, (placement,), src_data_rank=None)
    module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))


def _local(parameter: Any, summed: bool = False) -> Any:
    """This rank's part; `summed` where its gradient there is one part of a sum."""
    if parameter is None:
        return None
    return parameter.to_local(grad_placements=(Partial(),) if summed else None)


def _column(module: Any, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """x: all tokens, [rows, seq, in]; result: this rank's outputs, [rows, seq, out / ranks]."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
    x = x.to_local(grad_placements=(Partial(),))
    change = module.change()
    if change is not None:
        change = change._replace(
            down=_local(change.down, summed=True),
            up=_local(change.up),
            magnitude=_local(change.magnitude),
        )
    return low_rank_linear(x, _local(module.weight), _local(module.bias), change)


def _row(module: Any, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """x: this rank's inputs, [rows, seq, in / ranks]; result: [rows, seq / ranks, out]."""
    change = module.change()
    if change is not None:
        change = change._replace(
            down=_local(change.down),
            up=_local(change.up, summed=True),
            magnitude=_local(change.magnitude, summed=True),
        )
    part = low_rank_linear(x, _local(module.weight), None, change, partial(_add_up, mesh))
    summed = DTensor.from_local(part, mesh, (Partial(),), run_check=False)
    out = summed.redistribute(placements=(_TOKENS,)).to_local()
    # Each rank adds it to its own tokens.
    return out if module.bias is None else out + _local(module.bias, summed=True)


def _add_up(mesh: DeviceMesh, part: Tensor) -> Tensor:
    summed = DTensor.from_local(part, mesh, (Partial(),), run_check=False)
    return summed.redistribute(placements=(Replicate(),)).to_local()
