"""Rotary position embedding, https://arxiv.org/abs/2104.09864, with the half-split layout.

Also its variants for sequences that are longer than those of training, under transformers' names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm_mm.utils.suggest import did_you_mean

_LENGTH = 'original_max_position_embeddings'
# Keys besides rope_type: those that must be there, and those that may.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'default': ((), ()),
    'linear': (('factor',), ()),
    'dynamic': (('factor',), (_LENGTH,)),
    'yarn': (
        ('factor', _LENGTH),
        ('attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'),
    ),
    'llama3': (('factor', 'low_freq_factor', 'high_freq_factor', _LENGTH), ()),
}
ROPE_TYPES = tuple(_KEYS)
"""Kinds of rotary embedding, as transformers names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for longer sequences; see `read_scaling`.

    Attributes:
        rope_type: One of `ROPE_TYPES`.
        original_length: Longest sequence of training, in tokens.
        factor: How many times as long sequences become.
        low_freq_factor: llama3: waves longer than `original_length` divided by this are stretched
            in full.
        high_freq_factor: llama3: waves shorter than `original_length` divided by this are kept.
        attention_factor: yarn: multiplies cosines and sines; from `factor` and the two `mscale` if
            None.
        beta_fast: yarn: a frequency with more turns than this in `original_length` is kept.
        beta_slow: yarn: one with fewer turns than this is stretched in full.
        mscale: yarn: see `attention_factor`.
        mscale_all_dim: yarn: see `attention_factor`.
        truncate: yarn: whether the two bounds are rounded outwards to whole channels.
    """

    rope_type: str
    original_length: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies follow from how long a sequence is."""
        return self.rope_type == 'dynamic'

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_type != 'yarn':
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def frequencies(
        self, head_dim: int, theta: float, lengths: Tensor | None, device: torch.device
    ) -> Tensor:
        """By how much each pair of channels turns from one token to the next, in radians.

        Args:
            head_dim: Width of one head.
            theta: Base of the wavelengths.
            lengths: See `rope_table`.
            device: Of the result.

        Returns:
            float32, [head_dim // 2], or where frequencies follow from `lengths`,
            [*lengths.shape, head_dim // 2].
        """
        plain = _frequencies(head_dim, theta, device)
        if self.rope_type == 'dynamic' and lengths is not None:
            return self._dynamic(plain, head_dim, theta, lengths)
        if self.rope_type == 'linear':
            return plain / self.factor
        if self.rope_type == 'yarn':
            return self._yarn(plain, head_dim, theta)
        return self._llama3(plain) if self.rope_type == 'llama3' else plain

    def _dynamic(self, plain: Tensor, head_dim: int, theta: float, lengths: Tensor) -> Tensor:
        """A larger base, so that the longest wave is stretched as much as the sequence is.

        Source: "NTK-aware" scaling by u/bloc97 and u/emozilla, as in transformers.
        """
        # In float64, so that no rounding depends on how many tokens are computed together.
        exponent = torch.arange(0, head_dim, 2, device=lengths.device, dtype=torch.float64)
        stretch = self.factor * lengths.double() / self.original_length - (self.factor - 1)
        base = theta * stretch.clamp(min=1) ** (head_dim / (head_dim - 2))
        stretched = base.unsqueeze(-1) ** (-exponent / head_dim)
        is_longer = (lengths > self.original_length).unsqueeze(-1)
        return torch.where(is_longer, stretched.float(), plain)

    def _yarn(self, plain: Tensor, head_dim: int, theta: float) -> Tensor:
        """Kept where a wave turns often, stretched where it turns seldom.

        Source: https://arxiv.org/abs/2309.00071, section 3.2.
        """
        low, high = (
            head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / 2 / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # as transformers has it, against a division by zero
        channel = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
        stretched = ((channel - low) / (high - low)).clamp(0, 1)
        return plain / self.factor * stretched + plain * (1 - stretched)

    def _llama3(self, plain: Tensor) -> Tensor:
        """Short waves kept, long ones stretched, and a slope in between.

        Source: https://arxiv.org/abs/2407.21783, section 3.2, as in transformers.
        """
        turns = self.original_length * plain / (2 * math.pi)  # in a sequence of training
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def read_scaling(
    scaling: Mapping[str, Any] | None, max_seq_len: int, head_dim: int
) -> RopeScaling | None:
    """Check a `rope_scaling` in transformers' words.

    Args:
        scaling: `rope_type`, one of `ROPE_TYPES`, and what belongs to it; None for 'default'.
        max_seq_len: Longest sequence, in tokens, which is what `original_max_position_embeddings`
            of 'dynamic' is where it is not given.
        head_dim: Width of one head.

    Returns:
        None for plain rotary embeddings.

    Raises:
        ValueError: If a key is unknown or missing or a value is out of its range; names it.
    """
    if scaling is None:
        return None
    given = dict(scaling)
    kind = given.pop('rope_type', None)
    if kind is None:
        raise ValueError(f"rope_scaling={given} has no 'rope_type'. Valid: {', '.join(ROPE_TYPES)}")
    if kind not in _KEYS:
        raise ValueError(
            f'rope_scaling.rope_type={kind!r} is unknown.{did_you_mean(kind, ROPE_TYPES)}'
        )
    required, optional = _KEYS[kind]
    for key, value in given.items():
        if key == 'rope_theta':
            raise ValueError(f'rope_scaling.rope_theta={value!r}: give it as rope_theta={value!r}')
        if key not in (*required, *optional):
            hint = did_you_mean(key, (*required, *optional))
            raise ValueError(f'rope_scaling.{key}={value!r}: {kind!r} has no such key.{hint}')
    given = {key: value for key, value in given.items() if value is not None}
    for key in required:
        if key not in given:
            raise ValueError(f'rope_scaling: {kind!r} needs {key!r}, it has {sorted(given)}')
    _check_values(kind, given)
    if kind == 'dynamic' and head_dim < 4:
        raise ValueError(f"rope_scaling: 'dynamic' needs head_dim of 4 or more, not {head_dim}")
    length = given.pop(_LENGTH, max_seq_len)
    return (
        None if kind == 'default' else RopeScaling(rope_type=kind, original_length=length, **given)
    )


def _check_values(kind: str, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == 'truncate':
            right, what = isinstance(value, bool), 'True or False'
        elif key == _LENGTH:
            right, what = is_number and isinstance(value, int) and value > 0, 'a positive integer'
        elif key == 'factor':
            right, what = is_number and 1 <= value < math.inf, 'a number of at least 1'
        else:
            right, what = is_number and 0 < value < math.inf, 'a positive number'
        if not right:
            raise ValueError(f'rope_scaling.{key}={value!r} must be {what}')
    for low, high, defaults in (
        ('low_freq_factor', 'high_freq_factor', (1.0, 4.0)),
        ('beta_slow', 'beta_fast', (1.0, 32.0)),
    ):
        less, more = given.get(low, defaults[0]), given.get(high, defaults[1])
        if less >= more:
            raise ValueError(
                f'rope_scaling: {low}={less} of {kind!r} must be smaller than {high}={more}'
            )


def rope_table(
    position_ids: Tensor,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Cosines and sines of the angle of every position, made once per forward.

    They are computed, not kept in a buffer: a model that is built on the meta device then has
    nothing but parameters to fill, and casting a model to half precision cannot round the angles.

    Args:
        position_ids: Position of each token in its document, [rows, seq].
        head_dim: Width of one head; even.
        theta: Base of the wavelengths.
        scaling: Of the frequencies, if any.
        lengths: Tokens in the document of each token, [rows, seq] or [rows, 1]; asked for by
            'dynamic' only, which takes every document for a short one if None.

    Returns:
        Cosines, then sines, [2, rows, seq, head_dim // 2], float32.
    """
    device = position_ids.device
    if scaling is None:
        frequency = _frequencies(head_dim, theta, device)
    else:
        frequency = scaling.frequencies(head_dim, theta, lengths, device)
    angle = position_ids.unsqueeze(-1).float() * frequency
    table = torch.stack((angle.cos(), angle.sin()))
    return table if scaling is None or scaling.scale == 1.0 else table * scaling.scale


def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return 1.0 / theta ** (exponent / head_dim)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channel i of each head together with channel i + head_dim // 2.

    Args:
        x: Queries or keys, [rows, seq, heads, head_dim].
        rope: From `rope_table`, [2, rows, seq, head_dim // 2]. Its dtype is the dtype of the
            arithmetic: float32 unless a caller cast it.

    Returns:
        [rows, seq, heads, head_dim] in the dtype of `x`.
    """
    cos, sin = rope.unsqueeze(-2).unbind(0)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
