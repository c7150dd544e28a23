"""Text from a model: sampling with a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm_mm.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: Most tokens to add to a prompt; the model's longest sequence may end it
            sooner.
        temperature: Divides the logits; 0 takes the likeliest token and draws nothing.
        top_k: Draw from the k likeliest tokens only; None for all.
        top_p: Draw from the fewest tokens whose probabilities add up to this, in (0, 1].
        stop_ids: Tokens that end a text, besides the tokenizer's `eos_id`; not part of it.
        seed: Of the draws; None for another one every time.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f'max_new_tokens={self.max_new_tokens} must be at least 1')
        if self.temperature < 0:
            raise ValueError(f'temperature={self.temperature} must not be negative')
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f'top_k={self.top_k} must be at least 1')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p={self.top_p} is not in (0, 1]')


class Generator:
    """A model and its tokenizer, ready to continue texts.

    Args:
        model: In evaluation mode on its device; gives `hidden_states`, `lm_head`, `make_cache` and
            `max_seq_len`.
        tokenizer: Turns prompts into tokens; may be None where only `generate_ids` is used.
        add_bos: Whether a prompt begins with the tokenizer's bos, as documents in training did.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer | None, add_bos: bool = True) -> None:
        self.model = model
        self.add_bos = add_bos
        self.tokenizer = tokenizer
        self.device = model.embed_tokens.weight.device

    def generate(self, prompts: Sequence[str], sampling: Sampling | None = None) -> list[str]:
        """Continue several prompts at once.

        Args:
            prompts: Texts of any lengths.
            sampling: How to draw; greedily by default.

        Returns:
            What was added to each prompt.
        """
        added: list[list[int]] = [[] for _ in prompts]
        rows = [self._encode(prompt) for prompt in prompts]
        for tokens in self.generate_ids(rows, self._with_eos(sampling)):
            for row, token in zip(added, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return [self._tokenizer().decode(ids) for ids in added]

    def stream(self, prompt: str, sampling: Sampling | None = None) -> Iterator[str]:
        """Continue one prompt, giving each piece of text as soon as it is known.

        Args:
            prompt: The text to continue.
            sampling: How to draw; greedily by default.

        Yields:
            Pieces that, joined, are what `generate` returns.
        """
        tokenizer = self._tokenizer()
        ids: list[int] = []
        given = ''
        for (token,) in self.generate_ids([self._encode(prompt)], self._with_eos(sampling)):
            if token is not None:
                ids.append(token)
            text = tokenizer.decode(ids)
            # A replacement character at the end may be the first bytes of a longer character.
            if not text.endswith('\ufffd'):
                yield text[len(given) :]
                given = text
        if rest := tokenizer.decode(ids)[len(given) :]:
            yield rest

    @torch.inference_mode()
    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[list[int | None]]:
        """Continue several prompts of tokens, step by step.

        Args:
            prompts: Tokens of each prompt; lengths may differ, none may be empty.
            sampling: How to draw.

        Yields:
            The next token of each row, None for rows that have ended. Ends when all have.

        Raises:
            ValueError: If a prompt is empty or leaves no room for a token.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        steps = self._room(prompts, sampling.max_new_tokens)
        longest = max(map(len, prompts))
        # Padded on the right: a row's later tokens overwrite its padding in the cache.
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        input_ids = torch.tensor(padded, device=self.device)
        position_ids = torch.arange(longest, device=self.device).expand_as(input_ids)
        cache = self.model.make_cache(len(prompts), longest + steps)
        generator = self._random(sampling.seed)
        last = lengths - 1
        ended = [False] * len(prompts)
        for step in range(steps):
            hidden = self.model.hidden_states(input_ids, position_ids, None, cache)
            logits = self.model.lm_head(hidden[torch.arange(len(prompts)), last]).float()
            tokens = draw(logits, sampling, generator)
            chosen: list[int | None] = []
            for row, token in enumerate(tokens.tolist()):
                ended[row] = ended[row] or token in sampling.stop_ids
                chosen.append(None if ended[row] else token)
            if all(ended):
                return
            yield chosen
            input_ids = tokens.unsqueeze(1)
            position_ids = (lengths + step).unsqueeze(1)
            last = torch.zeros_like(lengths)

    def _room(self, prompts: Sequence[Sequence[int]], wanted: int) -> int:
        """Tokens that can be added to the longest prompt, at most `wanted`."""
        if not prompts or not all(prompts):
            raise ValueError('a prompt is empty and the tokenizer has no token to begin with')
        longest = max(map(len, prompts))
        room = self.model.max_seq_len - longest
        if room < 1:
            raise ValueError(
                f'a prompt of {longest} tokens leaves no room in '
                f'max_seq_len={self.model.max_seq_len}'
            )
        return min(room, wanted)

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._tokenizer()
        bos = [tokenizer.bos_id] if self.add_bos and tokenizer.bos_id is not None else []
        return [*bos, *tokenizer.encode(prompt)]

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                'this model has no tokenizer beside it: text cannot be read or written'
            )
        return self.tokenizer

    def _with_eos(self, sampling: Sampling | None) -> Sampling:
        sampling = sampling or Sampling()
        eos = self._tokenizer().eos_id
        if eos is None or eos in sampling.stop_ids:
            return sampling
        return dataclasses.replace(sampling, stop_ids=(*sampling.stop_ids, eos))

    def _random(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator


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
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
