"""The interface of a task: it yields prompts, asks, scores and reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internlm_mm.evaluation.requests import Answer, Request
from internlm_mm.tokenizers import Tokenizer

Play = Generator[Sequence[Request], Sequence[Answer], dict[str, Any]]
"""One sample at work: yields requests, is sent their answers, returns its record."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the model is that a task is prepared for.

    Attributes:
        tokenizer: Its tokenizer.
        max_seq_len: Tokens that it reads at most.
    """

    tokenizer: Tokenizer
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a task found.

    Attributes:
        metrics: The few numbers that are logged.
        details: Further numbers by group, as accuracy by subject: {metric: {group: value}}.
        counts: How many samples there are, were left out, and so on.
    """

    metrics: dict[str, float]
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Task(ABC):
    """Questions on files of this machine, with what is right.

    A member of TASKS is built from its config, then prepared once for a model, and may be run many
    times. Each sample is a Python generator, so that it may ask again after an answer, as tasks of
    several turns do; samples are independent of one another and their requests are answered
    together. Every process runs every sample on the same answers.

    Attributes:
        name: Of its metrics and its file of records.
        generates: Whether it asks for texts, which needs the whole model on each process.
        at_once: Samples that are at work at a time, where they hold something; None for all.
    """

    name: str
    generates: bool = False
    at_once: int | None = None

    @abstractmethod
    def prepare(self, subject: Subject) -> None:
        """Read the data, encode the prompts and check that they fit, before time is spent.

        Raises:
            FileNotFoundError: If there are no data.
            ValueError: If a row is malformed or too long; names file, line and field.
        """

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def play(self, index: int) -> Play:
        """One sample. Its record has at least 'prompt', 'prediction', 'answer' and 'right'."""

    @abstractmethod
    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """Numbers from all records, in the order of the samples."""

    def finish(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what samples held. Called after every run, also of one that failed."""
