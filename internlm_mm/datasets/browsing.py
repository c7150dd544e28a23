"""Rows and conversations shown as the model sees them, and looked over for what is wrong."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import Example, read_examples
from internlm_mm.datasets.packing import Row
from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.tokenizers import Tokenizer, build_template
from internlm_mm.tokenizers.chat_spelling import Encoded

LEARNED, CONTEXT, SPECIAL, PADDING = 'green', 'default', 'magenta', 'bright_black'


def show_row(row: Row, tokenizer: Tokenizer, special: Mapping[int, str]) -> Text:
    """A row as text, its documents one below the other.

    Args:
        row: Of any dataset.
        tokenizer: What made its tokens.
        special: Names of tokens that are shown by their name.

    Returns:
        Tokens that are learned in green, special ones in magenta (underlined where learned),
        context as it is; what pads the row by its length.
    """
    shown = Text()
    bounds = [0, *np.cumsum(row.lengths).tolist()]
    for start, stop in itertools.pairwise(bounds):
        ids = row.input_ids[start:stop].tolist()
        if not any(ids):
            shown.append(f'[{len(ids)} tokens of padding]\n', PADDING)
            continue
        # The label of a token is the one that follows it.
        learned = [False, *(row.labels[start : stop - 1] != IGNORE_INDEX).tolist()]
        _append(shown, ids, learned, tokenizer, special)
        shown.append(f'\n[{len(ids)} tokens, {sum(learned)} learned]\n', PADDING)
    return shown


def _append(
    shown: Text,
    ids: Sequence[int],
    learned: Sequence[bool],
    tokenizer: Tokenizer,
    special: Mapping[int, str],
) -> None:
    """Decode stretches of one kind together: a character may have several tokens."""
    stretch: list[int] = []
    for place, (index, is_learned) in enumerate(zip(ids, learned, strict=True)):
        if index in special:
            style = f'{SPECIAL} underline' if is_learned else SPECIAL
            shown.append(special[index], style)
            continue
        stretch.append(index)
        ends = place + 1 == len(ids) or ids[place + 1] in special
        if ends or learned[place + 1] != is_learned:
            shown.append(tokenizer.decode(stretch), LEARNED if is_learned else CONTEXT)
            stretch = []


def special_tokens(tokenizer: Tokenizer, template: object = None) -> dict[int, str]:
    """Ids of begin, end and a chat template's marks, with their names."""
    names = {tokenizer.bos_id: '<bos>', tokenizer.eos_id: '<eos>', tokenizer.pad_id: '<pad>'}
    for mark in getattr(template, 'marks', ()):
        names[template.token_id(tokenizer, mark)] = mark  # type: ignore[attr-defined]
    return {index: name for index, name in names.items() if index is not None}


@dataclass
class Report:
    """What is in a set of conversations.

    Attributes:
        conversations: Those that can be trained on.
        problems: A line for each thing that is wrong: file, line, field.
        messages: Messages by role.
        tokens: Tokens of the messages' texts, by role.
        lengths: Tokens of each document.
        cut: Conversations that are longer than a row.
        learned: Tokens with a loss.
    """

    conversations: int = 0
    problems: list[str] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    learned: int = 0

    def table(self) -> Table:
        """Messages and tokens by role."""
        table = Table('role', 'messages', 'tokens', 'tokens a message')
        for role, count in self.messages.items():
            tokens = self.tokens[role]
            table.add_row(role, f'{count:,}', f'{tokens:,}', f'{tokens / count:,.1f}')
        return table

    def lines(self) -> list[str]:
        """Numbers of the whole set."""
        if not self.lengths:
            return [f'no conversation can be trained on, {len(self.problems)} problems']
        low, middle, high = np.percentile(self.lengths, [5, 50, 95]).astype(int).tolist()
        return [
            f'{self.conversations:,} conversations, {self.cut:,} of them longer than a row; '
            f'{len(self.problems):,} problems',
            f'{self.learned:,} of {sum(self.lengths):,} tokens learned; a document has '
            f'{low:,} to {high:,} tokens (5 % and 95 %), half of them at most {middle:,}',
        ]


def look_over(
    domains: Mapping[str, Sequence[Path]], encoder: ConversationEncoder, format: str = 'auto'
) -> Report:
    """Read every conversation and say what is wrong with which.

    What training refuses is a problem: broken JSON, a wrong order of roles, an empty answer,
    nothing to learn, a turn that is too long. So are a text that spells a mark of a chat template,
    which is no special token there, and an answer whose stop token has no loss.

    Args:
        domains: Files by domain.
        encoder: As training has it.
        format: As in `ConversationDataset`.
    """
    report = Report()
    marks = _all_marks()
    for path in (path for files in domains.values() for path in files):
        for example in _examples(path, format):
            if isinstance(example, ValueError):
                report.problems.append(str(example))
                continue
            report.problems += _spelt_marks(example, marks)
            try:
                documents, was_cut = encoder(example)
            except ValueError as error:
                report.problems.append(str(error))
                continue
            report.conversations += 1
            report.cut += was_cut
            truncated = was_cut and encoder.overlong == 'truncate'
            for number, document in enumerate(documents):
                report.lengths.append(len(document.ids))
                report.learned += sum(document.loss_mask[1:])
                if not truncated and not stops_are_learned(document, encoder):
                    report.problems.append(
                        f'{example.place}: an answer in document {number} of this conversation '
                        'ends without a stop token that is learned'
                    )
            for message in example.messages:
                text = message.get('content')
                report.messages[message['role']] += 1
                if isinstance(text, str):
                    report.tokens[message['role']] += len(encoder.tokenizer.encode(text))
    return report


def stops_are_learned(document: Encoded, encoder: ConversationEncoder) -> bool:
    """Whether every stretch of learned tokens has the template's stop in it."""
    ids, spelt = encoder.template.stops(encoder.tokenizer)
    stretch: list[int] = []
    for index, is_learned in [*zip(*document, strict=True), (0, False)]:
        if is_learned:
            stretch.append(index)
        elif stretch:
            text = encoder.tokenizer.decode(stretch)
            if not (set(ids) & set(stretch) or any(stop in text for stop in spelt)):
                return False
            stretch = []
    return True


def _examples(path: Path, format: str) -> Iterator[Example | ValueError]:
    try:
        yield from read_examples(path, format)
    except ValueError as error:  # of the file: what follows cannot be read
        yield error


def _all_marks() -> re.Pattern[str]:
    templates = [build_template(name) for name in sorted(CHAT_TEMPLATES.module_dict)]
    marks = sorted({mark for template in templates for mark in template.marks})
    return re.compile('|'.join(map(re.escape, marks)))


def _spelt_marks(example: Example, marks: re.Pattern[str]) -> Iterator[str]:
    for index, message in enumerate(example.messages):
        text = message.get('content')
        found = marks.search(text) if isinstance(text, str) else None
        if found is not None:
            yield (
                f'{example.place}, message {index}: content spells {found.group()!r}, which is '
                'plain text here: was the conversation spelt by a template already?'
            )
