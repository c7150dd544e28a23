"""Rows in the public schema of each set, and rows that are wrong."""

import pytest

from internlm_mm.evaluation.questions import QUESTION_FORMATS, Question, placed

SCHEMAS = {
    'options': (
        {'question': 'Why?', 'options': ['no', 'yes'], 'answer': 'yes', 'passage': 'P.'},
        [('P.\n\nWhy?', ('no', 'yes'), 1, '')],
    ),
    'mmlu csv': (['2+2?', '3', '4', '5', '6', 'B'], [('2+2?', ('3', '4', '5', '6'), 1, '')]),
    'mmlu': (
        {'question': '2+2?', 'subject': 'high_school_math', 'choices': ['3', '4'], 'answer': 1},
        [('2+2?', ('3', '4'), 1, 'high school math')],
    ),
    'ceval': (
        {'id': '0', 'question': '几?', 'A': '一', 'B': '二', 'C': '三', 'D': '四', 'answer': 'C'},
        [('几?', ('一', '二', '三', '四'), 2, '')],
    ),
    'agieval': (
        {
            'passage': 'Read.',
            'question': 'Which?',
            'options': ['(A)one', '(B) two', 'C. three', '（D）four', '(E)Eve'],
            'label': 'E',
            'other': None,
        },
        [('Read.\n\nWhich?', ('one', 'two', 'three', 'four', 'Eve'), 4, '')],
    ),
    'agieval list': (
        {'passage': None, 'question': 'Q', 'options': ['(A)1', '(B)2'], 'label': ['B']},
        [('Q', ('1', '2'), 1, '')],
    ),
    'commonsenseqa': (
        {
            'answerKey': 'C',
            'id': '1afa',
            'question': {
                'question_concept': 'door',
                'choices': [
                    {'label': 'A', 'text': 'bank'},
                    {'label': 'B', 'text': 'mall'},
                    {'label': 'C', 'text': 'both'},
                ],
                'stem': 'A revolving door?',
            },
        },
        [('A revolving door?', ('bank', 'mall', 'both'), 2, '')],
    ),
    'commonsenseqa columns': (
        {
            'question': 'A door?',
            'choices': {'label': ['A', 'B'], 'text': ['bank', 'mall']},
            'answerKey': 'B',
        },
        [('A door?', ('bank', 'mall'), 1, '')],
    ),
    'bustm': (
        {'id': 5, 'sentence1': '叫爸爸', 'sentence2': '喊爸爸', 'label': '1'},
        [
            (
                '语句一：“叫爸爸”\n语句二：“喊爸爸”\n请判断语句一和语句二说的是否是一个意思？',
                ('无关', '相关'),
                1,
                '',
            )
        ],
    ),
    'cluewsc': (
        {
            'target': {
                'span2_index': 25,
                'span1_index': 2,
                'span1_text': '床',
                'span2_text': '它',
            },
            'idx': 0,
            'label': 'false',
            'text': '把床拖走，它太重。',
        },
        [('把床拖走，它太重。\n此处，“它”是否指代“床”？', ('是', '否'), 1, '')],
    ),
    'race': (
        {
            'article': 'A text.',
            'id': 'high3.txt',
            'questions': ['One?', 'Two _ .'],
            'options': [['a', 'b'], ['c', 'd']],
            'answers': ['B', 'A'],
        },
        [
            ('A text.\n\nOne?', ('a', 'b'), 1, 'high'),
            ('A text.\n\nTwo _ .', ('c', 'd'), 0, 'high'),
        ],
    ),
    'race columns': (
        {
            'example_id': 'middle1.txt',
            'article': 'A text.',
            'question': 'One?',
            'options': ['a', 'b'],
            'answer': 'A',
        },
        [('A text.\n\nOne?', ('a', 'b'), 0, '')],
    ),
}


@pytest.mark.parametrize('name', SCHEMAS)
def test_public_schemas(name: str) -> None:
    row, expected = SCHEMAS[name]
    found = list(QUESTION_FORMATS[name.partition(' ')[0]].read(row))
    assert [(one.text, one.options, one.answer, one.subject) for one in found] == expected


def test_every_format_has_a_sample() -> None:
    assert {name.partition(' ')[0] for name in SCHEMAS} == set(QUESTION_FORMATS)


