"""What tasks of single questions share: rows, examples, prompts that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmengine.logging import print_log

from internlm_mm.evaluation.prompting import Prompt, Speaker, Turn
from internlm_mm.evaluation.rows import find_files, read_rows
from internlm_mm.utils.suggest import did_you_mean

ON_ERROR = ('raise', 'skip')
_SHOWN = 5  # malformed rows that are told one by one


class Item(Protocol):
    """What examples and questions have in common."""

    @property
    def subject(self) -> str: ...

    @property
    def place(self) -> str: ...


SomeItem = TypeVar('SomeItem', bound=Item)
Sample = TypeVar('Sample')
T = TypeVar('T')


class RowFormat(Protocol):
    """What is asked of a format; see `QuestionFormat` and `ProblemFormat`."""

    @property
    def read(self) -> Callable[[Any], Iterator[Any]]: ...

    @property
    def by_file(self) -> bool: ...


class Source:
    """Files of questions, and what becomes of rows that are none.

    Args:
        name: Of the task, for messages.
        form: How rows are read.
        has_header: Whether csv files begin with names.
        on_error: 'raise' stops at the first malformed row; 'skip' leaves them out and says how
            many.
        place: Puts place and subject into what a row gave.

    Raises:
        ValueError: If `on_error` is none of the two.
    """

    def __init__(
        self,
        name: str,
        form: RowFormat,
        has_header: bool,
        on_error: str,
        place: Callable[[Any, str, str], Any],
    ) -> None:
        if on_error not in ON_ERROR:
            hint = did_you_mean(on_error, ON_ERROR)
            raise ValueError(f'on_error={on_error!r} is none of {", ".join(ON_ERROR)}.{hint}')
        self.name, self.form, self.has_header = name, form, has_header
        self.on_error, self.place = on_error, place
        self.skipped: list[str] = []

    def read(self, path: str | Path, split: str | None, key: str) -> list[Any]:
        """All questions of a split.

        Args:
            path: A file or folder.
            split: As in `find_files`.
            key: The option, for messages.

        Raises:
            FileNotFoundError: If there are no files.
            ValueError: If a row is malformed, or nothing is left.
        """
        bundle, items, skipped = find_files(path, split, key), [], []
        for row in read_rows(bundle, self.has_header):
            subject = row.subject if self.form.by_file else ''
            try:
                found = [self.place(item, row.place, subject) for item in self.form.read(row.value)]
            except ValueError as error:
                message = f'{row.place}, {error}'
                if self.on_error == 'raise':
                    raise ValueError(f'{self.name}: {message}') from None
                skipped.append(message)
                continue
            items += found
        self.leave_out(skipped)
        if not items:
            reason = f', {len(skipped)} malformed: {skipped[0]}' if skipped else ''
            raise ValueError(f'{self.name}: {key}={str(path)!r} has no question{reason}')
        return items

    def leave_out(self, messages: Sequence[str]) -> None:
        """Count and log what is left out."""
        self.skipped += messages
        if messages:
            lines = '\n  '.join(messages[:_SHOWN])
            print_log(
                f"{self.name}: {len(messages):,} questions left out by on_error='skip', "
                f'the first:\n  {lines}',
                logger='current',
                level=logging.WARNING,
            )

    def shots(self, path: str | Path, shots_from: str | Path | None, count: int) -> Shots:
        """The examples; `path`, `shots_from` and `count` as a task was given them.

        Raises:
            FileNotFoundError: As `read`.
            ValueError: As `read`.
        """
        examples = None
        if shots_from is not None:
            examples = self.read(*locate_shots(path, shots_from), 'shots_from')
        return Shots(examples, count, f'shots_from={str(shots_from)!r}')

    def fitting(
        self,
        items: Sequence[SomeItem],
        make: Callable[[SomeItem], Sample | None],
        noun: str,
        why: str,
        tail: str = ', not even without examples',
    ) -> list[Sample]:
        """What `make` makes of each; `on_error` says what becomes of those that do not fit.

        Args:
            items: Questions.
            make: Gives None for a question that does not fit, whatever is left out.
            noun: What a question is called.
            why: Why it does not fit, after the noun.
            tail: What more there is to say.

        Raises:
            ValueError: With file and line, or if nothing is left.
        """
        samples: list[Sample] = []
        too_long: list[str] = []
        for item in items:
            sample = make(item)
            if sample is not None:
                samples.append(sample)
                continue
            message = f'{item.place}: the {noun} {why}{tail}'
            if self.on_error == 'raise':
                raise ValueError(f'{self.name}: {message}')
            too_long.append(message)
        self.leave_out(too_long)
        if not samples:
            raise ValueError(f'{self.name}: no {noun} is left: {too_long[0]}')
        return samples


class Shots:
    """Examples in front of questions: the first of the question's own subject.

    Args:
        items: Examples of all subjects; None for none at all.
        count: How many stand in front of a question.
        origin: Where they are from, for messages.
    """

    def __init__(self, items: Sequence[Item] | None, count: int, origin: str) -> None:
        self.count, self.origin = count, origin
        self.by_subject: dict[str, list[Item]] = {}
        for item in items or ():
            self.by_subject.setdefault(item.subject, []).append(item)

    def of(self, item: Item) -> list[Any]:
        """Examples for a question, itself excepted.

        Raises:
            ValueError: If there are fewer than `count`.
        """
        if not self.count:
            return []
        group = self.by_subject.get(item.subject, self.by_subject.get('', []))
        others = [shot for shot in group if shot.place != item.place]
        if len(others) < self.count:
            of_it = f' of {item.subject!r}' if item.subject else ''
            raise ValueError(
                f'{item.place}: shots={self.count}, but {self.origin} has {len(others)} '
                f'examples{of_it}'
            )
        return others[: self.count]


def check_shots(shots: int, shots_from: str | Path | None) -> None:
    """Refuse a number of examples that does not fit where they are from.

    Raises:
        ValueError: Naming both options.
    """
    if shots < 0:
        raise ValueError(f'shots={shots} must be at least 0')
    if shots and shots_from is None:
        raise ValueError(f'shots={shots} needs shots_from: a split of path, or a file of examples')
    if not shots and shots_from is not None:
        raise ValueError(f'shots_from={str(shots_from)!r} does nothing without shots')


def check_counts(**counts: int | None) -> None:
    """Refuse an option that counts things and is below one; None is no limit.

    Raises:
        ValueError: Naming the option.
    """
    for key, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f'{key}={value} must be at least 1')


def locate_shots(path: str | Path, shots_from: str | Path) -> tuple[str | Path, str | None]:
    """Path and split of the examples: a split beside the questions, or a path of its own.

    A split of `path` comes first, whatever the current folder holds. What begins with '/', './' or
    '../' is a path always.

    Raises:
        ValueError: If it has folders in it and is both.
    """
    name = str(shots_from)
    spelt_as_path = Path(name).is_absolute() or name.startswith(('./', '../'))
    if spelt_as_path or not Path(path).is_dir():
        return shots_from, None
    exists = Path(name).exists()
    if not _has_split(path, name):
        return (shots_from, None) if exists else (path, name)
    elsewhere = Path(name).resolve() != (Path(path) / name).resolve()
    if exists and elsewhere and len(Path(name).parts) > 1:
        raise ValueError(
            f'shots_from={name!r} is a split of path={str(path)!r} and a path of its own: write '
            f'{"./" + name!r} or {str(Path(path) / name)!r}'
        )
    return path, name


def _has_split(path: str | Path, name: str) -> bool:
    try:
        find_files(path, name, 'shots_from')
    except FileNotFoundError:
        return False
    return True


def fitting_prompt(
    speaker: Speaker,
    intro: str,
    shots: Sequence[Turn],
    question: str,
    fits: Callable[[Prompt], T | None],
) -> tuple[Prompt, int, T] | None:
    """The prompt with as many examples as fit.

    Args:
        speaker: Spells it.
        intro: In front.
        shots: The examples; the last ones are left out first.
        question: What is asked.
        fits: What to keep of a prompt; None if it is too long.

    Returns:
        The prompt, how many examples it has, and what `fits` gave; None where not even the
        question fits.
    """
    for count in range(len(shots), -1, -1):
        prompt = speaker.prompt(intro, shots[:count], question)
        kept = fits(prompt)
        if kept is not None:
            return prompt, count, kept
    return None


def tell_fewer_shots(name: str, shots: Sequence[int], wanted: int, max_seq_len: int) -> None:
    """Log how many prompts have fewer examples than were asked for.

    Args:
        name: Of the task.
        shots: Examples of each prompt.
        wanted: Examples that were asked for.
        max_seq_len: Why there are fewer.
    """
    fewer = sum(count < wanted for count in shots)
    if fewer:
        print_log(
            f'{name}: {fewer:,} of {len(shots):,} prompts have fewer than {wanted} examples, to '
            f'fit into {max_seq_len:,} tokens',
            logger='current',
            level=logging.WARNING,
        )


def spread(items: Sequence[SomeItem], most: int | None) -> list[SomeItem]:
    """At most so many, evenly spread over all, so that every subject has its part."""
    if most is None or most >= len(items):
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


def share_right(records: Sequence[Mapping[str, Any]]) -> float:
    """Share of records whose 'right' is True."""
    return sum(bool(record['right']) for record in records) / max(len(records), 1)


def by_subject(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right answers of each subject, where there are several."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record['subject'], []).append(record)
    if len(groups) < 2:
        return {}
    return {subject or '(none)': share_right(group) for subject, group in sorted(groups.items())}
