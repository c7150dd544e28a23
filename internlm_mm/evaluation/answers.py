r"""Answers found in texts, and compared: '#### 42', '\boxed{}', the last number."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from internlm_mm.utils.suggest import did_you_mean

_SIGN = r'[-−–+]?\s?(?:[$€£¥]|\\\$)?'
# A space between thousands, or what LaTeX has for one or for a comma.
_GAP = r'(?:[ \u00a0\u2009\u202f]|\\[,;:! ]|\{,\})'
_GROUPED = rf'(?<![\d,.^_/])[1-9]\d{{0,2}}(?:{_GAP}\d{{3}}(?!\d))+'
_DIGITS_AND_MORE = (
    rf'(?:{_GROUPED}|\d(?:[\d,]*\d)?)(?:\.\d+)?(?:[eE][-+]?\d+\b)?(?:\s?/\s?\d+(?:\.\d+)?)?'
)
_BARE = re.compile(rf'(?<![\w.]){_SIGN}(?:{_DIGITS_AND_MORE}|\.\d+)')
_ANSWER_IS = re.compile(r'(?:\banswer\s*(?:is|:|=)|答案\s*(?:是|为|：|:))[\s:：*]*', re.IGNORECASE)
_DIGITS = re.compile(r'[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?')
_MOST_DIGITS = 4000  # of a power of ten; a model may write any


def extract_hash(text: str) -> str | None:
    """What follows the last '####' on its line, as GSM8K ends its solutions."""
    _, mark, rest = text.rpartition('####')
    line = rest.lstrip(' \t').partition('\n')[0].strip()
    return line if mark and line else None


def extract_boxed(text: str) -> str | None:
    r"""What is in the last \boxed{}, braces inside it included; also of '\boxed 5' and \fbox."""
    found = list(re.finditer(r'\\(?:boxed|fbox)(?![A-Za-z])', text))
    for match in reversed(found):
        start = match.end()
        rest = text[start:].lstrip(' ')
        if rest.startswith('{'):
            inside = _in_braces(rest)
            if inside is not None:
                return inside.strip() or None
        elif word := re.match(r'[^\s$}]+', rest):
            return word.group()
    return None


def extract_last_number(text: str) -> str | None:
    """The last number in a text, with sign, separators and a fraction's denominator."""
    found = _BARE.findall(text)
    return found[-1].strip() if found else None


def extract_answer_is(text: str) -> str | None:
    """What follows the last 'answer is', '答案是' and the like, to the end of the sentence."""
    found = list(_ANSWER_IS.finditer(text))
    if not found:
        return None
    # A full stop ends a sentence where no digit follows.
    sentence = re.split(r'[.](?!\d)(?:\s|$)|[。\n]', text[found[-1].end() :])[0]
    return sentence.strip().strip('*').strip() or None


def extract_whole(text: str) -> str | None:
    """The text itself, without white space at both ends."""
    return text.strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    'hash': extract_hash,
    'boxed': extract_boxed,
    'answer_is': extract_answer_is,
    'last_number': extract_last_number,
    'whole': extract_whole,
}
"""Where an answer is looked for in a text."""


def parse_number(text: str) -> Fraction | None:
    r"""The value of '1,234', '1 000', '1{,}234', '$5.00', '-3/4', '50%', '\frac{1}{2}', '1e3'.

    None of other texts. A percent sign changes nothing, as answers have it or not.
    """
    text = text.strip().strip('$').strip()
    text = re.sub(r'^([-−–+]?)\s*(?:[$€£¥]|\\\$)\s*', r'\1', text)
    text = re.sub(r'\s*(?:\\?%|\.)$', '', text).replace('−', '-').replace('–', '-')
    text = re.sub(r'^([-+])\s+', r'\1', text)
    text = re.sub(r'(?<=\d),(?:\\!)?(?=\d{3}(?!\d))', '', text)
    text = re.sub(_GROUPED, lambda match: re.sub(_GAP, '', match.group()), text)
    match = re.fullmatch(r'([-+]?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}', text)
    if match:
        sign, above, below = match.groups()
        text = f'{above}/{below}'
        factor = -1 if sign == '-' else 1
    else:
        factor = 1
    above, slash, below = (part.strip() for part in text.partition('/'))
    numerator, denominator = _value(above), _value(below) if slash else Fraction(1)
    if numerator is None or not denominator:
        return None
    return factor * numerator / denominator


def same_number(found: str, right: str) -> bool:
    """Whether two answers are the same number, or the same text where one is none."""
    one, other = parse_number(found), parse_number(right)
    return same_text(found, right) if one is None or other is None else one == other


def same_text(found: str, right: str) -> bool:
    """Whether two answers are the same but for case, white space and a full stop at the end."""
    return _plain(found) == _plain(right)


def same_latex(found: str, right: str) -> bool:
    """Whether two answers are spelt alike after `normalise_latex`, or are the same number."""
    one, other = normalise_latex(found), normalise_latex(right)
    if one == other:
        return True
    values = parse_number(one), parse_number(other)
    return None not in values and values[0] == values[1]


