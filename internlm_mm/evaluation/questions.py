"""Rows of published multiple-choice sets -> questions with options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from internlm_mm.evaluation.fields import (
    as_object,
    choice_of,
    need,
    need_text,
    subject_of,
    text_of,
    texts_of,
    whole_number,
)
from internlm_mm.utils.suggest import kind

_MARK = re.compile(r'^\s*[(（]?([A-Z])(?:[)）.．、]|:)\s*')


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        text: What is asked, with what has to be read for it.
        options: The answers to choose from.
        answer: Index of the right one.
        subject: What it is about; '' where nothing says.
        place: `file:line` of its row.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    subject: str = ''
    place: str = ''


def _options(row: Any) -> Iterator[Question]:
    """`question`, `options`, `answer`; `passage` and `subject` where there are."""
    row = as_object(row)
    options = texts_of(need(row, 'options'), 'options')
    answer = _option_of(need(row, 'answer'), options)
    yield Question(
        text=_with_passage(row, 'passage', need_text(row, 'question')),
        options=options,
        answer=answer,
        subject=subject_of(row, 'subject'),
    )


def _option_of(answer: Any, options: tuple[str, ...]) -> int:
    """Index of the option that a text, a letter or a number says."""
    text = answer.strip() if isinstance(answer, str) else None
    if text is None or text not in options:
        return choice_of(answer, 'answer', len(options))
    index = options.index(text)
    try:
        letter = choice_of(text, 'answer', len(options))
    except ValueError:
        return index
    if letter != index:
        raise ValueError(
            f'answer {answer!r}: the letter of {options[letter]!r} and the text of another '
            f'option; give its number, {letter} or {index}'
        )
    return index


def _mmlu(row: Any) -> Iterator[Question]:
    """A csv row without header: question, A, B, C, D, answer; or Hugging Face's rows."""
    if isinstance(row, list):
        if len(row) != 6:
            raise ValueError(f'{len(row)} fields: expected question, A, B, C, D, answer')
        names = ('question', 'A', 'B', 'C', 'D', 'answer')
        yield from _lettered(dict(zip(names, row, strict=True)))
        return
    row = as_object(row)
    if 'choices' not in row:
        yield from _lettered(row)
        return
    options = texts_of(row['choices'], 'choices')
    yield Question(
        text=need_text(row, 'question'),
        options=options,
        answer=choice_of(need(row, 'answer'), 'answer', len(options)),
        subject=subject_of(row, 'subject').replace('_', ' '),
    )


def _lettered(row: Any) -> Iterator[Question]:
    """`question`, `A` to `D` and `answer`, as C-Eval has them."""
    row = as_object(row)
    if row.get('answer') == '':
        raise ValueError("answer: the text is empty, as in C-Eval's test split: use val")
    yield Question(
        text=need_text(row, 'question'),
        options=tuple(need_text(row, letter) for letter in 'ABCD'),
        answer=choice_of(need(row, 'answer'), 'answer', 4),
        subject=subject_of(row, 'subject'),
    )


def _agieval(row: Any) -> Iterator[Question]:
    """`passage` or null, `question`, `options` as '(A)...', `label`."""
    row = as_object(row)
    if not row.get('options'):
        raise ValueError("options: there are none; AGIEval's cloze sets are format='agieval_cloze'")
    marked = texts_of(row['options'], 'options')
    options = tuple(
        text_of(_MARK.sub('', option, count=1), f'options[{index}]')
        for index, option in enumerate(marked)
    )
    label = need(row, 'label')
    if isinstance(label, str) and re.fullmatch(r'[A-Z]{2,}', label):
        label = list(label)
    if isinstance(label, list):
        if len(label) != 1:
            raise ValueError(f'label {label!r}: one right option is expected, not {len(label)}')
        label = label[0]
    yield Question(
        text=_with_passage(row, 'passage', need_text(row, 'question')),
        options=options,
        answer=choice_of(label, 'label', len(options)),
    )


def _commonsenseqa(row: Any) -> Iterator[Question]:
    """`question.stem` and `question.choices`, or Hugging Face's columns; `answerKey`."""
    row = as_object(row)
    question = need(row, 'question')
    if isinstance(question, Mapping):
        text = text_of(need(question, 'stem', 'question.stem'), 'question.stem')
        choices, field = need(question, 'choices', 'question.choices'), 'question.choices'
    else:
        text, choices, field = text_of(question, 'question'), need(row, 'choices'), 'choices'
    if isinstance(choices, Mapping):
        labels, options = need(choices, 'label', f'{field}.label'), need(choices, 'text')
    elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        labels = [need(choice, 'label', f'{field}.label') for choice in choices]
        options = [need(choice, 'text', f'{field}.text') for choice in choices]
    else:
        raise ValueError(f'{field}: a list of label and text, not {kind(choices)}')
    if not row.get('answerKey'):
        raise ValueError("field 'answerKey' is missing, as in the test split: use dev")
    key = row['answerKey']
    if not isinstance(labels, list):
        raise ValueError(f'{field}.label: a list, not {kind(labels)}')
    if key not in labels:
        raise ValueError(f'answerKey {key!r}: expected one of {", ".join(map(str, labels))}')
    options = texts_of(options, f'{field}.text')
    if len(labels) != len(options):
        raise ValueError(f'{field}: {len(labels)} labels of {len(options)} texts')
    yield Question(text=text, options=options, answer=labels.index(key))


