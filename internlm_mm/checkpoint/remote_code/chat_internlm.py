"""`chat` and `stream_chat`: a dialogue with a model that knows InternLM's formats.

Needs nothing but torch and transformers >= 5.
"""

import re
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import BatchEncoding
from transformers.generation.streamers import BaseStreamer

History = list[tuple[str, str]]


class Chat:
    """What a causal language model of transformers needs to hold a dialogue.

    Attributes:
        marks: The format's own words; where a query spells one, it stays plain text.
        stop_marks: Those of them that end a response, as the tokenizer's eos does.
        default_meta_instruction: The system prompt, unless the caller gives one.
    """

    marks: tuple[str, ...]
    stop_marks: tuple[str, ...]
    default_meta_instruction = ''

    def prompt_pieces(
        self, query: str, history: Sequence[tuple[str, str]], meta_instruction: str
    ) -> list[tuple[str, str, str]]:
        """The turns of a dialogue, each as what the format puts before it, its text, and after."""
        raise NotImplementedError

    def build_inputs(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        meta_instruction: str | None = None,
    ) -> BatchEncoding:
        """What `generate` is given: one row of tokens, which begins with the tokenizer's bos.

        Args:
            tokenizer: Of the model.
            query: What the user says now.
            history: Pairs of query and response, oldest first.
            meta_instruction: The system prompt; '' for none, None for the model's own.

        Raises:
            ValueError: If a turn of `history` is no pair of texts.
        """
        for index, turn in enumerate(history or ()):
            if len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                raise ValueError(f'history[{index}] is {turn!r}: expected (query, response)')
        if meta_instruction is None:
            meta_instruction = self.default_meta_instruction
        ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        for before, text, after in self.prompt_pieces(query, history or (), meta_instruction):
            ids += tokenizer.encode(before, add_special_tokens=False)
            ids += self._plain_ids(tokenizer, text)
            ids += tokenizer.encode(after, add_special_tokens=False)
        row = torch.tensor([ids])
        return BatchEncoding({'input_ids': row, 'attention_mask': torch.ones_like(row)})

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        streamer: BaseStreamer | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer a query.

        Args:
            tokenizer: Of the model.
            query: What the user says now.
            history: Pairs of query and response, oldest first; not changed.
            streamer: Is given every token, as by `generate`.
            max_new_tokens: Longest response.
            do_sample: Whether to draw tokens; else the likeliest is taken.
            temperature: Of drawing.
            top_p: Share of the probability that is drawn from.
            meta_instruction: The system prompt; '' for none, None for the model's own.
            kwargs: Further arguments of `generate`.

        Returns:
            The response, and the history with this turn added.
        """
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        drawing = {'temperature': temperature, 'top_p': top_p} if do_sample else {}
        options = self._stops(tokenizer) | drawing | kwargs
        model: Any = self
        output = model.generate(
            **inputs.to(model.device),
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **options,
        )
        new_ids = output[0, inputs['input_ids'].shape[1] :].tolist()
        response = self._response(tokenizer, new_ids)
        return response, [*(history or ()), (query, response)]

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """As `chat`, while the response grows: the last that is given is the whole.

        Generation stops with the loop that reads from here, and an error in it is raised here.

        Yields:
            The response so far, and the history with it added; at least once.
        """
        tokens = _Tokens()

        def work() -> None:
            try:
                answer = self.chat(
                    tokenizer,
                    query,
                    history,
                    tokens,
                    max_new_tokens,
                    do_sample,
                    temperature,
                    top_p,
                    meta_instruction,
                    **kwargs,
                )
                tokens.queue.put(answer)
            except BaseException as error:  # or the reader would wait for ever
                tokens.queue.put(error)

        worker = Thread(target=work, daemon=True)
        worker.start()
        text = _GrowingText(tokenizer, self._stops(tokenizer)['eos_token_id'] or ())
        shown = ''
        try:
            while isinstance(item := tokens.queue.get(), list):
                response = self._until_mark(text.grow(item))
                if response not in ('', shown) and not self._may_change(response):
                    shown = response
                    yield response, [*(history or ()), (query, response)]
            if isinstance(item, BaseException):
                raise item
            if not shown or item[0] != shown:
                yield item
        finally:
            tokens.abandoned.set()
            worker.join()

    def _plain_ids(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of a text in which nothing is special, whatever it spells."""
        ids, start = [], 0
        # A mark is no special token in every tokenizer; none finds one that comes in two pieces.
        cuts = [
            match.start() + 1 for match in re.finditer('|'.join(map(re.escape, self.marks)), text)
        ]
        for end in (*cuts, len(text)):
            ids += tokenizer.encode(
                text[start:end], add_special_tokens=False, split_special_tokens=True
            )
            start = end
        return ids

    def _stops(self, tokenizer: Any) -> dict[str, Any]:
        """Arguments of `generate` that end a response where the format does."""
        found = {mark: _token_id(tokenizer, mark) for mark in self.stop_marks}
        model: Any = self
        configured = model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        ids = {tokenizer.eos_token_id, *configured, *found.values()} - {None}
        pad = tokenizer.pad_token_id
        stops = {
            'eos_token_id': sorted(ids) or None,
            'pad_token_id': tokenizer.eos_token_id if pad is None else pad,
        }
        spelt = [mark for mark, index in found.items() if index is None]
        return stops | ({'stop_strings': spelt, 'tokenizer': tokenizer} if spelt else {})

    def _response(self, tokenizer: Any, ids: list[int]) -> str:
        """Text of what was generated, without its end."""
        stops = self._stops(tokenizer)['eos_token_id'] or ()
        length = next((place for place, index in enumerate(ids) if index in stops), len(ids))
        return self._until_mark(tokenizer.decode(ids[:length], skip_special_tokens=True))

    def _until_mark(self, text: str) -> str:
        """What is before the first mark that ends a response."""
        return re.split('|'.join(map(re.escape, self.stop_marks)), text)[0]

    def _may_change(self, text: str) -> bool:
        """Whether the end of `text` may turn into something else: half a character or a mark."""
        half = any(
            text.endswith(mark[:length])
            for mark in self.stop_marks
            for length in range(1, len(mark))
        )
        return half or text.endswith('\ufffd')


