"""Rows of published sets of problems with written answers -> problem, solution, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from internlm_mm.evaluation.answers import extract_boxed, extract_hash
from internlm_mm.evaluation.fields import as_object, need, need_text, subject_of, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        text: What is asked.
        solution: A text that ends in the answer, as examples show it.
        answer: The answer alone.
        subject: What it is about; '' where nothing says.
        place: `file:line` of its row.
    """

    text: str
    solution: str
    answer: str
    subject: str = ''
    place: str = ''


def _question_answer(row: Any) -> Iterator[Problem]:
    """`question`, `answer`; `solution` and `subject` where there are."""
    row = as_object(row)
    answer = need(row, 'answer')
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    answer = text_of(answer, 'answer')
    solution = row.get('solution')
    yield Problem(
        text=need_text(row, 'question'),
        solution=answer if solution is None else text_of(solution, 'solution'),
        answer=answer,
        subject=subject_of(row, 'subject'),
    )


def _gsm8k(row: Any) -> Iterator[Problem]:
    """`question`, `answer` with a solution that ends in '#### 42'."""
    row = as_object(row)
    solution = need_text(row, 'answer')
    answer = extract_hash(solution)
    if answer is None:
        raise ValueError("answer: no '#### ' with the number behind it")
    yield Problem(text=need_text(row, 'question'), solution=solution, answer=answer)


def _math(row: Any) -> Iterator[Problem]:
    r"""`problem`, `solution` with its answer in \boxed{}, `type`."""
    row = as_object(row)
    solution = need_text(row, 'solution')
    answer = extract_boxed(solution)
    if answer is None:
        raise ValueError('solution: no \\boxed{} with the answer in it')
    yield Problem(
        text=need_text(row, 'problem'),
        solution=solution,
        answer=answer,
        subject=subject_of(row, 'type'),
    )


def _agieval_cloze(row: Any) -> Iterator[Problem]:
    """AGIEval's sets without options: `passage` or null, `question`, `answer`."""
    row = as_object(row)
    question, passage = need_text(row, 'question'), row.get('passage')
    answer = need_text(row, 'answer')
    text = f'{text_of(passage, "passage")}\n\n{question}' if passage else question
    yield Problem(text=text, solution=answer, answer=answer)


@dataclass(frozen=True, slots=True)
class ProblemFormat:
    """How the rows of a set are read, and how its answers are compared by default.

    Attributes:
        read: From a row to its problems, or a ValueError with the field.
        extract: Where the answer is looked for in a text; names in `answers.EXTRACTORS`.
        compare: How answers are compared; a name in `answers.COMPARISONS`.
        by_file: Whether files or their folders are subjects.
    """

    read: Callable[[Any], Iterator[Problem]]
    extract: tuple[str, ...]
    compare: str
    by_file: bool = False


PROBLEM_FORMATS = {
    'question_answer': ProblemFormat(_question_answer, ('whole',), 'text'),
    'gsm8k': ProblemFormat(_gsm8k, ('hash', 'last_number'), 'number'),
    'math': ProblemFormat(_math, ('boxed', 'answer_is'), 'latex'),
    'agieval_cloze': ProblemFormat(
        _agieval_cloze, ('boxed', 'answer_is', 'last_number'), 'latex', by_file=True
    ),
}
"""Sets of problems by name."""
