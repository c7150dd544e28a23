"""Text from a model: batches and streams over a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from internlm_mm.inference.sampling import Sampling, SeenTokens, draw
from internlm_mm.inference.text_stream import TextStream, Written
from internlm_mm.tokenizers import Tokenizer


class Generator:
    """A model and its tokenizer, ready to continue texts.

    Args:
        model: In evaluation mode on its device; gives `hidden_states`, `lm_head`, `make_cache` and
            `max_seq_len`.
        tokenizer: Turns prompts into tokens; may be None where only `generate_ids` is used.
        add_bos: Whether a prompt begins with the tokenizer's bos, as documents in training did.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer | None, add_bos: bool = True) -> None:
        if model.lm_head is None:
            raise ValueError('this is a reward model: it gives scores to answers and writes none')
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
        written = self.continue_ids([self._encode(prompt) for prompt in prompts], sampling)
        return [str(text) for text in written]

    def continue_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None
    ) -> list[Written]:
        """Continue several prompts of tokens at once; as they are: nothing is put in front.

        Args:
            prompts: Tokens of each prompt; lengths may differ, none may be empty.
            sampling: How to draw; greedily by default.

        Returns:
            What was added to each prompt, as text that knows whether it is whole.
        """
        texts = ['' for _ in prompts]
        whole = [True] * len(prompts)
        for pieces in self._pieces(prompts, sampling or Sampling(), whole):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return [Written(text, ended) for text, ended in zip(texts, whole, strict=True)]

    def stream(self, prompt: str, sampling: Sampling | None = None) -> Iterator[str]:
        """Continue one prompt, giving each piece of text as soon as it is known.

        Args:
            prompt: The text to continue.
            sampling: How to draw; greedily by default.

        Yields:
            Pieces that, joined, are what `generate` returns.
        """
        return self.stream_ids(self._encode(prompt), sampling)

    def stream_ids(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Iterator[str]:
        """Continue a prompt of tokens, giving each piece of text as soon as it is known.

        Args:
            prompt: Its tokens as they are: nothing is put in front.
            sampling: How to draw; greedily by default.

        Yields:
            Pieces of text; an empty one where a token adds none yet, so that whoever listens can
            leave after every token.
        """
        for (piece,) in self._pieces([prompt], sampling or Sampling()):
            yield piece

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        ends: Callable[[int, int], bool] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue several prompts of tokens, step by step.

        Drawn greedily, every row is what it would be alone. Draws of a batch come from one
        sequence of random numbers, so that rows with the same prompt differ.

        Args:
            prompts: Tokens of each prompt; lengths may differ, none may be empty.
            sampling: How to draw; without `stop`, which is for texts.
            ends: Told each new token with its row before it, `ends(row, token)`; True ends the row
                after it.

        Returns:
            Iterator over the next token of each row, None for rows that have ended. Ends when all
            have.

        Raises:
            ValueError: If a prompt is empty or leaves no room for a token, or `stop` is set.
        """
        if sampling.stop:
            raise ValueError(f'stop={sampling.stop!r} is for texts; give tokens as stop_ids')
        room = [self._room(prompt, sampling.max_new_tokens) for prompt in prompts]
        return self._steps(prompts, room, sampling, ends)

    @torch.inference_mode()
    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        room: Sequence[int],
        sampling: Sampling,
        ends: Callable[[int, int], bool] | None,
    ) -> Iterator[list[int | None]]:
        if not prompts:
            return
        longest = max(map(len, prompts))
        # Padded on the right: a row's later tokens overwrite its padding in the cache. Padding is
        # a token that the row has anyway, which a repetition penalty then counts as it should.
        padded = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
        input_ids = torch.tensor(padded, device=self.device)
        rows = torch.arange(len(prompts), device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        # Rows that have ended stay in the batch, and write to their last slot again and again.
        ends_at = lengths + torch.tensor(room, device=self.device) - 1
        position_ids = torch.arange(longest, device=self.device).expand_as(input_ids)
        cache = self.model.make_cache(len(prompts), longest + max(room))
        generator = self._random(sampling.seed)
        seen = self._seen(input_ids, sampling)
        last = lengths - 1
        # Of prompts without their padding; later on the last position tells.
        written: Tensor | None = lengths.unsqueeze(1)
        ended = [False] * len(prompts)
        for step in range(max(room)):
            hidden = self.model.hidden_states(input_ids, position_ids, None, cache, None, written)
            written = None
            logits = self.model.lm_head(hidden[rows, last]).float()
            if seen is not None:
                logits = seen.penalise(logits)
            tokens = draw(logits, sampling, generator)
            chosen: list[int | None] = []
            for row, token in enumerate(tokens.tolist()):  # the one wait for the device
                ended[row] = ended[row] or token in sampling.stop_ids
                chosen.append(None if ended[row] else token)
                if not ended[row]:
                    stopped = ends is not None and ends(row, token)
                    ended[row] = stopped or step + 1 == room[row]
            if all(token is None for token in chosen):
                return
            yield chosen
            if all(ended):
                return
            input_ids = tokens.unsqueeze(1)
            position_ids = torch.minimum(lengths + step, ends_at).unsqueeze(1)
            last = torch.zeros_like(lengths)
            if seen is not None:
                seen.add(input_ids)

    def _pieces(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        whole: list[bool] | None = None,
    ) -> Iterator[list[str]]:
        """What each step adds to the text of each row; in the end, `whole` says which ended."""
        tokenizer = self._tokenizer()
        texts = [TextStream(tokenizer.decode, sampling.stop) for _ in prompts]
        new = [''] * len(prompts)
        added = [0] * len(prompts)

        def ends(row: int, token: int) -> bool:
            added[row] += 1
            new[row] = texts[row].push(token)
            return texts[row].stopped

        for _ in self.generate_ids(prompts, self._for_tokens(sampling), ends):
            yield list(new)
            new[:] = [''] * len(prompts)
        last = [text.finish() for text in texts]
        if whole is not None:
            room = [self._room(prompt, sampling.max_new_tokens) for prompt in prompts]
            rows = zip(texts, added, room, strict=True)
            whole[:] = [text.stopped or count < most for text, count, most in rows]
        yield last

    def _room(self, prompt: Sequence[int], wanted: int) -> int:
        """Tokens that can be added to a prompt, at most `wanted`."""
        if not prompt:
            raise ValueError('a prompt is empty and the tokenizer has no token to begin with')
        room = self.model.max_seq_len - len(prompt)
        if room < 1:
            raise ValueError(
                f'a prompt of {len(prompt)} tokens leaves no room in '
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

    def _for_tokens(self, sampling: Sampling) -> Sampling:
        """The part that concerns tokens, the tokenizer's eos among those that end a row."""
        eos = self._tokenizer().eos_id
        stop_ids = sampling.stop_ids
        if eos is not None and eos not in stop_ids:
            stop_ids = (*stop_ids, eos)
        return dataclasses.replace(sampling, stop_ids=stop_ids, stop=())

    def _seen(self, input_ids: Tensor, sampling: Sampling) -> SeenTokens | None:
        if sampling.repetition_penalty == 1:
            return None
        vocab_size = self.model.lm_head.weight.shape[0]
        return SeenTokens(input_ids, vocab_size, sampling.repetition_penalty)

    def _random(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator
