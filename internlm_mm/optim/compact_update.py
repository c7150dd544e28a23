"""One update of AdamW whose moments are in few bits, in one kernel where there is a compiler."""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm_mm.utils.inductor import known_options, look_for_vectors

WIDTH = 64
"""Numbers in a row of what is compiled, where no blocks say so: rows of whole vectors."""

COMPILED_FROM = 2**25
"""Of how many numbers on a CPU the update is worth the seconds that a compiler takes."""

HELD = ('exp_avg', 'exp_avg_sq', 'exp_avg_scale', 'exp_avg_sq_scale')
"""What a parameter's state may be made of, scales only where it is in 8 bits."""

AT_ONCE = 2**16
"""About how many numbers a thread of a CPU updates at once, operation by operation."""

AT_ONCE_IN_BLOCKS = 2**18
"""Likewise in kernels for 8 bits, which hold less in between: caches hold it. A kernel for others
holds nothing in between, and threads that wait for each other less often lose less to whatever
else wants a core."""

AT_ONCE_ON_GPU = 2**26
"""About how many numbers a GPU updates at once, operation by operation."""


_ROWS, _TRIED_LR = 96, 0.1
"""Of the trial of a kernel; other rows than WIDTH, or their being equal would be compiled in."""


class Rates(NamedTuple):
    """What an update multiplies with and adds."""

    numbers: Tensor
    """Of the precision that is computed in: weight of a gradient in the first moment, decay and
    weight in the second, correction of its root, eps, decay of the weight, rate."""
    salts: Tensor
    """int32: for the first and for the second moment."""

    @classmethod
    def of(cls, step: int, group: dict[str, Any], like: Tensor) -> 'Rates':
        """For a step from 1 on and a group's options, where `like` is."""
        beta1, beta2 = group['betas']
        numbers = (
            1 - beta1,
            beta2,
            1 - beta2,
            math.sqrt(1 - beta2**step),
            group['eps'],
            1 - group['lr'] * group['weight_decay'],
            -group['lr'] / (1 - beta1**step),
        )
        salts = [salt_of(number) for number in (2 * step, 2 * step + 1)]
        precise = torch.promote_types(like.dtype, torch.float32)
        return cls(
            torch.tensor(numbers, dtype=precise).to(like.device, non_blocking=True),
            torch.tensor(salts, dtype=torch.int32).to(like.device, non_blocking=True),
        )


def salt_of(number: int) -> int:
    """What `round_by_hash` takes: the number spread over 32 bits with a sign."""
    return (number * 0x85EBCA6B + 2**31) % 2**32 - 2**31


def round_by_hash(values: Tensor, salt: Tensor) -> Tensor:
    """The bfloat16 below or above, at random, right on average.

    Rounding to the nearest would lose every change that is smaller than half a unit, and a moving
    average makes only such changes. What is random is a hash of the number and of the step, so
    that the result depends neither on a generator nor on which rank holds what.

    Args:
        values: fp32, finite.
        salt: int32 of no dimension, from `salt_of`; differs from step to step.
    """
    bits = values.view(torch.int32) + (_hash(values, salt) >> 16 & 0xFFFF)
    # The upper half of an fp32 number is a bfloat16: what is converted is one already.
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


def to_levels(values: Tensor, levels: int, salt: Tensor) -> Tensor:
    """Numbers in [-1, 1] as `sign * (k / levels) ** 2`, k whole: finer where they are smaller.

    Of the two neighbours one is taken at random, right on average, as in `round_by_hash`.

    Args:
        values: fp32.
        levels: Largest k.
        salt: As in `round_by_hash`.

    Returns:
        k with the number's sign, fp32.
    """
    exact = values.abs().clamp(max=1.0).sqrt() * levels
    below = exact.floor()
    share = (exact * exact - below * below) / (below * 2 + 1)
    drawn = (_hash(values, salt) >> 8 & 0xFFFFFF).to(torch.float32) * 2.0**-24
    return (below + (drawn < share).to(torch.float32)).copysign(values)


def _hash(values: Tensor, salt: Tensor) -> Tensor:
    """32 mixed bits of each number, after MurmurHash3's last steps; the upper ones are best."""
    mixed = values.view(torch.int32) * -1640531535 + salt
    mixed = (mixed ^ (mixed >> 15)) * -2048144789
    return (mixed ^ (mixed >> 13)) * -1028477387


def update_rows(weight: Tensor, gradient: Tensor, held: dict[str, Tensor], rates: Rates) -> None:
    """Update weights and moments in place.

    Args:
        weight: Updated, [..., columns].
        gradient: Of the same shape.
        held: 'exp_avg' and 'exp_avg_sq' of the same shape, in bfloat16, 8 bits or the weights'
            precision; in 8 bits also their scales, 'exp_avg_scale' and 'exp_avg_sq_scale',
            [..., columns / block].
        rates: Of this step.
    """
    rise, decay, square_rise, correction, eps, keeps, rate = rates.numbers.unbind()
    gradient = gradient.to(rise.dtype)
    first = _read(held, 'exp_avg', rise.dtype)
    first = first + (gradient - first) * rise
    second = _read(held, 'exp_avg_sq', rise.dtype)
    holds_root = 'exp_avg_sq_scale' in held
    if holds_root:
        second = second * second
    second = second * decay + gradient * gradient * square_rise
    root = second.sqrt()
    _write(held, 'exp_avg', first, rates.salts[0])
    _write(held, 'exp_avg_sq', root if holds_root else second, rates.salts[1])
    weight.copy_(weight * keeps + first / (root / correction + eps) * rate)