def changed(name: str, **changes) -> tuple:
    row = {**SCHEMAS[name][0], **changes}
    return name.partition(' ')[0], {key: value for key, value in row.items() if value is not ...}


@pytest.mark.parametrize(
    ('case', 'message'),
    [
        (('mmlu', ['q', 'a', 'b', 'A']), '4 fields: expected question, A, B, C, D, answer'),
        (('mmlu', ['q', 'a', 'b', 'c', '', 'A']), 'D: the text is empty'),
        (('mmlu', 'text'), 'named fields is expected, not str'),
        (changed('mmlu', answer=7), 'answer 7: expected A to B, or 0 to 1'),
        (changed('mmlu', answer=...), "'answer' is missing"),
        (changed('options', answer='perhaps'), "answer 'perhaps': expected A to B"),
        (changed('ceval', answer=''), "C-Eval's test split: use val"),
        (changed('ceval', C=...), "field 'C' is missing"),
        (changed('agieval', options=None), "format='agieval_cloze'"),
        (changed('agieval', label=['A', 'B']), r"label \['A', 'B'\]: one right option"),
        (changed('agieval', label='AB'), r"label \['A', 'B'\]: one right option"),
        (changed('agieval', label='F'), "label 'F': expected A to E"),
        (changed('commonsenseqa', answerKey=''), "'answerKey' is missing, as in the test split"),
        (changed('commonsenseqa', answerKey='E'), "answerKey 'E': expected one of A, B, C"),
        (changed('commonsenseqa', question={'stem': 'x'}), r'field question\.choices is missing'),
        (changed('commonsenseqa columns', choices=['a']), 'choices: a list of label and text'),
        (changed('bustm', label=2), 'label 2: expected 0 to 1'),
        (changed('bustm', sentence2=None), "'sentence2' is null"),
        (changed('cluewsc', label='maybe'), "label 'maybe': expected true or false"),
        (changed('cluewsc', target={'span1_text': 'x'}), r'target\.span2_text is missing'),
        (changed('cluewsc', target='x'), 'target: an object with span1_text'),
        (changed('race', answers=['A']), 'answers: 1 of 2 questions'),
        (changed('race', options='x'), 'options: a list, not str'),
        (changed('race', options=[['a', 'b'], ['c']]), r'options\[1\]: two options at least'),
        (changed('race', answers=['A', 'C']), r"answers\[1\] 'C': expected A to B"),
    ],
)
def test_rows_that_are_wrong(case: tuple, message: str) -> None:
    name, row = case
    with pytest.raises(ValueError, match=message):
        list(QUESTION_FORMATS[name].read(row))


def test_the_file_says_what_a_row_does_not() -> None:
    one = Question(text='x', options=('a', 'b'), answer=0)
    assert placed(one, 'f:1', 'law').subject == 'law' and placed(one, 'f:1', '').place == 'f:1'
    own = Question(text='x', options=('a', 'b'), answer=0, subject='art')
    assert placed(own, 'f:1', 'law').subject == 'art'


@pytest.mark.parametrize(
    ('options', 'answer', 'right'),
    [
        (['1', '2', '3'], '2', 1), (['1', '2', '3'], 2, 2), (['1', '2', '3'], 'B', 1),
        (['A', 'B'], 'A', 0), (['b', 'c'], ' b ', None), (['x', 'y'], 'y', 1),
        (['B', 'A'], 'A', None), (['B', 'A'], 1, 1),
    ],
)  # fmt: skip
def test_an_answer_is_a_text_a_letter_or_a_number(options, answer, right) -> None:
    row = {'question': 'x', 'options': options, 'answer': answer}
    if right is None:
        with pytest.raises(ValueError, match=r"the letter of '.*give its number, [01] or [01]"):
            list(QUESTION_FORMATS['options'].read(row))
    else:
        (question,) = QUESTION_FORMATS['options'].read(row)
        assert question.answer == right


def test_a_number_is_a_subject() -> None:
    row = {'question': 'x', 'options': ['a', 'b'], 'answer': 0, 'subject': 7}
    assert next(QUESTION_FORMATS['options'].read(row)).subject == '7'


def test_labels_that_are_no_list() -> None:
    row = {'question': 'x', 'choices': {'label': 5, 'text': ['a', 'b']}, 'answerKey': 'A'}
    with pytest.raises(ValueError, match=r'choices\.label: a list, not int'):
        list(QUESTION_FORMATS['commonsenseqa'].read(row))