class _Tokens(BaseStreamer):
    """Hands tokens from the thread that generates to the one that reads.

    Attributes:
        queue: New tokens, in lists; in the end what `chat` returned or raised.
        abandoned: Set when nobody reads any more, which ends generation.
    """

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | tuple[str, History] | BaseException] = SimpleQueue()
        self.abandoned = Event()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.abandoned.is_set():
            raise InterruptedError('nobody reads the response any more')
        if self._prompt_seen:
            self.queue.put(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing: the thread says itself when it is done."""


class _GrowingText:
    """Text of tokens that come one by one, each decoded with the few before it, not with all.

    Args:
        tokenizer: Decodes.
        stops: Tokens after which nothing counts.
    """

    _LONGEST, _KEPT = 48, 16  # tokens that are decoded at most, and kept as context

    def __init__(self, tokenizer: Any, stops: Sequence[int]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []  # the last ones
        self._before = ''  # the text of those before
        self._stopped = False

    def grow(self, ids: Sequence[int]) -> str:
        """Take tokens; return the text of all."""
        for index in ids:
            self._stopped = self._stopped or index in self._stops
            if not self._stopped:
                self._ids.append(index)
        text = self._decode(self._ids)
        # What ends in half a character may yet become another text, but not for long.
        longest = self._LONGEST * (2 if text.endswith('\ufffd') else 1)
        if len(self._ids) > longest:
            # Not within a character. Decoders strip the beginning, so it is the end that counts.
            for kept in range(self._KEPT, self._KEPT + 4):
                end = self._decode(self._ids[-kept:])
                if text.endswith(end):
                    self._before += text[: len(text) - len(end)]
                    self._ids, text = self._ids[-kept:], end
                    break
        return self._before + text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _token_id(tokenizer: Any, text: str) -> int | None:
    """Id of the token that is spelt `text`, or None."""
    index = tokenizer.convert_tokens_to_ids(text)
    return None if index == tokenizer.unk_token_id else index
