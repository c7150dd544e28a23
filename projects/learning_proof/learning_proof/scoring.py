"""Greedy answers to the held-out questions, and what is right about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm_mm.api import from_pretrained
from internlm_mm.inference import Chat, Sampling
from learning_proof.tasks import Case

MAX_NEW_TOKENS = 12
"""The longest right answer has eight characters and a mark that ends it."""


@dataclass(frozen=True)
class Score:
    """What became of a list of cases.

    Attributes:
        cases: How many were asked.
        exact: How many answers are right to the letter, in either form.
        bracketed: How many of all are right and in brackets.
    """

    cases: int
    exact: int
    bracketed: int


def score(cases: Sequence[Case], answers: Sequence[str]) -> Score:
    """Compare answers with the right ones, character by character."""
    pairs = list(zip(cases, answers, strict=True))
    bracketed = sum(answer == case.bracketed for case, answer in pairs)
    plain = sum(answer == case.answer for case, answer in pairs)
    return Score(len(pairs), plain + bracketed, bracketed)


def ask(checkpoint: Path, cases: Sequence[Case], template: str, rows: int = 256) -> list[str]:
    """Greedy answers of a model, in batches.

    An answer that its end mark does not end is given with a trailing ellipsis: it is never right.
    """
    generator = from_pretrained(checkpoint, dtype=torch.float32)
    chat = Chat(generator, template)
    tokenizer = generator.tokenizer
    ends = {*chat.template.stops(tokenizer)[0], tokenizer.eos_id}  # what ends a chat's answer
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    answers: list[str] = []
    for start in range(0, len(cases), rows):
        part = cases[start : start + rows]
        prompts = [chat.prompt([{'role': 'user', 'content': case.question}]) for case in part]
        ids: list[list[int]] = [[] for _ in part]
        steps = generator.generate_ids(prompts, sampling, lambda _, token: token in ends)
        for tokens in steps:
            for row, token in enumerate(tokens):
                if token is not None:
                    ids[row].append(token)
        for row in ids:
            ended = bool(row) and row[-1] in ends
            answers.append(tokenizer.decode(row[:-1] if ended else row) + '…' * (not ended))
    return answers
