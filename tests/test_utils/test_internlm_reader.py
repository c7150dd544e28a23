"""`internlm_mm/utils/internlm_reader.py`."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_mm.utils.internlm_reader import find_value, read_internlm_config

Write = Callable[[str, str], Path]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)
NUMBERS = st.one_of(st.integers(-9, 9), st.floats(-9, 9))
OPERATORS = {
    '+': operator.add,
    '-': operator.sub,
    '*': operator.mul,
    '/': operator.truediv,
    '//': operator.floordiv,
    '%': operator.mod,
}


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / 'a.py'
    path.write_text(text, encoding='utf-8')
    return read_internlm_config(path).values


@settings(deadline=None)
@given(value=VALUES)
def test_a_literal_is_its_value(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = read(tmp_path_factory.mktemp('literal'), f'value = {value!r}\n')['value']
    assert found == value and repr(found) == repr(value)


@settings(deadline=None)
@given(
    first=NUMBERS,
    rest=st.lists(st.tuples(st.sampled_from(sorted(OPERATORS)), NUMBERS), max_size=5),
)
def test_arithmetic_is_pythons(
    first: float,
    rest: list[tuple[str, float]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    lines, expected = [f'x = {first!r}'], first
    for sign, number in rest:
        lines.append(f'x = (x) {sign} ({number!r})')
        try:
            expected = OPERATORS[sign](expected, number)
        except ArithmeticError:
            expected = None
            break
    folder = tmp_path_factory.mktemp('sums')
    if expected is None:
        with pytest.raises(ValueError, match=f'line {len(lines)}.*(Zero|Overflow)'):
            read(folder, '\n'.join(lines))
    else:
        assert repr(read(folder, '\n'.join(lines))['x']) == repr(expected)


def test_what_configs_are_made_of(tmp_path: Path) -> None:
    values = read(
        tmp_path,
        """
'''A text that stands for a comment.'''
import os  # not used
from math import *  # neither
NAME = 'seven'
EVERY: int = 50
A, B = 1, 2
A += 2
base = dict(x=1, **{'y': 2})
data = dict(base, size=2**16, half=int(EVERY / 2), text=f'runs/{NAME}_{EVERY}', z=-A)
data['more'] = [*(1, 2), 3]
data.update(y=3)
data['inner'] = dict()
data['inner'].update({'w': data['more'][-1]})
flags = dict(on=not False, rounds=max(1, 2), text='a' + 'b')
""",
    )
    assert 'os' not in values
    assert values['data'] == {
        'x': 1,
        'y': 3,
        'size': 65536,
        'half': 25,
        'text': 'runs/seven_50',
        'z': -3,
        'more': [1, 2, 3],
        'inner': {'w': 3},
    }
    assert values['flags'] == {'on': True, 'rounds': 2, 'text': 'ab'}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('import os\nx = os.environ["HOME"]', r'line 2: .*attribute of something imported'),
        ('x = open("a")', r'line 1: .*is a call of open'),
        ('x = dict(a=1).get("a")', r'a call of dict\(a=1\).get'),
        ('x = [i for i in (1, 2)]', 'is ListComp'),
        ('x = lambda: 1', 'is Lambda'),
        ('x = 1 if True else 2', 'is IfExp'),
        ('x = 1 < 2', 'is Compare'),
        ('for i in (1, 2):\n    x = i', "line 1: 'for i in.*is For"),
        ('def f():\n    pass', 'is FunctionDef'),
        ('class A:\n    pass', 'is ClassDef'),
        ('if True:\n    x = 1', 'is If'),
        ('with open("a") as f:\n    pass', 'is With'),
        ('SIZE = 1\nx = SISE', r"'SISE' is not defined above. Did you mean 'SIZE'\?"),
        ('from a import b\nx = b', "'b' is imported"),
        ('x = 1 / 0', 'ZeroDivisionError'),
        ('x = 9**9**9', 'a number too large'),
        ('x = 2**4000\nx = x * x', 'a number too large'),
        ('x = (-1) ** 0.5', 'no number'),
        ('x = "a" * 3', 'Mult of str'),
        ('x = f"{1:>4}"', 'a format'),
        ('x = {}["a"]', 'KeyError'),
        ('x = dict(1)', 'TypeError'),
        ('x = 1\nx["a"] = 2', 'a int'),
        ('x = 1\nx.update(a=2)', 'update of a int'),
        ('x = b"a"', 'is Constant'),
        ('x = (', 'is not valid Python'),
        ('x = "a\\0', 'is not valid Python'),
        ('x = ' + '(' * 90 + ')' * 90 + '\nx = ' + '-' * 5000 + '1', 'nested|valid Python'),
    ],
)
def test_anything_else_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text)
    assert str(tmp_path / 'a.py') in str(error.value)


def test_nothing_is_run(tmp_path: Path) -> None:
    marker = tmp_path / 'ran'
    with pytest.raises(ValueError, match='call'):
        read(tmp_path, f'x = __import__("pathlib").Path({str(marker)!r}).touch()')
    assert not marker.exists()


def test_words_that_grow_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='too long'):
        read(tmp_path, 'x = "a"\n' + 'x = x + x\n' * 40)


def test_bases_are_found_above(write: Write) -> None:
    write('evo/configs/_base_/models/small.py', 'HIDDEN = 64\nmodel = dict(hidden_size=HIDDEN)\n')
    write('evo/configs/_base_/runtime.py', 'enable_tb = True\n_own = 1\n')
    path = write(
        'evo/configs/mine/run.py',
        """\
        from internlm.utils.utils import read_base

        with read_base():
            from configs._base_.models.small import *
            from .._base_.runtime import enable_tb as tensorboard
        model['num_layers'] = 2
        """,
    )
    config = read_internlm_config(path)
    assert config.values == {
        'HIDDEN': 64,
        'model': {'hidden_size': 64, 'num_layers': 2},
        'tensorboard': True,
    }
    assert 'HIDDEN' in config.used


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('from configs.nothing import *', r'no configs/nothing.py in .* or above'),
        ('from .nothing import *', r'no nothing.py in '),
        ('from .a import *', 'in a circle: a.py -> a.py'),
        ('from .b import siz', "defines no 'siz'. Did you mean 'size'"),
        ('x = 1', 'no `from CONFIG import'),
    ],
)
def test_bases_that_are_not_there(write: Write, line: str, message: str) -> None:
    write('b.py', 'size = 1\n')
    path = write('a.py', f'with read_base():\n    {line}\n')
    with pytest.raises(ValueError, match=message):
        read_internlm_config(path)


def test_a_file_that_is_not_there(write: Write) -> None:
    path = write('7B_sft.py', '')
    with pytest.raises(FileNotFoundError, match=r"Did you mean '7B_sft.py'"):
        read_internlm_config(path.with_name('7b_sft.py'))


def test_find_value() -> None:
    values = {'a': {'b': {'c': 1}}, 'd': 2}
    assert find_value(values, 'a.b.c') == 1
    assert find_value(values, 'a.b.x', 7) == 7
    assert find_value(values, 'd.e') is None
