"""AdamW that holds its moments in 16 or 8 bits."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from internlm_mm.optim.numbers import check_numbers
from internlm_mm.registry import OPTIMIZERS
from internlm_mm.utils.shards import local_tensor, zeros_cut_like
from internlm_mm.utils.suggest import did_you_mean

STATE_DTYPES = ('bfloat16', 'int8')

BLOCK = 64
"""Numbers of a row that share a scale, at most; a power of two that divides the row's parts."""

PARTS = 8
"""Into how many parts tensor parallelism may cut a row without cutting a block."""

SMALLEST_BLOCK = 16
"""With fewer, scales would take too much: such a tensor keeps its moments as they are."""

NUMBERS_AT_ONCE = 2**18
"""About how many numbers each thread of a CPU updates together: 1 MB of each tensor."""


class Scratch:
    """Memory for what is computed in between.

    Args:
        keeps: Whether memory under one name is the same each time. Large blocks that a CPU gives
            back come anew from the system, page by page, which takes longer than the arithmetic;
            GPUs have an allocator that keeps them.
    """

    def __init__(self, keeps: bool = False) -> None:
        self._keeps = keeps
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the shape of another, not filled; it is the caller's until the next one.

        Args:
            name: What is lent twice at a time has two names.
            like: Has the shape and device.
            dtype: As that tensor's if None.
        """
        dtype = like.dtype if dtype is None else dtype
        if not self._keeps:
            return torch.empty(like.shape, dtype=dtype, device=like.device)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < like.numel():
            held = torch.empty(like.numel(), dtype=dtype, device=like.device)
            self._held[name, dtype] = held
        return held[: like.numel()].view(like.shape)


def round_by_hash(
    values: Tensor, salt: int, into: Tensor | None = None, scratch: Scratch | None = None
) -> Tensor:
    """The bfloat16 below or above, at random, right on average.

    Rounding to the nearest would lose every change that is smaller than half a unit, and a moving
    average makes only such changes. What is random is a hash of the number and of the step, so
    that the result depends neither on a generator nor on which rank holds what.

    Args:
        values: fp32, finite; left alone.
        salt: Differs from step to step.
        into: Where the result goes; a new tensor if None.
        scratch: Where to compute.
    """
    into = torch.empty_like(values, dtype=torch.bfloat16) if into is None else into
    bits = _hash(values, salt, scratch or Scratch()).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    # The upper half of an fp32 number is a bfloat16.
    bits.add_(values.view(torch.int32)).bitwise_right_shift_(16)
    into.view(torch.int16).copy_(bits)
    return into


def to_levels(values: Tensor, levels: int, salt: int, scratch: Scratch | None = None) -> Tensor:
    """Numbers in [-1, 1] as `sign * (k / levels) ** 2`, k whole: finer where they are smaller.

    Of the two neighbours one is taken at random, right on average, as in `round_by_hash`.

    Args:
        values: fp32; left alone.
        levels: Largest k.
        salt: Differs from step to step.
        scratch: Where to compute; what is returned is lent from it.

    Returns:
        k with the number's sign, fp32.
    """
    scratch = scratch or Scratch()
    exact = torch.abs(values, out=scratch.take('exact', values))
    exact.clamp_(max=1.0).sqrt_().mul_(levels)
    below = torch.floor(exact, out=scratch.take('below', values))
    other = torch.square(below, out=scratch.take('other', values))
    share = exact.square_().sub_(other)
    share.div_(torch.mul(below, 2, out=other).add_(1))
    bits = _hash(values, salt, scratch).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    drawn = other.copy_(bits).mul_(2.0**-24)
    return below.add_(drawn.lt_(share)).copysign_(values)


def _hash(values: Tensor, salt: int, scratch: Scratch) -> Tensor:
    """32 mixed bits of each number, after MurmurHash3's last steps; the upper ones are best."""
    mixed = scratch.take('mixed', values, torch.int32)
    shifted = scratch.take('shifted', values, torch.int32)
    start = torch.tensor((salt * 0x85EBCA6B + 2**31) % 2**32 - 2**31, dtype=torch.int32)
    torch.add(start, values.view(torch.int32), alpha=-1640531535, out=mixed)
    mixed.bitwise_xor_(torch.bitwise_right_shift(mixed, 15, out=shifted)).mul_(-2048144789)
    mixed.bitwise_xor_(torch.bitwise_right_shift(mixed, 13, out=shifted)).mul_(-1028477387)
    return mixed


