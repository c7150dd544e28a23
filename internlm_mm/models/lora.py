"""Low-rank adapters over the linear layers of a model: LoRA, DoRA, QLoRA.

A config lays them over any model with one key, and everything else of the model is frozen:

    model.update(adapter=dict(type=LoRA, rank=16, alpha=32.0, targets=['*_proj']))

Inside `adapters_off(model)` the model computes what its frozen weights alone do, as the reference
of an alignment. Frozen weights keep their names; those of adapters are PEFT's, as
`layers.0.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from internlm_mm.ops import (
    FourBitWeight,
    LowRank,
    low_rank_linear,
    merge_low_rank,
    row_norms,
    to_four_bit,
)
from internlm_mm.registry import ADAPTERS
from internlm_mm.utils.seeds import name_seed
from internlm_mm.utils.suggest import did_you_mean


@ADAPTERS.register_module()
class LoRA:
    """What is laid over a model, and over which of its layers.

    The change of a weight is `scale * lora_B @ lora_A`, where scale is alpha / rank. It begins as
    0: `lora_B` with zeros, `lora_A` uniform in +- 1 / sqrt(inputs), as in PEFT.

    Args:
        rank: Rows of `lora_A`, columns of `lora_B`.
        alpha: Strength of the change.
        targets: Globs over names of linear layers, whole ones ('layers.*.self_attn.[qv]_proj') or
            their last part ('q_proj'). Each must match.
        dropout: Share of an adapter's inputs that are zeroed in training.
        rslora: Whether scale is alpha / sqrt(rank), which keeps the change as strong at high ranks.
        dora: Whether the length of each row of the changed weights is learnt apart (DoRA).
        four_bit: Whether the frozen weights under adapters are held in 4 bits (QLoRA), rounded when
            they have been loaded.

    Raises:
        ValueError: If a number is out of range.

    Source: https://arxiv.org/abs/2106.09685; rslora, https://arxiv.org/abs/2312.03732; DoRA,
    https://arxiv.org/abs/2402.09353; QLoRA, https://arxiv.org/abs/2305.14314.
    """

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        targets: Sequence[str] = ('*_proj',),
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        four_bit: bool = False,
    ) -> None:
        if rank < 1:
            raise ValueError(f'model.adapter.rank={rank} must be at least 1')
        if alpha <= 0:
            raise ValueError(f'model.adapter.alpha={alpha} must be above 0')
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f'model.adapter.dropout={dropout} is not in [0, 1)')
        if isinstance(targets, str) or not targets:
            raise ValueError(f'model.adapter.targets={targets!r}: expected a list of patterns')
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        self.dropout, self.rslora, self.dora, self.four_bit = dropout, rslora, dora, four_bit

    @property
    def scale(self) -> float:
        """Factor of `lora_B @ lora_A`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze a model and lay adapters over the layers that are meant, in place.

        Args:
            model: Whole; on the meta device or not.

        Raises:
            ValueError: If a pattern matches no linear layer, or the model has adapters already.
        """
        if has_adapters(model):
            raise ValueError(f'{type(model).__name__} has adapters already')
        chosen = self._choose(model)
        model.requires_grad_(False)
        if getattr(model, 'objective', None) is not None:
            model.objective.requires_grad_(True)  # the score of a reward model, which begins anew
        for name in chosen:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            layer = LoRALinear(
                base, self.rank, self.scale, self.dropout, self.dora, seed=name_seed(0, name)
            )
            layer.four_bit = self.four_bit
            model.set_submodule(name, layer)
        return model

    def merge(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The changed weight of one layer.

        Args:
            weight: The frozen one, [out, in].
            parts: The adapter's tensors, by their names in the layer.

        Returns:
            [out, in], in float32 at least.
        """
        lengths = parts.get('lora_magnitude_vector.weight')
        change = LowRank(
            parts['lora_A.weight'], parts['lora_B.weight'], self.scale, magnitude=lengths
        )
        return merge_low_rank(weight, change)

    def _choose(self, model: nn.Module) -> list[str]:
        """Names of the layers that any pattern matches."""
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        # Objectives read the head's weight and never call it.
        names = [name for name in linear if not name.startswith(('lm_head', 'objective.'))]
        chosen: dict[str, None] = {}
        for pattern in self.targets:
            found = [name for name in names if _matches(name, pattern)]
            if not found:
                known = sorted({name.rpartition('.')[2] for name in names})
                hint = did_you_mean(pattern.rpartition('.')[2], known)
                if any(_matches(name, pattern) for name in linear):
                    hint = ' The head takes no adapter: losses use its weight as it is.'
                raise ValueError(
                    f'model.adapter.targets: {pattern!r} matches no linear layer of '
                    f'{type(model).__name__}, which has {", ".join(known)}.{hint}'
                )
            chosen |= dict.fromkeys(found)
        return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name if '.' in pattern else name.rpartition('.')[2], pattern)


