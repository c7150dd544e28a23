"""Tensor and sequence parallelism: a model's `tensor_plan` -> split matrices.

Every matrix is cut in two kinds of ways, by columns and then by rows, so that a layer needs only
two exchanges; between them each rank holds its share of the tokens (Megatron-LM,
https://arxiv.org/abs/1909.08053 section 3; sequence parallelism, https://arxiv.org/abs/2205.05198
section 4.2.2).
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from internlm_mm.ops import (
    VocabularyShard,
    document_scores,
    greedy_tokens,
    linear_cross_entropy,
    linear_token_losses,
)
from internlm_mm.parallel.adapters import ADAPTED, is_adapted
from internlm_mm.utils.adapters import layer_of
from internlm_mm.utils.suggest import did_you_mean

TOKENS = Shard(1)  # of [rows, seq, hidden]


class GatherInput(PrepareModuleInput):
    """The first argument arrives with a rank's share of the tokens; the module gets all tokens."""

    def __init__(self) -> None:
        super().__init__(input_layouts=(TOKENS,), desired_input_layouts=(Replicate(),))

    def _prepare_input_fn(self, inputs: Any, device_mesh: DeviceMesh) -> Any:
        # Only the first is split; how many follow is the module's business.
        first, *others = inputs
        (prepared,) = super()._prepare_input_fn((first,), device_mesh)
        return (prepared, *others)


class GatherOutput(SequenceParallel):
    """A norm that works on a rank's share of the tokens and hands out all of them."""

    def __init__(self) -> None:
        super().__init__(use_local_output=True)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(lambda _module, _inputs, out: gather_tokens(out, device_mesh))
        return module


class SplitVocabulary(ParallelStyle):
    """An embedding of which each rank has some rows; the result arrives shared out by tokens.

    torch's own style gives every rank the gradient of the whole table.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        weight = distribute_tensor(module.weight, device_mesh, (Shard(0),))
        module.register_parameter('weight', nn.Parameter(weight))
        module.forward = partial(_embed, module, device_mesh)  # type: ignore[method-assign]
        return module


def _embed(module: Any, mesh: DeviceMesh, input_ids: Tensor) -> Tensor:
    """input_ids: [rows, seq]; result: [rows, seq / ranks, hidden]."""
    rows = module.weight.to_local()
    local = input_ids - mesh.get_local_rank() * rows.shape[0]
    elsewhere = (local < 0) | (local >= rows.shape[0])
    found = F.embedding(local.masked_fill(elsewhere, 0), rows)
    part = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
    summed = DTensor.from_local(part, mesh, (Partial(),), run_check=False)
    return summed.redistribute(placements=(TOKENS,)).to_local()


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    'vocabulary': SplitVocabulary,
    'sequence': lambda: SequenceParallel(use_local_output=True),
    'heads': lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
    'gather': GatherInput,
    'column': ColwiseParallel,
    'row': lambda: RowwiseParallel(output_layouts=TOKENS),
    'gather_output': GatherOutput,
    'head': ColwiseParallel,
}
"""What a model's `tensor_plan` may say of a module: how its weights, and its tokens, are cut."""


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split `model` over the one axis of `mesh`, in place.

    Args:
        model: Has `tensor_plan`, styles by globs over module names; on the meta device or not. Its
            objective, if it has one, has a seam of `SEAMS`.
        mesh: The tensor axis.

    Raises:
        ValueError: If the model has no plan, or one that names an unknown style or forgets a
            parameter; if the objective reads the head, or hidden states, without a seam.
    """
    styles = check_tensor_plan(model, mesh.size())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, style in styles.items():
        module = model.get_submodule(name)
        make = ADAPTED[style] if is_adapted(module) else STYLES[style]
        parallelize_module(module, mesh, make())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)  # which some of torch's styles forget
    objective = getattr(model, 'objective', None)
    if objective is not None:
        for seam, function in SEAMS.items():
            if hasattr(objective, seam):
                setattr(objective, seam, partial(function, mesh=mesh))


def check_tensor_plan(model: nn.Module, degree: int) -> dict[str, str]:
    """Style by module name, if `model` can be split.

    Args:
        model: As in `apply_tensor_parallel`.
        degree: Ranks of the tensor axis, for messages.

    Raises:
        ValueError: As `apply_tensor_parallel`.
    """
    plan = getattr(model, 'tensor_plan', None)
    if plan is None:
        raise ValueError(
            f'strategy.parallel.tensor={degree}: {type(model).__name__} has no `tensor_plan`'
        )
    styles = match_plan(model, plan)
    _check_plan(model, styles)
    objective = getattr(model, 'objective', None)
    if objective is not None and not any(hasattr(objective, seam) for seam in SEAMS):
        raise ValueError(
            f'strategy.parallel.tensor={degree}: the objective {type(objective).__name__} has no '
            f'seam for split matrices, as {", ".join(f"`{seam}`" for seam in SEAMS)}'
        )
    return styles


def _check_plan(model: nn.Module, styles: Mapping[str, str]) -> None:
    """Refuse parameters without a style: ranks have parts of their gradient, never added up."""
    for name, _ in model.named_parameters():
        owner = layer_of(name)
        # An objective's are used alike on every rank, with all tokens.
        if styles.get(owner, 'gather') == 'gather' and not name.startswith('objective.'):
            raise ValueError(
                f'{type(model).__name__}.tensor_plan says nothing of {owner!r}, which has the '
                f'parameter {name!r}'
            )


def match_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Style by module name; where several patterns match, the last one decides."""
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(
                f'{type(model).__name__}.tensor_plan[{pattern!r}]={style!r}.'
                f'{did_you_mean(style, STYLES)}'
            )
    styles = {}
    for name, _ in model.named_modules():
        for pattern, style in plan.items():
            if fnmatchcase(name, pattern) and name.count('.') == pattern.count('.'):
                styles[name] = style
    return styles


