"""Answers in texts: tables written by hand, and properties."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as some

from internlm_mm.evaluation.answers import (
    COMPARISONS,
    EXTRACTORS,
    extract_boxed,
    extract_last_number,
    normalise_latex,
    parse_number,
    same_latex,
    same_number,
    same_text,
)


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ('6 * 7 = 42\n#### 42', '42'),
        ('#### 1,234\nAnd so on', '1,234'),
        ('#### 5 #### 6', '6'),
        ('####    $18.00  ', '$18.00'),
        ('#### ', None),
        ('the hash ### 3', None),
        ('', None),
    ],
)
def test_behind_the_hashes(text: str, found: str | None) -> None:
    assert EXTRACTORS['hash'](text) == found


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        (r'so $\boxed{42}$.', '42'),
        (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
        (r'\boxed{a} or rather \boxed{x_{1}^{2}} it is', 'x_{1}^{2}'),
        (r'\boxed{\{1, 2\}}', r'\{1, 2\}'),
        (r'\boxed{\text{A}\}}', r'\text{A}\}'),
        (r'\boxed {7}', '7'),
        (r'$\boxed 5$', '5'),
        (r'\fbox{3}', '3'),
        (r'\boxed{ok}, later \boxed{never closed', 'ok'),
        (r'\boxed{\boxed{8}}', '8'),
        (r'\boxed{}', None),
        (r'\boxedx{1}', None),
        ('boxed{1}', None),
        ('', None),
    ],
)
def test_in_the_last_box(text: str, found: str | None) -> None:
    assert extract_boxed(text) == found


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ('It costs $1,234.50.', '$1,234.50'),
        ('between 3 and 3/4 of it', '3/4'),
        ('x=-5', '-5'),
        ('pages 3-5', '5'),
        ('it is −7 degrees', '−7'),
        ('10%', '10'),
        ('.5 is a half', '.5'),
        ('GPT-4 says 12', '12'),
        ('about 1e3 of them', '1e3'),
        ('2 + 3 = 5.', '5'),
        ('5, 6 and 7,', '7'),
        ('it costs 1 000 dollars', '1 000'),
        ('12\u202f345\u00a0678.5.', '12\u202f345\u00a0678.5'),
        (r'thus $1{,}234$ of them', '$1{,}234'),
        (r'thus $-1\,234$', r'-1\,234'),
        ('in 2020 100 people', '100'),
        ('5 100 20', '20'),
        ('a decimal comma, 1{,}5', '5'),
        ('a1b2', None),
        ('none at all', None),
    ],
)
def test_the_last_number(text: str, found: str | None) -> None:
    assert extract_last_number(text) == found


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ('The answer is 5.', '5'),
        ('The answer is: **42**.', '42'),
        ('So the answer is 3.5 apples. Good.', '3.5 apples'),
        ('Answer: x. The final answer is $y$.', '$y$'),
        ('答案是A。', 'A'),
        ('答案：12\n完', '12'),
        ('No answers here', None),
    ],
)
def test_behind_answer_is(text: str, found: str | None) -> None:
    assert EXTRACTORS['answer_is'](text) == found


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1,234', 1234), ('$5.00', 5), ('\\$3', 3), ('$ 5', 5), ('$-5$', -5), ('-$5', -5),
        ('50%', 50), ('50\\%', 50), ('-3/4', Fraction(-3, 4)), ('\\frac{1}{2}', Fraction(1, 2)),
        ('-\\dfrac{1}{2}', Fraction(-1, 2)), ('1e3', 1000), ('5.', 5), ('−7', -7), ('- 7', -7),
        ('1 000', 1000), ('-1\u202f000.5', Fraction(-2001, 2)), ('1{,}234', 1234),
        (r'1\,234\,567', 1_234_567), ('1 00', None), ('0 100', None), ('1{,}5', None),
        ('2020 100', None), ('1 000 00', None),
        ('+7', 7), ('.5', Fraction(1, 2)), ('1,000,000', 10**6), ('0.1', Fraction(1, 10)),
        ('1,23', None), ('x', None), ('1/0', None), ('', None), ('1_000', None), ('1 2', None),
        ('1e99999999', None), ('nan', None), ('inf', None), ('1/2/3', None),
    ],
)  # fmt: skip
def test_values(text: str, value: int | Fraction | None) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ('one', 'other', 'same'),
    [
        (r'\dfrac12', r'\frac{1}{2}', True),
        ('0.5', r'\frac12', True),
        ('1/2', r'\tfrac{1}{2}', True),
        (r'5\text{ cm}', '5', True),
        (r'5\mathrm{cm}^2', '5', True),
        ('x = 5', '5', True),
        (r'y = 2x+1', '2x + 1', True),
        (r'\left( 1, 2 \right)', '(1,2)', True),
        (r'\text{Monday}', 'Monday', True),
        (r'90^\circ', '90', True),
        (r'\$1,000', '1000', True),
        (r'10\%', '10', True),
        (r'\sqrt3', r'\sqrt{3}', True),
        (r'3 \sqrt{2}', r'3\sqrt{2}', True),
        (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix}1\\2\end{pmatrix}', True),
        ('2', '2.0', True),
        ('1{,}234', '1234', True),
        (r'\$1{,}234{,}567', '1,234,567', True),
        ('1{,}5', '15', False),
        ('(1{,}234, 5)', '(1234,5)', True),
        ('1 000', '1000', True),
        (r'\text{(C)}', 'C', True),
        ('(C)', r'\textbf{(C)}', True),
        ('(C)', 'D', False),
        ('(c)', 'c', False),
        ('$7$.', '7', True),
        ('(1,000)', '(1000)', False),  # a pair
        ('1,2', '12', False),
        ('(3,4)', '(4,3)', False),
        (r'\leftarrow', 'arrow', False),
        (r'\sqrt{3}', r'\sqrt{5}', False),
        ('a', 'A', False),
        ('x=1', 'x=2', False),
        ('1', '-1', False),
    ],
)
def test_latex(one: str, other: str, same: bool) -> None:
    assert same_latex(one, other) is same
    assert same_latex(other, one) is same


def test_numbers_and_texts() -> None:
    assert same_number('1,234.0', '$1234')
    assert not same_number('12', '1 2')
    assert same_number('1 000', '1,000') and same_number('1{,}000', '$1000')
    assert same_number('Paris.', 'paris') and not same_number('five', '5')
    assert same_text('  The  Cat. ', 'the cat') and not same_text('cat', 'the cat')
    assert EXTRACTORS['whole']('  x \n') == 'x' and EXTRACTORS['whole'](' \n') is None


@given(some.integers(-(10**12), 10**12), some.integers(0, 4))
def test_numbers_come_back_out_of_sentences(value: int, places: int) -> None:
    text = f'{value:,}' + ('.' + '0' * places if places else '')
    found = extract_last_number(f'After 3 days, they have {text}.')
    assert found is not None and parse_number(found) == value


@pytest.mark.parametrize(
    ('compare', 'found', 'right', 'same'),
    [
        ('near', '42.0004', '42', True),
        ('near', '42.002', '42', False),
        ('near', '0.1', '1/10', True),
        ('near', 'None', '42', False),
        ('near', 'Yes', 'yes', True),
        ('contains', 'It was a  Tuesday.', 'tuesday', True),
        ('contains', 'It was Tuesdays', 'Tuesday', False),
        ('contains', 'On 2024-03-01, I think', '2024-03-01', True),
        ('contains', '(C++)', 'c++', True),
        ('contains', 'Something', '', False),
        ('auto', 'Of 12 eggs, 1,391 are left.', '1391', True),
        ('auto', '391, which is 17 times 23', '391', False),
        ('auto', 'No number', '391', False),
        ('auto', 'The 4 of them met in New  York', 'new york', True),
    ],
)
def test_of_programs_and_agents(compare: str, found: str, right: str, same: bool) -> None:
    assert COMPARISONS[compare](found, right) is same


@given(some.text('{}ab1 ', max_size=12).filter(lambda text: _is_balanced(text) and text.strip()))
def test_whatever_is_balanced_comes_back_out_of_a_box(inside: str) -> None:
    assert extract_boxed(rf'Thus \boxed{{{inside}}} holds') == inside.strip()


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += {'{': 1, '}': -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


@given(some.text(max_size=40))
def test_no_text_is_too_odd(text: str) -> None:
    for extract in EXTRACTORS.values():
        found = extract(text)
        assert found is None or (found and found in text)
    for same in COMPARISONS.values():
        assert same(text, text)


@given(some.integers(-99, 99), some.integers(1, 99), some.sampled_from('dtc '))
def test_a_fraction_is_itself_however_it_is_spelt(above: int, below: int, size: str) -> None:
    plain = rf' $\{size.strip()}frac{{{above}}} {{{below}}} \!$ '
    assert same_latex(plain, f'{above}/{below}')
    assert normalise_latex(normalise_latex(plain)) == normalise_latex(plain)
