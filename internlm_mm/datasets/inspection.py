"""A set of conversations looked over for what is wrong: every record, not only the first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.datasets.browsing import Sheet
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import Example, read_examples
from internlm_mm.datasets.forms.fields import is_context
from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers import ChatTemplate, Tokenizer, build_template
from internlm_mm.tokenizers.chat_spelling import Encoded
from internlm_mm.utils.suggest import did_you_mean

Check = Callable[[Example, Sequence[Encoded], ChatTemplate, Tokenizer], list[str]]
"""Tells what else is wrong with a conversation, of it and of its documents."""


@dataclass
class Report:
    """What is in a set of conversations, or of other samples.

    Attributes:
        kind: What its samples are.
        conversations: Those that can be trained on.
        problems: A line for each thing that is wrong: file, line, field.
        notes: What is worth knowing, and no problem.
        messages: Messages by role.
        with_loss: Those of them that are learned.
        tokens: Tokens of the messages' texts, by role.
        lengths: Tokens of each document.
        cut: Samples that are longer than a row.
        lost: Tokens that are cut off.
        learned: Tokens with a loss.
        is_part: Whether only the first samples were read.
    """

    kind: str = 'conversations'
    conversations: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    with_loss: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    lost: int = 0
    learned: int = 0
    is_part: bool = False

    def add(self, document: Encoded) -> None:
        """Count the tokens of a document."""
        self.lengths.append(len(document.ids))
        self.learned += sum(document.loss_mask[1:])

    @contextmanager
    def of_domain(self, files: Sequence[Path]) -> Iterator[None]:
        """Context in which a domain is looked over; nothing to learn from there is a problem."""
        before = self.conversations, len(self.problems)
        yield
        if (self.conversations, len(self.problems)) == before:
            one = self.kind.removesuffix('s')
            self.problems.append(f'{", ".join(map(str, files))}: no {one} to learn from')

    def roles(self) -> Sheet:
        """Messages and tokens by role."""
        rows = []
        for role, count in self.messages.items():
            tokens = self.tokens[role]
            numbers = (count, self.with_loss[role], tokens)
            rows.append((role, *(f'{one:,}' for one in numbers), f'{tokens / count:,.1f}'))
        columns = ('role', 'messages', 'learned', 'tokens', 'tokens a message')
        return Sheet('messages by role', columns, rows)

    def lines(self) -> list[str]:
        """Numbers of the whole set."""
        found = f'{len(self.problems):,} problem' + ('' if len(self.problems) == 1 else 's')
        if not self.lengths:
            one = self.kind.removesuffix('s')
            return [*self.notes, f'no {one} can be trained on, {found}']
        low, middle, high = np.percentile(self.lengths, [5, 50, 95]).astype(int).tolist()
        first = 'the first ' if self.is_part else ''
        lost = f' ({self.lost:,} tokens are cut off)' if self.lost else ''
        return [
            *self.notes,
            f'{first}{self.conversations:,} {self.kind}, {self.cut:,} of them longer than a row'
            f'{lost}; {found}',
            f'{self.learned:,} of {sum(self.lengths):,} tokens learned; a document has '
            f'{low:,} to {high:,} tokens (5 % and 95 %), half of them at most {middle:,}',
        ]


def look_over(
    domains: Mapping[str, Sequence[Path]],
    encoder: ConversationEncoder,
    format: str = 'auto',
    limit: int | None = None,
    also: Check | None = None,
) -> Report:
    """Read every conversation and say what is wrong with which.

    What training refuses is a problem: broken JSON, a wrong order of roles, an empty answer,
    nothing to learn, a turn that is too long. So are a text that spells a special token, which is
    none there, and an answer whose stop token has no loss.

    Args:
        domains: Files by domain.
        encoder: As training has it.
        format: As in `ConversationDataset`.
        limit: Records of each file to read; None reads all.
        also: What else to check. It is asked before what training refuses is told, without
            documents then, for it may know better what is wrong.
    """
    report = Report(notes=absent_marks(encoder.tokenizer, encoder.template))
    marks = Marks()
    for files in domains.values():
        with report.of_domain(files):
            for path in files:
                examples = _examples(path, format)
                for example in islice(examples, limit):
                    if isinstance(example, ValueError):
                        report.problems.append(str(example))
                    else:
                        _look_at(example, encoder, marks, report, also)
                report.is_part |= limit is not None and next(examples, None) is not None
    return report


def _look_at(
    example: Example,
    encoder: ConversationEncoder,
    marks: Marks,
    report: Report,
    also: Check | None,
) -> None:
    spelling = encoder.template, encoder.tokenizer

    def more(documents: Sequence[Encoded]) -> list[str]:
        found = [] if also is None else also(example, documents, *spelling)
        return [f'{example.place}, {problem}' for problem in found]

    try:
        documents, was_cut, num_lost = encoder(example)
    except ValueError as error:
        report.problems += more(()) or [str(error)]
        return
    known = more(documents)
    report.problems += known
    report.problems += marks.problems(example.messages, example.place)
    report.problems += marks.problems_of_tools(example.tools, example.place)
    report.conversations += 1
    report.cut += was_cut
    report.lost += num_lost
    answers = [
        index
        for index, message in enumerate(example.messages)
        if message.get('role') == 'assistant' and not is_context(message)
    ]
    for document in documents:
        report.add(document)
    stretches = [one for document in documents for one in learned_stretches(document)]
    if num_lost:
        del stretches[-1:]  # its end may be what was cut off
    for index, stretch in zip(answers, stretches, strict=False):
        if not known and not has_stop(stretch, *spelling):
            report.problems.append(
                f'{example.place}, message {index}: its answer ends without a stop token that is '
                'learned: the model would not stop'
            )
    for index, message in enumerate(example.messages):
        report.messages[message['role']] += 1
        report.with_loss[message['role']] += index in answers
        report.tokens[message['role']] += sum(
            len(encoder.tokenizer.encode(text)) for _, text in texts_of(message)
        )


def learned_stretches(document: Encoded) -> list[list[int]]:
    """Tokens with a loss that follow one another."""
    found: list[list[int]] = []
    was_learned = False
    for index, is_learned in zip(*document, strict=True):
        if is_learned and not was_learned:
            found.append([])
        if is_learned:
            found[-1].append(index)
        was_learned = is_learned
    return found


def has_stop(stretch: Sequence[int], template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether what is learned of an answer has the template's stop in it."""
    ids, spelt = template.stops(tokenizer)
    if set(ids) & set(stretch):
        return True
    if not spelt:
        return False
    text = tokenizer.decode(stretch)
    return any(stop in text for stop in spelt)


