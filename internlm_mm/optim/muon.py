"""Muon for the matrices of the layers, AdamW for everything else, on sharded parameters."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from internlm_mm.optim.numbers import check_numbers
from internlm_mm.optim.whole_matrices import Gathering, Matrix, MatrixDeal
from internlm_mm.registry import OPTIMIZERS
from internlm_mm.utils.device import dtype_of
from internlm_mm.utils.shards import local_tensor
from internlm_mm.utils.suggest import did_you_mean

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial; steepest at zero, so that five rounds suffice."""

ADJUSTMENTS = ('match_rms_adamw', 'original')

ROUND_BYTES = 256 * 2**20
"""Of whole matrices that a rank works on before it sends the results back; at least one."""


@torch.no_grad()
def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix whose singular values are all one, roughly: they end in [0.7, 1.2].

    Computes in the dtype of `matrix`, operation by operation as `torch.optim.Muon` does.

    Args:
        matrix: [out, in], whole.
        steps: Rounds of the iteration.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    found = matrix.T if is_tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = found @ found.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.addmm(found, polynomial, found, beta=a)
    return found.T if is_tall else found


@OPTIMIZERS.register_module()
class MuonAdamW(Optimizer):
    """Muon where a group says `muon=True`, AdamW in the other groups.

    A matrix moves by its momentum with all singular values made one, which takes the whole matrix.
    Under FSDP2 and tensor parallelism, the ranks that share matrices deal them out: every rank
    brings some of them together, works on those and sends the parts of the result back, each
    number once in `ns_dtype` either way. Copies of the model (`data_replicate`) send nothing.

    State has the parameters' names and shapes: `momentum_buffer` of matrices, AdamW's of the rest.

    Args:
        params: Groups, as `parameter_groups` makes them.
        lr: Learning rate of both parts.
        matrix_lr: Another one for the matrices.
        weight_decay: Decoupled, as in AdamW, for both parts.
        momentum: Of the matrices.
        nesterov: Whether to look ahead along the momentum.
        adjust_lr: How a matrix's rate follows its shape: 'match_rms_adamw' gives updates the size
            that AdamW's have, so that its rate and decay serve; 'original' is Jordan's.
        ns_steps: Rounds of Newton-Schulz iteration.
        ns_dtype: What it computes in; bfloat16 by default, float64 where the masters are.
        betas: AdamW's.
        eps: AdamW's.
        fused: AdamW's.

    Raises:
        ValueError: If an option is out of range, or no group says `muon=True`.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; decay and 'match_rms_adamw':
        Liu et al. (Moonlight), https://arxiv.org/abs/2502.16982, sections 2.2 and 2.3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        matrix_lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: str = 'match_rms_adamw',
        ns_steps: int = 5,
        ns_dtype: str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        if adjust_lr not in ADJUSTMENTS:
            raise ValueError(
                f'optim_wrapper.optimizer.adjust_lr={adjust_lr!r} is unknown.'
                f'{did_you_mean(adjust_lr, ADJUSTMENTS)}'
            )
        if not 0 <= momentum < 1:
            raise ValueError(f'optim_wrapper.optimizer.momentum={momentum!r} must lie in [0, 1)')
        if not 1 <= ns_steps < 100:
            raise ValueError(f'optim_wrapper.optimizer.ns_steps={ns_steps!r} must lie in [1, 99]')
        check_numbers(
            {
                'lr': lr,
                'matrix_lr': matrix_lr,
                'weight_decay': weight_decay,
                'betas': betas,
                'eps': eps,
            }
        )
        if ns_dtype is not None:
            dtype_of(ns_dtype, 'optim_wrapper.optimizer.ns_dtype')
        groups = list(params)
        if not any(isinstance(group, dict) and group.get('muon') for group in groups):
            raise ValueError(
                'MuonAdamW: no parameter group says muon=True; '
                'optim_wrapper.constructor=DecayGroupsConstructor makes groups that do'
            )
        for group in groups:
            if group.get('muon') and matrix_lr is not None:
                group.setdefault('lr', matrix_lr)
        # The part that is plain AdamW is torch's own, over the same groups and the same state.
        self._adamw = AdamW(
            [{'params': []}], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )
        own = {
            'muon': False,
            'momentum': momentum,
            'nesterov': nesterov,
            'adjust_lr': adjust_lr,
            'ns_steps': ns_steps,
            'ns_dtype': ns_dtype,
        }
        super().__init__(groups, {**self._adamw.defaults, **own})
        for group in self.param_groups:
            for parameter in group['params'] if group['muon'] else ():
                if parameter.ndim != 2:
                    raise ValueError(
                        f'MuonAdamW: a group with muon=True holds {list(parameter.shape)}, '
                        'which is no matrix'
                    )

    @staticmethod
    def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
        """Matrices of the layers; other tensors that decay, as embedding and head; the rest.

        All three, also where one is empty, so that the stages of a pipeline have the same.

        Raises:
            ValueError: If `layers` has no matrix to train.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        chosen = {name for name, p in named if name.startswith('layers.') and p.ndim == 2}
        if not chosen:
            raise ValueError(
                f'MuonAdamW: {type(model).__name__} has no trainable matrices in `layers`; '
                'AdamW needs none'
            )
        return [
            {'params': [p for name, p in named if name in chosen], 'muon': True},
            {'params': [p for name, p in named if name not in chosen and p.ndim >= 2]},
            {'params': [p for _, p in named if p.ndim < 2], 'weight_decay': 0.0},
        ]

    @staticmethod
    def state_bytes(
        parameter: Tensor,  # noqa: ARG004  any is alike
        group: dict[str, Any],
        master_bytes: int,
    ) -> tuple[float, int]:
        """What a parameter's state takes: bytes for each of its numbers, and besides."""
        return (master_bytes, 0) if group['muon'] else (2.0 * master_bytes, 4)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts. Collective over the ranks that share matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group['muon']]
        self._adamw.step()
        self._move_momentum()
        for deal, entries in self._deals():
            _step_matrices(deal, entries)
        return loss

    def _move_momentum(self) -> None:
        for group in self.param_groups:
            trained = [p for p in group['params'] if p.grad is not None] if group['muon'] else []
            for parameter in trained:
                if 'momentum_buffer' not in self.state[parameter]:
                    buffer = torch.zeros_like(parameter, requires_grad=False)
                    self.state[parameter]['momentum_buffer'] = buffer
            if trained:
                torch._foreach_lerp_(
                    [local_tensor(self.state[p]['momentum_buffer']) for p in trained],
                    [local_tensor(p.grad) for p in trained],
                    1 - group['momentum'],
                )

    def _deals(self) -> 'Iterator[tuple[MatrixDeal, list[_Entry]]]':
        """Matrices that are cut alike, the largest first, so that ranks get equal work."""
        alike: dict[Any, list[_Entry]] = {}
        for group in self.param_groups:
            for parameter in group['params'] if group['muon'] else ():
                if parameter.grad is not None:
                    entry = _Entry(parameter, self.state[parameter]['momentum_buffer'], group)
                    cuts: Any = None
                    if isinstance(parameter, DTensor):
                        cuts = (parameter.device_mesh, tuple(parameter.placements))
                    key = (cuts, entry.dtype, entry.device, group['ns_steps'])
                    alike.setdefault(key, []).append(entry)
        for (_, dtype, device, _), entries in alike.items():
            entries.sort(key=lambda entry: (-entry.parameter.numel(), tuple(entry.parameter.shape)))
            yield MatrixDeal(entries[0].parameter, dtype, device), entries


