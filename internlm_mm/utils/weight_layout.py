"""How a model's weights are named, and put together, in files of another make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Packing(NamedTuple):
    """Several of our tensors that a file holds as one, along the first dimension.

    Attributes:
        join: Our tensors, in the rule's order, to the file's.
        split: The file's tensor to ours.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


class Rule(NamedTuple):
    """Names that begin alike.

    Attributes:
        ours: Beginning of our names; several where the file packs them together. `{}` stands for
            the number of a layer.
        theirs: What the file's names have in its place.
        packing: How they are packed, where they are.
    """

    ours: tuple[str, ...]
    theirs: str
    packing: Packing | None = None


class Stored(NamedTuple):
    """Where one of our tensors is in the file.

    Attributes:
        name: The file's name.
        packing: Of which it is a part, or None where the tensor is the file's.
        part: Which part.
    """

    name: str
    packing: Packing | None
    part: int

    def take(self, tensor: Tensor) -> Tensor:
        """Our tensor out of the file's."""
        return tensor if self.packing is None else self.packing.split(tensor)[self.part]


@dataclass(frozen=True)
class WeightLayout:
    """Names and packings of one kind of file.

    Attributes:
        rules: The first that fits a name holds.
        ignored: Ends of the file's names that are no parameters of ours.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def of_names(cls, names: Mapping[str, str], ignored: tuple[str, ...] = ()) -> WeightLayout:
        """A layout that only renames: beginnings of our names, and theirs."""
        return cls(tuple(Rule((ours,), theirs) for ours, theirs in names.items()), ignored)

    def stored(self, name: str) -> Stored:
        """Where our tensor `name` is.

        Raises:
            ValueError: If no rule covers it.
        """
        for rule in self.rules:
            for index, ours in enumerate(rule.ours):
                if (theirs := _replace(name, ours, rule.theirs)) is not None:
                    return Stored(theirs, rule.packing, index)
        raise ValueError(f'{name!r} has no place in this kind of file: {self._beginnings("ours")}')

    def ours(self, stored_name: str) -> dict[str, Stored]:
        """Our tensors in the file's tensor `stored_name`, by our names; none if it is ignored.

        Raises:
            ValueError: If no rule covers it.
        """
        if stored_name.endswith(self.ignored):
            return {}
        for rule in self.rules:
            names = [_replace(stored_name, rule.theirs, ours) for ours in rule.ours]
            if names[0] is not None:
                return {
                    str(name): Stored(stored_name, rule.packing, index)
                    for index, name in enumerate(names)
                }
        raise ValueError(f'weight {stored_name!r} is unknown: {self._beginnings("theirs")}')

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The file's tensors in the order of ours: its names, and what of ours goes into each.

        Raises:
            ValueError: If no rule covers a name, or a part of a packed tensor is missing.
        """
        wanted = list(names)
        groups: dict[str, list[str]] = {}
        for name in wanted:
            place = self.stored(name)
            groups.setdefault(place.name, list(self.ours(place.name)))
        missing = sorted({part for parts in groups.values() for part in parts} - set(wanted))
        if missing:
            raise ValueError(f'{missing[0]!r} is missing: it is stored together with others')
        return groups

    def packing(self, stored_name: str) -> Packing | None:
        """How the file's tensor is packed, or None where it is one of ours."""
        return next(iter(self.ours(stored_name).values())).packing

    def _beginnings(self, side: str) -> str:
        known = [rule.theirs if side == 'theirs' else ', '.join(rule.ours) for rule in self.rules]
        return f'known are names that begin with {", ".join(known)}'


def _replace(name: str, old: str, new: str) -> str | None:
    """`name` with the beginning `old` replaced by `new`, the layer's number kept; None if unfit."""
    match = re.match(re.escape(old).replace(r'\{\}', r'(\d+)'), name)
    if match is None:
        return None
    return new.format(*match.groups()) + name[match.end() :]
