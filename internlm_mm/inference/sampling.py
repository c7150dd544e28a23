"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of factors of logits: with others, float32 ends in infinities, of which nothing can be drawn.
_LEAST, _MOST = 1e-6, 1e6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: Most tokens to add to a prompt; the model's longest sequence may end it
            sooner.
        temperature: Divides the logits; 0 takes the likeliest token and draws nothing.
        top_k: Draw from the k likeliest tokens only; None for all.
        top_p: Draw from the fewest tokens whose probabilities add up to this, in (0, 1].
        repetition_penalty: Logits of tokens that the prompt or the answer holds already are
            divided by this where they are positive and multiplied where they are negative; 1 for
            none. It counts at temperature 0, too.
        stop_ids: Tokens that end a text, besides the tokenizer's `eos_id`; not part of it.
        stop: Strings that end a text, wherever tokens begin and end; not part of it.
        seed: Of the draws; None for another one every time.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f'max_new_tokens={self.max_new_tokens} must be at least 1')
        if not (self.temperature == 0 or _LEAST <= self.temperature <= _MOST):
            raise ValueError(f'temperature={self.temperature} must be 0, or {_LEAST} to {_MOST:g}')
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f'top_k={self.top_k} must be at least 1')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p={self.top_p} is not in (0, 1]')
        if not _LEAST <= self.repetition_penalty <= _MOST:
            raise ValueError(
                f'repetition_penalty={self.repetition_penalty} must be {_LEAST} to {_MOST:g}'
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f'seed={self.seed} must have 64 bits at most')
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f'stop={self.stop!r} must be a tuple of strings that are not empty')


class SeenTokens:
    """Which tokens each row holds already, for the repetition penalty.

    Args:
        input_ids: The prompts, [rows, seq]; filled up with tokens of their own.
        vocab_size: Columns of the logits.
        penalty: See `Sampling.repetition_penalty`.

    Source: the penalised sampling of https://arxiv.org/abs/1909.05858, section 4.1.
    """

    def __init__(self, input_ids: Tensor, vocab_size: int, penalty: float) -> None:
        self.penalty = penalty
        shape = (input_ids.shape[0], vocab_size)
        self._seen = torch.zeros(shape, dtype=torch.bool, device=input_ids.device)
        self.add(input_ids)

    def add(self, tokens: Tensor) -> None:
        """Take note of tokens, [rows, new]."""
        self._seen.scatter_(1, tokens, True)

    def penalise(self, logits: Tensor) -> Tensor:
        """Logits with those of seen tokens made smaller (larger below a penalty of 1)."""
        smaller = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(self._seen, smaller, logits)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, at a temperature above 0.

    Args:
        logits: [rows, vocab], float32, the repetition penalty in them.
        sampling: How.

    Returns:
        [rows, vocab], float32; 0 for tokens that are left out.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float('-inf'))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        # A token stays if those before it have not yet reached top_p; so the first always does.
        surplus = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(surplus.gather(-1, order.argsort()), float('-inf'))
    return logits.softmax(-1)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose one token a row.

    Args:
        logits: [rows, vocab], float32.
        sampling: How.
        generator: On the device of `logits`.

    Returns:
        [rows], int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chosen = torch.multinomial(probabilities(logits, sampling), 1, generator=generator)
    return chosen.squeeze(1)
