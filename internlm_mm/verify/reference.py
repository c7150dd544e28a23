"""What training should do, written out: one process, float64, the whole step at once.

Nothing here comes from the strategy, the optimizer wrapper, the loader or the loop. The model's own
forward is used, and torch's autograd; AdamW, its schedule and the clip are written by hand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from internlm_mm.datasets.packing import collate_rows
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.utils.seeds import initializer, name_seed

TYPICAL = 0.15
"""Size of a weight to start from. Far above what families start with, so that every part of a small
model matters to its loss."""


@dataclass(slots=True)
class Reference:
    """Everything that a layout is compared with; tensors are float64 on the CPU.

    Attributes:
        names: Every trained parameter, in the model's order.
        exponents: Powers of two that initial matrices are multiplied by, by name; None where
            `drawn` stands for them.
        initial: Weights before the first step.
        losses: Mean loss per trained token, one a step.
        norms: Gradient norm before the clip, one a step.
        gradients: Gradients before the clip, by name, one dict a step.
        weights: After the update, by name, one dict a step.
        max_norm: The clip that was used.
        eps: AdamW's.
    """

    names: list[str]
    exponents: dict[str, int | None]
    initial: dict[str, Tensor]
    max_norm: float
    eps: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def initial_weights(model: nn.Module, seed: int) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Weights by the model's own rule, drawn a name at a time in float32, then made large.

    Args:
        model: On the meta device; has `init_parameter`.
        seed: The run's.

    Returns:
        Float64 weights, and the power of two that each was multiplied by, which rounds nothing;
        None where `drawn` stands for what follows from other weights or is all zeros: adapters'
            lengths of rows, and the second of their matrices.
    """
    weights: dict[str, Tensor] = {}
    exponents: dict[str, int | None] = {}
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape)
        generator = torch.Generator().manual_seed(name_seed(seed, name))
        owner, local_name = initializer(model, name)
        owner.init_parameter(local_name, full, generator)
        size = full.double().square().mean().sqrt().item()
        exponents[name] = exponent = (
            round(math.log2(TYPICAL / size)) if full.ndim >= 2 and size > 0 else 0
        )
        weights[name] = full.double() * 2.0**exponent
        if (full.ndim >= 2 and size == 0) or name.endswith('.lora_magnitude_vector.weight'):
            weights[name], exponents[name] = drawn(name, parameter.shape, seed).double(), None
    return weights, exponents


def drawn(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """What an adapter begins with here, of which every part gets a gradient at once; float32."""
    generator = torch.Generator().manual_seed(name_seed(seed, f'drawn {name}'))
    value = TYPICAL * torch.randn(*shape, generator=generator)
    return value if value.ndim >= 2 else 1 + value


def train_reference(
    build: Callable[[], nn.Module],
    rows: Any,
    *,
    seed: int,
    steps: int,
    rows_of_a_step: int,
    betas: Sequence[float],
    weight_decay: float,
    rate: Callable[[int], float],
    max_norm: float | None,
    device: str,
) -> Reference:
    """Train and write everything down.

    The clip is the config's if it bites, else 0.3 of the first step's norm. AdamW's eps is as large
    as a typical element of the clipped gradient: with the usual one the update of an element whose
    gradient is nearly zero is its sign, so that mere rounding would become whole steps.

    Args:
        build: Makes the model on the current default device.
        rows: Row i by `rows[i]`.
        seed: The run's.
        steps: How many.
        rows_of_a_step: Over all ranks.
        betas: AdamW's.
        weight_decay: Of tensors of two or more dimensions.
        rate: Learning rate of a step, counted from 0.
        max_norm: The config's clip, or None.
        device: 'cpu' or 'cuda': rotary tables are float32, which devices round differently.
    """
    with torch.device('meta'):
        model = build()
    weights, exponents = initial_weights(model, seed)
    model = model.to(torch.float64).to_empty(device=device)
    model.load_state_dict(weights)
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: Reference | None = None
    state: dict[str, tuple[Tensor, Tensor]] = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()
    }
    for step in range(steps):
        first = step * rows_of_a_step
        batch = collate_rows([rows[first + row] for row in range(rows_of_a_step)]).to(device)
        loss = model(batch)['loss'] / int((batch.labels != IGNORE_INDEX).sum())
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
        )
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        if found is None:
            clip = max_norm if max_norm is not None and max_norm < 0.7 * norm else 0.3 * norm
            size = sum(p.numel() for p in parameters.values())
            found = Reference(
                names=list(parameters),
                exponents=exponents,
                initial=weights,
                max_norm=clip,
                eps=clip / math.sqrt(size),
            )
        found.losses.append(loss.item())
        found.norms.append(norm)
        found.gradients.append({name: g.cpu() for name, g in gradients.items()})
        factor = min(1.0, found.max_norm / (norm + 1e-6))
        for name, parameter in parameters.items():
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            _adamw(
                parameter.data,
                gradients[name] * factor,
                state[name],
                step + 1,
                rate(step),
                betas,
                found.eps,
                decay,
            )
        found.weights.append({name: p.detach().cpu().clone() for name, p in parameters.items()})
    assert found is not None
    return found


def _adamw(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    count: int,
    rate: float,
    betas: Sequence[float],
    eps: float,
    decay: float,
) -> None:
    """One update in place, https://arxiv.org/abs/1711.05101, algorithm 2."""
    mean, square = moments
    mean.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    square.mul_(betas[1]).add_(gradient.square(), alpha=1 - betas[1])
    root = (square / (1 - betas[1] ** count)).sqrt() + eps
    weight.mul_(1 - rate * decay)
    weight.sub_(rate / (1 - betas[0] ** count) * mean / root)