class LoRALinear(nn.Linear):
    """A linear layer whose own weights are frozen, and a low-rank change of them that is learnt.

    Args:
        base: The layer to take the place of; its parameters are taken over.
        rank: Rank of the change.
        scale: Factor of the change.
        dropout: Share of the change's inputs that are zeroed in training.
        dora: Whether the length of each row is learnt apart.
        seed: Of what is drawn, where the layer is not on the meta device.

    Attributes:
        is_on: Whether the change is applied; see `adapters_off`.
        four_bit: Whether the weight is to be held in 4 bits; see `round_weight`.
    """

    scales: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scale: float,
        dropout: float,
        dora: bool,
        seed: int = 0,
    ) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device='meta')
        self.weight, self.bias = base.weight, base.bias
        device, dtype = base.weight.device, base.weight.dtype
        self.lora_A = AdapterWeight((rank, base.in_features), device, dtype, seed=seed)
        self.lora_B = AdapterWeight((base.out_features, rank), device, dtype, zeros=True)
        self.lora_magnitude_vector: AdapterWeight | None = None
        if dora:
            self.lora_magnitude_vector = AdapterWeight((base.out_features,), device, dtype)
            if device.type != 'meta':
                self.lora_magnitude_vector.weight.data.copy_(row_norms(base.weight))
        self.scale, self.dropout = scale, dropout
        self.is_on, self.four_bit = True, False
        self.register_buffer('scales', None, persistent=False)

    def change(self) -> LowRank | None:
        """The change that is applied now, of this module's own tensors; None if there is none."""
        if not self.is_on:
            return None
        lengths = self.lora_magnitude_vector
        return LowRank(
            self.lora_A.weight,
            self.lora_B.weight,
            self.scale,
            self.dropout if self.training else 0.0,
            None if lengths is None else lengths.weight,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the changed layer. x: [..., in]; result: [..., out]."""
        weight: Tensor | FourBitWeight = self.weight
        if self.scales is not None:
            shape = (self.out_features, self.in_features)
            weight = FourBitWeight(self.weight, self.scales, shape)
        return low_rank_linear(x, weight, self.bias, self.change())

    def round_weight(self) -> None:
        """Hold the weight in 4 bits from here on. It must be this rank's whole."""
        rounded = to_four_bit(self.weight)
        self.weight = nn.Parameter(rounded.packed, requires_grad=False)
        self.scales = rounded.scales


class AdapterWeight(nn.Module):
    """One tensor of an adapter, under the name that PEFT gives it: `PART.weight`.

    Args:
        shape: Of the tensor.
        device: Where it is.
        dtype: Of the tensor.
        zeros: Whether it begins with zeros; else a matrix is drawn as PEFT does, and lengths are 1
            until the frozen weights are known.
        seed: Of what is drawn here. On the meta device nothing is.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        zeros: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.zeros = zeros
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if device.type != 'meta':
            self.init_parameter('weight', self.weight, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_parameter(self, _name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the whole tensor; see `Decoder.init_parameter`."""
        if self.zeros:
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.0)
        else:  # Kaiming's uniform with a = sqrt(5)
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))


def adapter_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """The layers of a model that have adapters."""
    return (part for part in model.modules() if isinstance(part, LoRALinear))


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of a model has one."""
    return any(True for _ in adapter_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes what its frozen weights alone do.

    Args:
        model: Placed or not, compiled or not; any part of a model that has adapters.

    Raises:
        ValueError: If there is none to switch off.
    """
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError(
            f'{type(model).__name__} has no adapters to switch off: set model.adapter=dict(...)'
        )
    before = [layer.is_on for layer in layers]
    try:
        for layer in layers:
            layer.is_on = False
        yield
    finally:
        for layer, was_on in zip(layers, before, strict=True):
            layer.is_on = was_on