def _read(held: dict[str, Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    """A moment as numbers."""
    codes = held[kind]
    values = codes.to(dtype)
    if f'{kind}_scale' not in held:
        return values
    scale = held[f'{kind}_scale'] / torch.iinfo(codes.dtype).max ** 2
    blocks = (values * values.abs()).view(*scale.shape, -1)
    return (blocks * scale.unsqueeze(-1)).view(values.shape)


def _write(held: dict[str, Tensor], kind: str, values: Tensor, salt: Tensor) -> None:
    codes = held[kind]
    if codes.dtype == torch.bfloat16:
        codes.copy_(round_by_hash(values.to(torch.float32), salt))
        return
    if f'{kind}_scale' not in held:
        codes.copy_(values)
        return
    values = values.to(torch.float32)
    blocks = values.view(*held[f'{kind}_scale'].shape, -1)
    scale = blocks.abs().amax(-1).clamp(min=1e-30)
    levels = to_levels(blocks / scale.unsqueeze(-1), torch.iinfo(codes.dtype).max, salt)
    codes.copy_(levels.view(codes.shape))
    held[f'{kind}_scale'].copy_(scale)


# ----------------------------------------------------------------------------------- compiled


class _Kind(NamedTuple):
    """What is compiled once."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    """Of weight, gradient and what is held."""
    shape: tuple[int, ...]
    """Of a few rows."""


def update(
    weight: Tensor, gradient: Tensor, held: dict[str, Tensor], rates: Rates, compiled: bool
) -> None:
    """Update weights and moments in place, as `update_rows` does.

    A kernel and single operations may differ in the last bits, since a library takes roots.

    Args:
        weight: As in `update_rows`, of one dimension or more.
        gradient: As in `update_rows`.
        held: As in `update_rows`.
        rates: Of this step.
        compiled: Whether by a kernel, where the tensors' layout and this machine allow one.
    """
    run: Callable[..., None] = update_rows
    tensors = {'weight': weight, 'gradient': gradient}
    tensors |= {name: held[name] for name in HELD if name in held}
    if compiled and all(x.is_contiguous() for x in tensors.values()):
        scale = held.get('exp_avg_scale')
        width = WIDTH if scale is None else weight.shape[-1] // scale.shape[-1]
        count, left = divmod(weight.numel(), width)
        rows = {name: x.view(-1) if left else x.view(count, -1) for name, x in tensors.items()}
        dtypes = tuple(x.dtype for x in rows.values())
        kind = _Kind(weight.device, dtypes, (_ROWS, *rows['weight'].shape[1:]))
        # A single row would be compiled anew, as all that has a size of one.
        if len(rows['weight']) > 1 and _can_be_compiled(kind):
            run, tensors = _compiled(), rows
    for part in _parts(tensors, run is not update_rows):
        given = part.pop('weight'), part.pop('gradient'), part, rates
        try:
            run(*given)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:  # before it wrote anything
            _tell(weight.device, _first_line(error))
            update_rows(*given)


def _parts(tensors: dict[str, Tensor], compiled: bool) -> Iterator[dict[str, Tensor]]:
    """The same rows of all tensors, as many as are updated at once."""
    weight = tensors['weight']
    at_once = weight.numel()
    if weight.device.type != 'cpu':
        at_once = at_once if compiled else AT_ONCE_ON_GPU
    elif not compiled:
        at_once = torch.get_num_threads() * AT_ONCE
    elif 'exp_avg_scale' in tensors:
        at_once = torch.get_num_threads() * AT_ONCE_IN_BLOCKS
    rows = max(1, at_once * len(weight) // weight.numel())
    for start in range(0, len(weight), rows):
        yield {name: x[start : start + rows] for name, x in tensors.items()}


@cache
def _compiled() -> Callable[..., None]:
    # The few rows of the trial are too little work for many threads: inductor would write a kernel
    # for one, and keep it for all that comes.
    options = known_options({'cpp.dynamic_threads': True})
    return torch.compile(update_rows, dynamic=True, fullgraph=True, options=options)


@cache
def _can_be_compiled(kind: _Kind) -> bool:
    """Whether a kernel computes what single operations do; a few rows are tried.

    It is told once if not.
    """
    options = {'betas': (0.9, 0.95), 'eps': 1e-8, 'lr': _TRIED_LR, 'weight_decay': 0.1}
    found: list[Tensor] = []
    try:
        if kind.device.type == 'cpu':
            look_for_vectors().join()
        for run in (update_rows, _compiled()):
            weight, gradient, held = _few_rows(kind)
            for step in (1, 2):  # the second one reads what the first has written
                run(weight, gradient, held, Rates.of(step, options, weight))
            found.append(weight)
        # What is drawn otherwise changes a moment of 8 bits by up to a tenth.
        near = 2 * torch.finfo(found[0].dtype).eps
        if not torch.allclose(found[0], found[1], rtol=near, atol=near + 0.2 * _TRIED_LR):
            raise RuntimeError('its kernel computes something else')
    except Exception as error:  # whatever a compiler raises
        _tell(kind.device, _first_line(error))
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__


def _tell(device: torch.device, why: str) -> None:
    # On every rank: copies of a model that compute otherwise drift apart in the last bits.
    warnings.warn(
        f'CompactAdamW is not compiled on {device}: {why}. Its updates take several times as long',
        stacklevel=3,
    )


def _few_rows(kind: _Kind) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weight = torch.linspace(-1, 1, math.prod(kind.shape), device=kind.device).view(kind.shape)
    made = [weight, (weight * 7).sin(), weight * 0, weight * 0]
    if len(kind.dtypes) > len(made):
        made += [weight.new_zeros(len(weight), 1)] * 2
    tensors = [x.to(dtype, copy=True) for x, dtype in zip(made, kind.dtypes, strict=True)]
    return tensors[0], tensors[1], dict(zip(HELD, tensors[2:], strict=False))