def _bustm(row: Any) -> Iterator[Question]:
    """`sentence1`, `sentence2`, `label` 1 where they mean the same."""
    row = as_object(row)
    first, second = need_text(row, 'sentence1'), need_text(row, 'sentence2')
    yield Question(
        text=f'语句一：“{first}”\n语句二：“{second}”\n请判断语句一和语句二说的是否是一个意思？',
        options=('无关', '相关'),
        answer=whole_number(need(row, 'label'), 'label', 0, 1),
    )


def _cluewsc(row: Any) -> Iterator[Question]:
    """`text`, `target` with two spans, `label` 'true' where the second means the first."""
    row = as_object(row)
    target = need(row, 'target')
    if not isinstance(target, Mapping):
        raise ValueError(f'target: an object with span1_text and span2_text, not {kind(target)}')
    noun = text_of(need(target, 'span1_text', 'target.span1_text'), 'target.span1_text')
    pronoun = text_of(need(target, 'span2_text', 'target.span2_text'), 'target.span2_text')
    label = str(need(row, 'label')).lower()
    answers = {'true': 0, '1': 0, 'false': 1, '0': 1}
    if label not in answers:
        raise ValueError(f'label {row["label"]!r}: expected true or false')
    yield Question(
        text=f'{need_text(row, "text")}\n此处，“{pronoun}”是否指代“{noun}”？',
        options=('是', '否'),
        answer=answers[label],
    )


def _race(row: Any) -> Iterator[Question]:
    """`article` with lists `questions`, `options`, `answers`, or with one of each."""
    row = as_object(row)
    article = need_text(row, 'article')
    subject = next((s for s in ('middle', 'high') if str(row.get('id', '')).startswith(s)), '')
    if 'questions' in row:
        lists = [need(row, key) for key in ('questions', 'options', 'answers')]
        for key, found in zip(('questions', 'options', 'answers'), lists, strict=True):
            if not isinstance(found, list):
                raise ValueError(f'{key}: a list, not {kind(found)}')
            if len(found) != len(lists[0]):
                raise ValueError(f'{key}: {len(found)} of {len(lists[0])} questions')
        asked = list(zip(*lists, strict=True))
        places = [f'[{index}]' for index in range(len(asked))]
    else:
        asked, places = [(need(row, 'question'), need(row, 'options'), need(row, 'answer'))], ['']
    for (question, options, answer), place in zip(asked, places, strict=True):
        many = 's' if place else ''
        choices = texts_of(options, f'options{place}')
        yield Question(
            text=f'{article}\n\n{text_of(question, f"question{many}{place}")}',
            options=choices,
            answer=choice_of(answer, f'answer{many}{place}', len(choices)),
            subject=subject,
        )


def _with_passage(row: Mapping[str, Any], key: str, question: str) -> str:
    passage = row.get(key)
    return f'{text_of(passage, key)}\n\n{question}' if passage else question


@dataclass(frozen=True, slots=True)
class QuestionFormat:
    """How the rows of a set are read.

    Attributes:
        read: From a row to its questions, or a ValueError with the field.
        language: Of the prompt that it gets by default: 'en' or 'zh'.
        has_header: Whether its csv files begin with the names of the fields.
        by_file: Whether files or their folders are subjects.
    """

    read: Callable[[Any], Iterator[Question]]
    language: str = 'en'
    has_header: bool = True
    by_file: bool = False


QUESTION_FORMATS = {
    'options': QuestionFormat(_options),
    'mmlu': QuestionFormat(_mmlu, has_header=False, by_file=True),
    'ceval': QuestionFormat(_lettered, 'zh', by_file=True),
    'agieval': QuestionFormat(_agieval, by_file=True),
    'commonsenseqa': QuestionFormat(_commonsenseqa),
    'bustm': QuestionFormat(_bustm, 'zh'),
    'cluewsc': QuestionFormat(_cluewsc, 'zh'),
    'race': QuestionFormat(_race, by_file=True),
}
"""Multiple-choice sets by name."""


def placed(question: Question, place: str, file_subject: str) -> Question:
    """The same question with where it stands, and the file's subject where it has none."""
    return replace(question, place=place, subject=question.subject or file_subject)