def same_near(found: str, right: str) -> bool:
    """Whether two answers are numbers within 0.001, as PaL compares them, or the same text."""
    one, other = parse_number(found), parse_number(right)
    if one is None or other is None:
        return same_text(found, right)
    return abs(one - other) < Fraction(1, 1000)


def contains(found: str, right: str) -> bool:
    """Whether the right answer stands in a text as words of its own, case and blanks apart."""
    inside, whole = re.escape(_plain(right)), _plain(found)
    if not inside:
        return not whole
    return re.search(rf'(?<!\w){inside}(?!\w)', whole) is not None


def same_auto(found: str, right: str) -> bool:
    """Of a number, whether it is the last one of a text; of another answer, as `contains`."""
    if parse_number(right) is None:
        return contains(found, right)
    return same_number(found, right) or same_number(extract_last_number(found) or '', right)


COMPARISONS: dict[str, Callable[[str, str], bool]] = {
    'number': same_number,
    'latex': same_latex,
    'text': same_text,
    'near': same_near,
    'contains': contains,
    'auto': same_auto,
}
"""When two answers are the same."""


def find_comparison(compare: str) -> Callable[[str, str], bool]:
    """When two answers are the same, by its name.

    Raises:
        ValueError: If there is none of that name; says the nearest.
    """
    if compare not in COMPARISONS:
        raise ValueError(f'compare={compare!r} is unknown.{did_you_mean(compare, COMPARISONS)}')
    return COMPARISONS[compare]


def normalise_latex(text: str) -> str:
    r"""One spelling for what LaTeX spells in several ways.

    Spaces, \left and \right, sizes of fractions, units, currency and degrees go; \frac12 becomes
    \frac{1}{2}, \sqrt3 becomes \sqrt{3}, '(C)' becomes 'C', and of 'x = 5' the 5 is left.

    Source: the rules of https://github.com/hendrycks/math, modeling/math_equivalence.py, restated.
    """
    text = text.strip().strip('$').strip()
    text = text.replace('\\\\', '\\') if '\\begin' not in text else text
    text = re.sub(r'(?<=\d)\{,\}(?=\d{3}(?!\d))', '', text)
    for spelt in ('\\!', '\\,', '\\;', '\\:', '\\ ', '\\left', '\\right', '\\displaystyle', '~'):
        text = _drop(text, spelt)
    text = re.sub(r'\\[dtc]frac(?![A-Za-z])', r'\\frac', text)
    text = re.sub(r'\^\{?\\circ\}?|\\degree(?![A-Za-z])|°', '', text)
    text = re.sub(r'\\?[%$]', '', text)
    # A text behind a value is its unit; one that is all there is is the answer.
    unit = re.sub(r'\s*\\(?:text|mbox|textrm|mathrm)\s*\{\s*[^{}]*\}(?:\^\{?\d\}?)?\s*$', '', text)
    text = unit or text
    text = re.sub(r'\\(?:text|mbox|textbf|textrm|mathrm|mathbf)\s*\{([^{}]*)\}', r'\1', text)
    text = text.strip().rstrip('.').strip()
    match = re.fullmatch(r'\s*[A-Za-z]{1,2}\s*=([^=]+)', text)
    text = match.group(1) if match else text
    text = re.sub(r'\s+', '', text)
    text = re.sub(r'^\(([A-Z])\)$', r'\1', text)
    text = re.sub(r'(?<=\d),(?=\d{3}(?!\d))(?![^(\[]*[)\]])', '', text)  # no list in brackets
    text = re.sub(r'\\sqrt(\w)', r'\\sqrt{\1}', text)
    text = re.sub(r'\\frac(?:\{([^{}]*)\}|([^{}\\]))(?:\{([^{}]*)\}|([^{}\\]))', _fraction, text)
    text = re.sub(r'(?<![\d.])\.(?=\d)', '0.', text)
    return re.sub(r'^(-?)(\d+)/(\d+)$', r'\1\\frac{\2}{\3}', text)


def _fraction(match: re.Match) -> str:
    above, short_above, below, short_below = match.groups()
    return f'\\frac{{{above or short_above}}}{{{below or short_below}}}'


def _drop(text: str, spelt: str) -> str:
    r"""Take a command out, but not where it begins a longer one: \leftarrow keeps its \left."""
    # A backslash in front makes it the second half of a line's end.
    end = r'(?![A-Za-z])' if spelt[-1].isalpha() else ''
    return re.sub(rf'(?<!\\){re.escape(spelt)}{end}', '', text)


def _value(text: str) -> Fraction | None:
    if not _DIGITS.fullmatch(text):
        return None
    _, _, power = text.lower().partition('e')
    if (power and abs(int(power)) > _MOST_DIGITS) or len(text) > _MOST_DIGITS:
        return None
    return Fraction(text)


def _plain(text: str) -> str:
    return ' '.join(text.split()).rstrip('.。').strip().casefold()


def _in_braces(text: str) -> str | None:
    """What is between a brace, which `text` begins with, and the one that closes it."""
    depth, index = 0, 0
    while index < len(text):
        if text[index] == '\\':
            index += 2  # an escaped brace is none
            continue
        depth += {'{': 1, '}': -1}.get(text[index], 0)
        if depth == 0:
            return text[1:index]
        index += 1
    return None
