"""Fields of rows."""

import pytest

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


def test_what_is_there() -> None:
    row = {'question': ' x ', 'zero': 0}
    assert as_object(row) is row
    assert need(row, 'zero') == 0 and need_text(row, 'question') == 'x'
    assert texts_of([' a', 'b '], 'options') == ('a', 'b')
    assert len(texts_of(['a'] * 26, 'options')) == 26
    subjects = [subject_of({'subject': value}, 'subject') for value in ('law', 3, 0, None, '')]
    assert subjects == ['law', '3', '0', '', ''] and subject_of({}, 'subject') == ''
    assert [choice_of(value, 'answer', 4) for value in ('A', ' d ', 'b', 0, 3)] == [0, 3, 1, 0, 3]
    assert [whole_number(value, 'label', 0, 1) for value in (0, '1', ' 1 ')] == [0, 1, 1]


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: as_object([1]), 'an object with named fields is expected, not list'),
        (
            lambda: need({'questoin': 1}, 'question'),
            "'question' is missing. Did you mean 'questoin'",
        ),
        (lambda: need({'a': None}, 'a'), "^field 'a' is null$"),
        (lambda: subject_of({'subject': 1.5}, 'subject'), 'subject: a text, not float'),
        (lambda: subject_of({'subject': True}, 'subject'), 'subject: a text, not bool'),
        (lambda: texts_of(['a'] * 27, 'options'), 'options: 26 options at most, one a letter'),
        (lambda: text_of(3, 'x'), 'x: a text, not int'),
        (lambda: text_of(' ', 'x'), 'x: the text is empty'),
        (lambda: texts_of('AB', 'options'), 'options: a list, not str'),
        (lambda: texts_of(['a'], 'options'), 'options: two options at least, not 1'),
        (lambda: texts_of(['a', None], 'options'), r'options\[1\]: a text, not null'),
        (lambda: choice_of('E', 'answer', 4), "answer 'E': expected A to D, or 0 to 3"),
        (lambda: choice_of('', 'answer', 4), "answer '': expected A to D"),
        (lambda: choice_of(4, 'answer', 4), 'answer 4: expected A to D'),
        (lambda: choice_of(-1, 'answer', 4), 'answer -1: expected A to D'),
        (lambda: choice_of(True, 'answer', 4), 'answer: a letter or a number, not bool'),
        (lambda: whole_number(2, 'label', 0, 1), 'label 2: expected 0 to 1'),
        (lambda: whole_number('x', 'label', 0, 1), "label 'x': expected 0 to 1"),
        (lambda: whole_number(True, 'label', 0, 1), 'label True: expected 0 to 1'),
    ],
)
def test_what_is_not(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
