"""Rows shown as the model sees them: which tokens there are, and which of them are learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from internlm_mm.datasets.packing import Row
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.tokenizers import Tokenizer

LEARNED, CONTEXT, SPECIAL, PADDING = 'green', 'default', 'magenta', 'bright_black'
_PAIR = ('chosen', 'rejected')
_MOST = 8  # tokens that may make one character
_INCOMPLETE = '\ufffd'  # what the first bytes of a longer character decode to
# Control characters of data could colour or clear a terminal: they are shown as pictures.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in '\n\t'} | {127: 0x2421}


class Piece(NamedTuple):
    """One token, or the tokens that make one character.

    Attributes:
        ids: Of the tokens.
        text: What they decode to; the name of a special token.
        learned: Whether there is a loss on them.
        special: Whether this is a token that no text becomes.
    """

    ids: tuple[int, ...]
    text: str
    learned: bool
    special: bool


@dataclass
class ShownDocument:
    """A document of a row, or what is left of one.

    Attributes:
        pieces: Its tokens; none of padding.
        num_tokens: How many there are.
        num_learned: How many of them are learned.
        is_padding: Whether this is what fills a row up.
        goes_on: Whether the row's end cuts it.
        title: What it is, where documents of a row differ in kind.
    """

    pieces: list[Piece] = field(default_factory=list)
    num_tokens: int = 0
    num_learned: int = 0
    is_padding: bool = False
    goes_on: bool = False
    title: str = ''

    @property
    def caption(self) -> str:
        """A line on it."""
        if self.is_padding:
            return f'{self.num_tokens} tokens of padding'
        title = f'{self.title}: ' if self.title else ''
        cut = ', goes on in another row' if self.goes_on else ''
        return f'{title}{self.num_tokens} tokens, {self.num_learned} learned{cut}'


class Sheet(NamedTuple):
    """A small table.

    Attributes:
        title: What it is of.
        columns: Their names.
        rows: Texts; the first column says what a row is of.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify='left', box=SIMPLE, padding=(0, 1, 0, 0))
        for number, column in enumerate(self.columns):
            table.add_column(column, justify='right' if number and column else 'left')
        for row in self.rows:
            table.add_row(*map(visible, row))
        return table


def read_row(
    row: Row, tokenizer: Tokenizer | None, special: Mapping[int, str]
) -> list[ShownDocument]:
    """The documents of a row, its padding being the last of them.

    Args:
        row: Of any dataset.
        tokenizer: What made its tokens; None shows their numbers.
        special: Names of tokens that are shown by their name.
    """
    documents: list[ShownDocument] = []
    num_paired = 2 * (row.num_pairs or 0)
    bounds = [0, *np.cumsum(row.lengths).tolist()]
    for start, stop in itertools.pairwise(bounds):
        ids, labels = row.input_ids[start:stop].tolist(), row.labels[start:stop]
        if is_padding(row, start, stop):
            documents.append(ShownDocument(num_tokens=len(ids), is_padding=True))
            continue
        # The label of a token is the one that follows it.
        learned = [False, *(labels[:-1] != IGNORE_INDEX).tolist()]
        pieces = list(_pieces(ids, learned, tokenizer, special))
        goes_on = bool(labels[-1] != IGNORE_INDEX)
        title = _PAIR[len(documents) % 2] if len(documents) < num_paired else ''
        documents.append(
            ShownDocument(pieces, len(ids), sum(learned), goes_on=goes_on, title=title)
        )
    return documents


def is_padding(row: Row, start: int, stop: int) -> bool:
    """Whether the document at these places of a row only fills it up."""
    return (
        stop == len(row.input_ids)
        and not row.input_ids[start:stop].any()
        and bool((row.labels[start:stop] == IGNORE_INDEX).all())
    )


def show_row(row: Row, tokenizer: Tokenizer | None, special: Mapping[int, str]) -> Text:
    """A row as text, its documents one below the other.

    Args:
        row: As in `read_row`.
        tokenizer: As in `read_row`.
        special: As in `read_row`.

    Returns:
        Tokens that are learned in green, special ones in magenta (underlined where learned),
        context as it is; what pads the row by its length.
    """
    return show_documents(read_row(row, tokenizer, special))


def show_documents(documents: Sequence[ShownDocument]) -> Text:
    """Documents as text, as `show_row` shows those of a row."""
    shown = Text()
    for document in documents:
        for piece in document.pieces:
            style = LEARNED if piece.learned else CONTEXT
            if piece.special:
                style = f'{SPECIAL} underline' if piece.learned else SPECIAL
            shown.append(visible(piece.text), style)
        line = '\n' if document.pieces else ''
        shown.append(f'{line}[{document.caption}]\n', PADDING)
    return shown


def visible(text: str) -> str:
    """A text without characters that would do something to a terminal or a page."""
    return text.translate(_CONTROLS)


def _pieces(
    ids: Sequence[int],
    learned: Sequence[bool],
    tokenizer: Tokenizer | None,
    special: Mapping[int, str],
) -> Iterator[Piece]:
    """Tokens with their texts; stretches of one kind are decoded on their own."""
    stretch: list[int] = []
    for place, (index, is_learned) in enumerate(zip(ids, learned, strict=True)):
        if index in special:
            yield Piece((index,), special[index], is_learned, True)
            continue
        stretch.append(index)
        ends = place + 1 == len(ids) or ids[place + 1] in special
        if ends or learned[place + 1] != is_learned:
            for some, text in _decoded(stretch, tokenizer):
                yield Piece(some, text, is_learned, False)
            stretch = []


def _decoded(
    ids: Sequence[int], tokenizer: Tokenizer | None
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Tokens with what each adds to the text; several where a character needs several."""
    if tokenizer is None:
        yield from (((index,), f'{index} ') for index in ids)
        return
    before, start = 0, 0  # decoded together with those before: some decoders drop a first space
    for stop in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:start])
        text = tokenizer.decode(ids[before:stop])
        is_whole = not text.endswith(_INCOMPLETE) or stop - start >= _MOST or stop == len(ids)
        if is_whole and (len(text) > len(known) or stop == len(ids) or stop - start >= _MOST):
            yield tuple(ids[start:stop]), text[len(known) :]
            before, start = start, stop


def special_tokens(tokenizer: Tokenizer | None, template: object = None) -> dict[int, str]:
    """Ids of begin, end and a chat template's marks, with their names."""
    if tokenizer is None:
        return {}
    names = {tokenizer.bos_id: '<bos>', tokenizer.eos_id: '<eos>', tokenizer.pad_id: '<pad>'}
    for mark in getattr(template, 'marks', ()):
        names[template.token_id(tokenizer, mark)] = mark  # type: ignore[attr-defined]
    return {index: name for index, name in names.items() if index is not None}