class _Entry:
    """A matrix, its momentum and its options."""

    def __init__(self, parameter: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
        self.parameter, self.buffer, self.group = parameter, buffer, group

    @property
    def dtype(self) -> torch.dtype:
        """What the iteration computes in."""
        if self.group['ns_dtype'] is not None:
            return dtype_of(self.group['ns_dtype'], 'optim_wrapper.optimizer.ns_dtype')
        is_wide = self.parameter.dtype == torch.float64
        return torch.float64 if is_wide else torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where it does: parameters that are offloaded still have their GPU."""
        if isinstance(self.parameter, DTensor):
            return torch.device(self.parameter.device_mesh.device_type)
        return self.parameter.device

    def direction(self) -> Tensor:
        """This rank's part of what is made orthogonal, where and in what that is computed."""
        gradient = self.parameter.grad
        assert gradient is not None
        found = local_tensor(self.buffer)
        if self.group['nesterov']:
            found = local_tensor(gradient).lerp(found, self.group['momentum'])
        return found.to(device=self.device, dtype=self.dtype)

    def apply(self, update: Tensor) -> None:
        """Take this rank's part of the step."""
        rows, columns = self.parameter.shape
        rate = self.group['lr']
        if self.group['adjust_lr'] == 'original':
            adjusted = rate * math.sqrt(max(1.0, rows / columns))
        else:
            adjusted = rate * 0.2 * math.sqrt(max(rows, columns))
        local = local_tensor(self.parameter)
        local.mul_(1 - rate * self.group['weight_decay'])
        local.add_(update.to(local.device), alpha=-adjusted)


def _step_matrices(deal: MatrixDeal, entries: list[_Entry]) -> None:
    """Update matrices that are cut alike.

    They come in rounds, so that little is held whole at a time. While a round is worked on, the
    next one travels.
    """
    started: tuple[list[_Entry], list[Matrix], Gathering] | None = None
    for following in chain(_rounds(deal, entries), [None]):
        current = started
        if following is not None:
            chosen, matrices = following
            gathering = deal.gather(matrices, [entry.direction() for entry in chosen])
            started = chosen, matrices, gathering
        if current is not None:
            chosen, matrices, gathering = current
            steps = chosen[0].group['ns_steps']
            results = {n: orthogonalize(whole, steps) for n, whole in gathering.wait().items()}
            for entry, update in zip(chosen, deal.scatter(matrices, results), strict=True):
                entry.apply(update)


def _rounds(deal: MatrixDeal, entries: list[_Entry]) -> Iterator[tuple[list[_Entry], list[Matrix]]]:
    """As many matrices at a time as give every rank its share of `ROUND_BYTES`."""
    start = 0
    while start < len(entries):
        largest = entries[start].parameter.numel() * entries[start].dtype.itemsize
        count = deal.ranks * max(1, ROUND_BYTES // max(largest, 1))
        chosen = entries[start : start + count]
        numbers = range(start, start + len(chosen))
        yield (
            chosen,
            [
                Matrix(number, tuple(entry.parameter.shape))
                for number, entry in zip(numbers, chosen, strict=True)
            ],
        )
        start += count