def gather_tokens(hidden: Tensor, mesh: DeviceMesh) -> Tensor:
    """All tokens from every rank's share; gradients are added up and shared out again.

    Args:
        hidden: [rows, seq / ranks, ...].
        mesh: The axis whose ranks have the shares, in their order.

    Returns:
        [rows, seq, ...].
    """
    shared = DTensor.from_local(hidden, mesh, (TOKENS,), run_check=False)
    return shared.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))


def sharded_cross_entropy(
    hidden: Tensor,
    weight: DTensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    *,
    mesh: DeviceMesh,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with the head's rows spread over `mesh`.

    Args:
        hidden: The same on every rank, [tokens, hidden]; its gradient is a part of a sum.
        weight: The head, [vocab, hidden], split along its rows.
        labels: As in `linear_cross_entropy`, and so are the other two.
        label_smoothing: See there.
        chunk: See there.
        mesh: The tensor axis.
    """
    local, shard = _own_rows(weight, mesh)
    return linear_cross_entropy(hidden, local, labels, label_smoothing, chunk, shard)


def sharded_greedy_tokens(
    hidden: Tensor, weight: DTensor, chunk: int | None = None, *, mesh: DeviceMesh
) -> Tensor:
    """`greedy_tokens` with the head's rows spread over `mesh`; arguments as above."""
    local, shard = _own_rows(weight, mesh)
    return greedy_tokens(hidden, local, chunk, shard)


def sharded_token_losses(
    hidden: Tensor,
    weight: DTensor,
    labels: Tensor,
    chunk: int | None = None,
    *,
    mesh: DeviceMesh,
) -> Tensor:
    """`linear_token_losses` with the head's rows spread over `mesh`; arguments as above."""
    local, shard = _own_rows(weight, mesh)
    return linear_token_losses(hidden, local, labels, chunk, shard)


def sharded_document_scores(
    hidden: Tensor, weight: Tensor, cu_seqlens: Tensor, *, mesh: DeviceMesh
) -> Tensor:
    """`document_scores` by every rank alike, whose weight is whole everywhere.

    Args:
        hidden: The same on every rank, [rows, seq, hidden]; its gradient is a part of a sum.
        weight: [1, hidden].
        cu_seqlens: As in `document_scores`.
        mesh: The tensor axis.
    """
    counts = mesh.get_local_rank() == 0
    return document_scores(_CountGradient.apply(hidden, counts), weight, cu_seqlens)


class _CountGradient(torch.autograd.Function):
    """The same tensor, whose gradient is zeros on ranks where it does not count."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: bool) -> Tensor:
        ctx.counts = counts
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.counts else torch.zeros_like(grad)), None


SEAMS: dict[str, Callable[..., Any]] = {
    'cross_entropy': sharded_cross_entropy,
    'document_scores': sharded_document_scores,
    'greedy_tokens': sharded_greedy_tokens,
    'token_losses': sharded_token_losses,
}
"""What takes the place of an objective's functions of the head, or of hidden states."""


def _own_rows(weight: DTensor, mesh: DeviceMesh) -> tuple[Tensor, VocabularyShard]:
    """This rank's rows of the head, and which they are."""
    group = mesh.get_group()

    def reduce(tensor: Tensor, op: Any) -> Tensor:
        dist.all_reduce(tensor, op, group=group)
        return tensor

    local = weight.to_local()
    return local, VocabularyShard(
        start=mesh.get_local_rank() * local.shape[0],
        vocab_size=weight.shape[0],
        sum_over_shards=partial(reduce, op=dist.ReduceOp.SUM),
        max_over_shards=partial(reduce, op=dist.ReduceOp.MAX),
    )
