"""How conversations become tokens: templates as data, and the one code that reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.chat_messages import CODE_TOOL, Conversation, Message, read_conversation
from internlm_mm.tokenizers.chat_spelling import (
    BOS,
    EOS,
    Encoded,
    Segment,
    ToolFormat,
    as_name,
    encode_plain,
    list_tools,
    listed_name,
    split_fields,
    to_json,
)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How conversations are spelt.

    Strings that are in `marks` become special tokens where the tokenizer has them. Everything else
    is plain text, above all what users and functions say, whatever it spells.

    Attributes:
        name: In the registry.
        marks: The template's special tokens.
        stop: Those of them that end an answer.
        system: Before and after the system's text.
        user: Before and after a user's; '{as_name}' is ' name=NAME' where a message has a name.
        assistant: Before an answer, then what ends it and is learned with it, then what follows.
        aliases: What else the tokenizer may call a mark.
        words: Words of the protocol that some tokenizers have tokens for, which are none of the
            special ones: they are left in decoded text.
        tools: How functions are used; None where they cannot be.
        default_system: Text of the system where `Chat` is given none.
        strip: Whether texts lose white space at both ends.
        ending: Tokens, with their text, in the place of what follows the last answer of a training
            sample. The model learns them. None changes nothing.
    """

    name: str
    marks: tuple[str, ...]
    stop: tuple[str, ...]
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    tools: ToolFormat | None = None
    default_system: str = ''
    strip: bool = False
    ending: tuple[tuple[str, str], ...] | None = None

    def segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        add_ending: bool = False,
        where: str = '',
    ) -> list[Segment]:
        """Spell a conversation.

        Args:
            messages: As `read_conversation` takes them.
            tools: The functions that may be called.
            add_generation_prompt: Whether the beginning of an answer follows, for the model to
                go on from.
            add_ending: Whether the last answer ends as training samples do; for training only.
            where: Begins error messages: 'record 17'.

        Returns:
            The pieces in order; the first is the bos token.

        Raises:
            ValueError: If the conversation is none, or this template cannot spell it.
        """
        read = read_conversation(messages, tools, where)
        last = read.messages[-1]
        prefix = f'{where}, ' if where else ''
        if add_generation_prompt and (last.role not in ('user', 'tool')):
            raise ValueError(f'{prefix}the last message is of {last.role!r}: nothing to answer')
        spelt = [Segment('', BOS)]
        place = ''
        try:
            spelt += self._beginning(read)
            for index, message in enumerate(read.messages):
                place = f'message {index}: '
                spelt += self._turn(read, index, message)
        except ValueError as error:
            raise ValueError(f'{prefix}{place}{error}') from None
        if add_generation_prompt:
            spelt += self._spell(self.assistant[0])
        elif add_ending and last.role == 'assistant' and self.ending is not None:
            follows = len(list(self._spell(self.assistant[2])))
            spelt = spelt[: len(spelt) - follows]
            spelt += [Segment(text, token, True, last.loss) for text, token in self.ending]
        return spelt

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """A conversation as one string, without bos; arguments as in `segments`."""
        spelt = self.segments(messages, tools, add_generation_prompt=add_generation_prompt)
        return ''.join(segment.text for segment in spelt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        add_ending: bool = False,
        add_bos: bool = True,
        where: str = '',
    ) -> Encoded:
        """Tokens of a conversation.

        What the model writes is encoded apart from what stands around it, so that in training it
        follows the very tokens that it will follow when it is used.

        Args:
            tokenizer: Of the model.
            messages: As in `segments`.
            tools: As in `segments`.
            add_generation_prompt: As in `segments`.
            add_ending: As in `segments`.
            add_bos: Whether they begin with the tokenizer's bos, if it has one.
            where: As in `segments`.

        Returns:
            Tokens, and where the loss is.

        Raises:
            ValueError: As `segments`.
        """
        spelt = self.segments(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            add_ending=add_ending,
            where=where,
        )
        return self.encode_segments(tokenizer, spelt if add_bos else spelt[1:])

    def encode_segments(self, tokenizer: Tokenizer, segments: Sequence[Segment]) -> Encoded:
        """Tokens of what `segments` gave."""
        ids: list[int] = []
        mask: list[bool] = []
        # None of these may come out of plain text.
        reserved = [
            spelling
            for mark in (*self.marks, *self.words)
            for spelling in (mark, self.aliases.get(mark))
            if spelling is not None and tokenizer.token_id(spelling) is not None
        ]
        plain = ''
        for segment, following in zip(segments, [*segments[1:], None], strict=True):
            index = self._segment_id(tokenizer, segment)
            if index is not None:
                ids.append(index)
                mask.append(segment.trained)
                continue
            plain += segment.text
            goes_on = (
                following is not None
                and following.answer == segment.answer
                and self._segment_id(tokenizer, following) is None
            )
            if not goes_on and plain:
                new = encode_plain(tokenizer, plain, reserved)
                ids += new
                mask += [segment.trained] * len(new)
                plain = ''
        return Encoded(ids, mask)

    def token_id(self, tokenizer: Tokenizer, mark: str) -> int | None:
        """Id of a mark in a vocabulary, under its own name or the other one; None if absent."""
        index = tokenizer.token_id(mark)
        alias = self.aliases.get(mark)
        return tokenizer.token_id(alias) if index is None and alias is not None else index

    def stops(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What ends an answer: tokens, and strings in the place of tokens that are absent."""
        found = {mark: self.token_id(tokenizer, mark) for mark in self.stop}
        ids = tuple(index for index in found.values() if index is not None)
        return ids, tuple(mark for mark, index in found.items() if index is None)

    def _segment_id(self, tokenizer: Tokenizer, segment: Segment) -> int | None:
        if segment.token is None:
            return None
        if segment.token in (BOS, EOS):
            return tokenizer.bos_id if segment.token == BOS else tokenizer.eos_id
        return self.token_id(tokenizer, segment.token)

    def _beginning(self, read: Conversation) -> Iterator[Segment]:
        """The system's turns."""
        first = read.messages[0]
        if first.name and first.role == 'system' and '{as_name}' not in self.system[0]:
            raise ValueError(f"message 0: {self.name!r} has no place for a system's name")
        text = self._clean(first.content) if first.role == 'system' else ''
        name = first.name if first.role == 'system' else ''
        declared, apart = self._declaration(read)
        parts = [declared, [Segment(text)] if text else []]
        if declared and not self._tools().first:
            parts.reverse()
        said = [part for part in parts if part]
        if said:
            yield from self._spell(self.system[0], {'as_name': as_name(name)})
            yield from said[0]
            for part in said[1:]:
                yield Segment('\n\n')
                yield from part
            yield from self._spell(self.system[1])
        for around, content in apart:
            yield from self._spell(around[0])
            yield from content
            yield from self._spell(around[1])

    def _declaration(
        self, read: Conversation
    ) -> tuple[list[Segment], list[tuple[tuple[str, str], list[Segment]]]]:
        """Of functions: what joins the system's text, and turns of their own."""
        if not read.tools:
            return [], []
        form = self._tools()
        functions = [tool['function'] for tool in read.tools]
        apart = []
        listed = list(read.tools)
        if form.code_turn is not None:
            listed = [tool for tool in listed if tool['function']['name'] != CODE_TOOL]
            apart += [
                (form.code_turn, [Segment(function.get('description', ''))])
                for function in functions
                if function['name'] == CODE_TOOL
            ]
        if not listed:
            return [], apart
        names = [listed_name(tool['function'], form) for tool in listed]
        values = {'tools': list_tools(listed, form), 'names': ', '.join(names)}
        declared = list(self._spell(form.declaration, values))
        return ([], [*apart, (form.turn, declared)]) if form.turn else (declared, apart)

    def _turn(self, read: Conversation, index: int, message: Message) -> Iterator[Segment]:
        content = self._clean(message.content)
        if message.role == 'user':
            if message.name and '{as_name}' not in self.user[0]:
                raise ValueError(f"{self.name!r} has no place for a user's name")
            yield from self._around(self.user, content, {'as_name': as_name(message.name)})
        elif message.role == 'tool':
            yield from self._result(read, index, message, content)
        elif message.role == 'assistant':
            before, end, after = self.assistant
            yield from self._spell(before)
            yield from (
                Segment(segment.text, segment.token, True, message.loss)
                for segment in [*self._answer(read, message, content), *self._spell(end)]
            )
            yield from self._spell(after)

    def _answer(self, read: Conversation, message: Message, content: str) -> Iterator[Segment]:
        thought = self.tools.thought if self.tools is not None and read.uses_tools else None
        if message.thought:
            if thought is None:
                raise ValueError(f'{self.name!r} has no place for reasoning_content here')
            yield from self._around(thought, self._clean(message.thought))
        if not message.calls:
            if self.tools is not None and read.uses_tools:
                yield from self._spell(self.tools.answer)
            yield Segment(content)
            return
        form = self._tools()
        if len(message.calls) > 1 and not form.parallel:
            raise ValueError(f'{self.name!r} spells one call a turn, not {len(message.calls)}')
        if content:
            yield from self._around(thought or ('', ''), content)
            yield from self._spell(form.before_call)
        for number, call in enumerate(message.calls):
            if number:
                yield from self._spell(form.between_calls)
            if form.code is not None and call.name == CODE_TOOL:
                yield from self._spell(form.code, {'code': call.arguments['code']})
            else:
                yield from self._spell(
                    form.call, {'name': call.name, 'arguments': to_json(call.arguments)}
                )

    def _result(
        self, read: Conversation, index: int, message: Message, content: str
    ) -> Iterator[Segment]:
        form = self._tools()
        begins = read.messages[index - 1].role != 'tool'
        ends = index + 1 == len(read.messages) or read.messages[index + 1].role != 'tool'
        code = form.code_result is not None and message.name == CODE_TOOL
        around = form.code_result if code and form.code_result is not None else form.result
        if begins:
            yield from self._spell(form.results[0])
        yield from self._around(around, content)
        if ends:
            yield from self._spell(form.results[1])

    def _tools(self) -> ToolFormat:
        if self.tools is None:
            raise ValueError(f'{self.name!r} spells no functions; another template does')
        return self.tools

    def _clean(self, text: str) -> str:
        return text.strip() if self.strip else text

    def _around(
        self, around: tuple[str, str], content: str, values: Mapping[str, str] | None = None
    ) -> Iterator[Segment]:
        yield from self._spell(around[0], values)
        yield Segment(content)
        yield from self._spell(around[1])

    def _spell(self, spelling: str, values: Mapping[str, str] | None = None) -> Iterator[Segment]:
        """A string of this template: its marks and words are tokens, `{values}` are plain."""
        tokens = (*self.marks, *self.words)
        for text, key in split_fields(spelling):
            if key:
                yield Segment((values or {})[key])
                continue
            for part in re.split(f'({"|".join(map(re.escape, tokens)) or "(?!)"})', text):
                if part:
                    yield Segment(part, part if part in tokens else None)