def block_of(columns: int) -> int:
    """How many numbers of a row share a scale; 0 if none would do."""
    block = math.gcd(columns // PARTS, BLOCK) if columns % PARTS == 0 else 0
    return block if block >= SMALLEST_BLOCK else 0


@OPTIMIZERS.register_module()
class CompactAdamW(Optimizer):
    """AdamW with the moments of matrices in bfloat16 or in 8 bits; the arithmetic is in fp32.

    Rounding is at random and right on average. In 8 bits every block of up to 64 numbers of a row
    has a scale of its own, and what is held of the second moment is its root, which has half as
    many decades. Blocks are parts of rows, so that state is the same on every layout, and a
    checkpoint of one goes on on another. Moments of norms and biases are held in full; in 8 bits,
    so are those of matrices whose rows are no multiple of 128.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        state_dtype: 'bfloat16' or 'int8'.

    Raises:
        ValueError: If an option is out of range, or a layout would cut a block of 8 bits.

    Source: bfloat16 moments: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.3; blocks
        of 8 bits: Dettmers et al., https://arxiv.org/abs/2110.02861.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str = 'bfloat16',
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(
                f'optim_wrapper.optimizer.state_dtype={state_dtype!r}.'
                f'{did_you_mean(state_dtype, STATE_DTYPES)}'
            )
        options = {'lr': lr, 'betas': betas, 'eps': eps, 'weight_decay': weight_decay}
        check_numbers(options)
        super().__init__(params, {**options, 'state_dtype': state_dtype})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group['state_dtype'] == 'int8':
            for parameter in group['params']:
                if parameter.ndim > 1:
                    _check_blocks(parameter)

    @staticmethod
    def state_bytes(
        parameter: Tensor, group: dict[str, Any], master_bytes: int
    ) -> tuple[float, int]:
        """What a parameter's state takes: bytes for each of its numbers, and besides."""
        if parameter.ndim > 1 and group['state_dtype'] == 'bfloat16':
            return 4.0, 4
        block = block_of(parameter.shape[-1]) if parameter.ndim > 1 else 0
        return (2 + 8 / block, 4) if block else (2.0 * master_bytes, 4)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Every rank works on its own parts; nothing is sent."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        on_cpu, elsewhere = Scratch(keeps=True), Scratch()
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None:
                    is_here = local_tensor(parameter).device.type == 'cpu'
                    scratch = on_cpu if is_here else elsewhere
                    self._update(parameter, parameter.grad, group, scratch)
        return loss

    def _update(
        self, parameter: Tensor, grad: Tensor, group: dict[str, Any], scratch: Scratch
    ) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, group['state_dtype'], state)
        state['step'] += 1
        step = int(state['step'].item())  # in host memory
        weight, gradient = local_tensor(parameter), local_tensor(grad)
        if not weight.numel():
            return
        weight, gradient = torch.atleast_1d(weight, gradient)
        held = {
            kind: torch.atleast_1d(local_tensor(value))
            for kind, value in state.items()
            if kind != 'step'
        }
        rows = _rows_at_once(weight)
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            parts = {kind: value[part] for kind, value in held.items()}
            _update_rows(weight[part], gradient[part], parts, step, group, scratch)

    @staticmethod
    def _begin(parameter: Tensor, state_dtype: str, state: dict[str, Tensor]) -> None:
        shape, is_matrix = tuple(parameter.shape), parameter.ndim > 1
        block = block_of(shape[-1]) if is_matrix and state_dtype == 'int8' else 0
        dtype = torch.bfloat16 if is_matrix and state_dtype == 'bfloat16' else parameter.dtype
        state['step'] = torch.zeros(())
        for kind, codes in (('exp_avg', torch.int8), ('exp_avg_sq', torch.uint8)):
            # Not `zeros_cut_like`: what is offloaded would be sent to the GPU and back.
            state[kind] = torch.zeros_like(parameter, dtype=codes if block else dtype)
            if block:
                scales = (*shape[:-1], shape[-1] // block)
                state[f'{kind}_scale'] = zeros_cut_like(parameter, scales, torch.float32)


def _rows_at_once(weight: Tensor) -> int:
    """How many rows are updated together: on a GPU all, on a CPU what stays in its caches."""
    if weight.device.type != 'cpu':
        return len(weight)
    numbers = NUMBERS_AT_ONCE * torch.get_num_threads()
    return max(1, numbers * len(weight) // weight.numel())


def _update_rows(
    weight: Tensor,
    gradient: Tensor,
    held: dict[str, Tensor],
    step: int,
    group: dict[str, Any],
    scratch: Scratch,
) -> None:
    beta1, beta2 = group['betas']
    first = scratch.take('first', weight)
    _read(held, 'exp_avg', first, scratch)
    first.lerp_(gradient, 1 - beta1)
    second = scratch.take('second', weight)
    _read(held, 'exp_avg_sq', second, scratch)
    holds_root = 'exp_avg_sq_scale' in held
    if holds_root:
        second.square_()
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if not holds_root:
        _write(held, 'exp_avg_sq', second, 2 * step + 1, scratch)
    root = second.sqrt_()
    if holds_root:
        _write(held, 'exp_avg_sq', root, 2 * step + 1, scratch)
    root.div_(math.sqrt(1 - beta2**step)).add_(group['eps'])
    weight.mul_(1 - group['lr'] * group['weight_decay'])
    weight.addcdiv_(first, root, value=-group['lr'] / (1 - beta1**step))
    _write(held, 'exp_avg', first, 2 * step, scratch)


def _check_blocks(parameter: Tensor) -> None:
    """Raise ValueError if a block would be cut."""
    columns, here = parameter.shape[-1], local_tensor(parameter).shape[-1]
    block = block_of(columns)
    if block and here % block:
        raise ValueError(
            "optim_wrapper.optimizer.state_dtype='int8': strategy.parallel.tensor cuts rows of "
            f'{columns} numbers into parts of {here}, which blocks of {block} do not fill; '
            "state_dtype='bfloat16' needs none"
        )


def _read(held: dict[str, Tensor], kind: str, into: Tensor, scratch: Scratch) -> None:
    """A moment as numbers."""
    codes = held[kind]
    into.copy_(codes)
    if f'{kind}_scale' in held:
        into.mul_(torch.abs(into, out=scratch.take('other', into)))
        scale = held[f'{kind}_scale'] / torch.iinfo(codes.dtype).max ** 2
        into.view(*scale.shape, into.shape[-1] // scale.shape[-1]).mul_(scale.unsqueeze(-1))


def _write(held: dict[str, Tensor], kind: str, values: Tensor, salt: int, scratch: Scratch) -> None:
    codes = held[kind]
    if codes.dtype == values.dtype:
        codes.copy_(values)
        return
    if values.dtype != torch.float32:
        values = scratch.take('values', values, torch.float32).copy_(values)
    if codes.dtype == torch.bfloat16:
        round_by_hash(values, salt, codes, scratch)
        return
    scale = held[f'{kind}_scale']
    blocks = values.view(*scale.shape, values.shape[-1] // scale.shape[-1])
    within = scratch.take('within', blocks)
    scale.copy_(torch.abs(blocks, out=within).amax(-1).clamp_(min=1e-30))
    torch.div(blocks, scale.unsqueeze(-1), out=within)
    levels = torch.iinfo(codes.dtype).max
    codes.copy_(to_levels(within, levels, salt, scratch).view(codes.shape))