def texts_of(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The texts of a message, each with its field; arguments of calls as JSON."""
    content = message.get('content')
    if isinstance(content, str):
        yield 'content', content
    elif isinstance(content, Sequence):
        for number, part in enumerate(content):
            if isinstance(part, Mapping) and isinstance(part.get('text'), str):
                yield f'content[{number}].text', part['text']
    if isinstance(thought := message.get('reasoning_content'), str):
        yield 'reasoning_content', thought
    for number, call in enumerate(message.get('tool_calls') or ()):
        arguments = call['function'].get('arguments', {})
        is_text = isinstance(arguments, str)
        text = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        yield f'tool_calls[{number}].function.arguments', text


def absent_marks(tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """A note if the vocabulary lacks marks of the template, which are then spelt as text."""
    absent = [mark for mark in template.marks if template.token_id(tokenizer, mark) is None]
    if not absent:
        return []
    return [
        f'the vocabulary has no {", ".join(absent)} of the template {template.name!r}: spelt as '
        'text, which users can write too'
    ]


class Marks:
    """What looks like a special token, in texts where it is none."""

    def __init__(self) -> None:
        templates = [build_template(name) for name in sorted(CHAT_TEMPLATES.module_dict)]
        self._known = {mark for template in templates for mark in template.marks}
        self._known |= {alias for one in templates for alias in one.aliases.values()}
        looks = [
            r'<\|[\w.\-]{1,40}\|>',
            r'</s>',
            r'\[/?INST\]',
            r'<(?:start|end)_of_turn>',
            r'<TOKENS_UNUSED_\d+>',
            r'\[UNUSED_TOKEN_\d+\]',
        ]
        names = sorted(map(re.escape, self._known), key=len, reverse=True)
        self._pattern = re.compile('|'.join([*names, *looks]))

    def problems(self, messages: Sequence[Mapping[str, Any]], place: str) -> Iterator[str]:
        """A line for each text of a conversation that spells one."""
        for index, message in enumerate(messages):
            for name, text in texts_of(message):
                yield from self._problem(text, f'{place}, message {index}: {name}')

    def problems_of_tools(self, tools: Sequence[Mapping[str, Any]], place: str) -> Iterator[str]:
        """A line for each function whose description spells one."""
        for index, tool in enumerate(tools):
            yield from self._problem(
                json.dumps(tool, ensure_ascii=False), f'{place}, tools[{index}]'
            )

    def _problem(self, text: str, where: str) -> Iterator[str]:
        found = self._pattern.search(text)
        if found is None:
            return
        mark = found.group()
        if mark in self._known:
            why = 'was the conversation spelt by a template already?'
        else:
            why = f'it looks like a special token.{did_you_mean(mark, self._known)}'
        yield f'{where} spells {mark!r}, which is plain text here: {why}'


def _examples(path: Path, format: str) -> Iterator[Example | ValueError]:
    try:
        yield from read_examples(path, format, keep_going=True)
    except ValueError as error:  # of the file: what follows cannot be read
        yield error
