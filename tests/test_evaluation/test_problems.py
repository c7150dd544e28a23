"""Rows of problems in the public schema of each set, and rows that are wrong."""

import pytest

from internlm_mm.evaluation.answers import COMPARISONS, EXTRACTORS
from internlm_mm.evaluation.problems import PROBLEM_FORMATS

GSM8K = {'question': 'How many?', 'answer': '4 * 3 = <<4*3=12>>12\n#### 12'}
MATH = {
    'problem': 'Find $x$.',
    'level': 'Level 1',
    'type': 'Algebra',
    'solution': r'So $x = \boxed{\frac{1}{2}}$.',
}
CLOZE = {'passage': None, 'question': 'Solve.', 'options': None, 'label': None, 'answer': '3'}


@pytest.mark.parametrize(
    ('name', 'row', 'expected'),
    [
        ('gsm8k', GSM8K, ('How many?', GSM8K['answer'], '12', '')),
        ('math', MATH, ('Find $x$.', MATH['solution'], r'\frac{1}{2}', 'Algebra')),
        ('agieval_cloze', CLOZE, ('Solve.', '3', '3', '')),
        ('agieval_cloze', CLOZE | {'passage': 'P'}, ('P\n\nSolve.', '3', '3', '')),
        ('question_answer', {'question': 'Q', 'answer': 7}, ('Q', '7', '7', '')),
        (
            'question_answer',
            {'question': 'Q', 'answer': 'x', 'solution': 'so x', 'subject': 's'},
            ('Q', 'so x', 'x', 's'),
        ),
    ],
)
def test_public_schemas(name: str, row: dict, expected: tuple) -> None:
    (found,) = PROBLEM_FORMATS[name].read(row)
    assert (found.text, found.solution, found.answer, found.subject) == expected


@pytest.mark.parametrize(
    ('name', 'row', 'message'),
    [
        ('gsm8k', GSM8K | {'answer': '12'}, "answer: no '#### ' with the number"),
        ('gsm8k', {'question': 'x'}, "'answer' is missing"),
        ('math', MATH | {'solution': '12'}, r'solution: no \\boxed{}'),
        ('math', MATH | {'problem': ''}, 'problem: the text is empty'),
        ('agieval_cloze', CLOZE | {'answer': None}, "'answer' is null"),
        ('question_answer', {'question': 'Q', 'answer': [1]}, 'answer: a text, not list'),
        ('question_answer', ['Q'], 'named fields is expected, not list'),
    ],
)
def test_rows_that_are_wrong(name: str, row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(PROBLEM_FORMATS[name].read(row))


@pytest.mark.parametrize('name', PROBLEM_FORMATS)
def test_defaults_exist(name: str) -> None:
    form = PROBLEM_FORMATS[name]
    assert set(form.extract) <= set(EXTRACTORS) and form.compare in COMPARISONS


def test_a_number_is_a_subject() -> None:
    row = {'question': 'x', 'answer': 1, 'subject': 7}
    assert next(PROBLEM_FORMATS['question_answer'].read(row)).subject == '7'
