"""What constructors take, and which values fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.optim import CosineAnnealingLR

from internlm_mm.utils.signatures import accepts, choices_of, describe, options_of


class Parent:
    def __init__(self, width: int, depth: int = 2) -> None:
        self.size = width, depth


class Child(Parent):
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name


class Bare(Parent):
    pass


class Empty:
    pass


class Open:
    def __init__(self, a: 'int', **rest: Any) -> None:
        self.a, self.rest = a, rest


def function(a: float, *rest: int, b: bool = False) -> None:
    del a, rest, b


def test_options_of_classes_and_functions() -> None:
    child = options_of(Child)
    assert child is not None
    assert child.hints == {'name': str, 'width': int, 'depth': int}
    assert child.required == ('name',) and child.defaults == {'depth': 2}
    assert not child.takes_any
    assert options_of(Bare) == options_of(Parent)
    empty = options_of(Empty)
    assert empty is not None and empty.hints == {} and not empty.takes_any
    anything = options_of(Open)
    assert anything is not None and anything.takes_any and anything.hints == {'a': int}
    of_function = options_of(function)
    assert of_function is not None and of_function.hints == {'a': float, 'b': bool}


def test_options_of_other_peoples_classes() -> None:
    cosine, checkpoint = options_of(CosineAnnealingLR), options_of(CheckpointHook)
    adamw = options_of(torch.optim.AdamW)
    assert cosine is not None and {'T_max', 'begin', 'by_epoch'} <= set(cosine.hints)
    assert not cosine.takes_any
    assert checkpoint is not None and checkpoint.takes_any
    assert adamw is not None and adamw.required == ('params',) and 'fused' in adamw.hints


@pytest.mark.parametrize(
    ('hint', 'value', 'fits'),
    [
        (int, 1, True),
        (int, True, False),
        (int, 1.0, False),
        (int, '1', False),
        (float, 1, True),
        (float, False, False),
        (float, '1', False),
        (bool, 1, False),
        (bool, True, True),
        (str, 's', True),
        (str, None, False),
        (None, None, True),
        (Optional[int], None, True),  # noqa: UP045
        (Union[int, str], 's', True),  # noqa: UP007
        (int | None, 1.5, False),
        (Annotated[int, 'steps'], 's', False),
        (Literal['a', 1], 1, True),
        (Literal['a', 1], True, False),
        (Literal['a', 1], 'b', False),
        (Path, 's', True),
        (Path, 1, False),
        (list[int], [1, 2], True),
        (list[int], (1, 2), True),
        (list[int], [1, 'b'], False),
        (Sequence[str], 'text', False),
        (Sequence[str], ['a'], True),
        (tuple[float, float], (0.9, 1), True),
        (tuple[float, float], (0.9,), False),
        (tuple[int, ...], (), True),
        (Mapping[str, int], {'a': 1}, True),
        (dict, [1], False),
        (float | torch.Tensor, 1, True),
        (float | torch.Tensor, '1e-3', False),
        (str | Path, 's', True),
        (Any, object(), True),
        (torch.dtype, 'float32', True),
        ('int', 's', True),
    ],
)
def test_which_values_fit(hint: Any, value: Any, fits: bool) -> None:
    assert accepts(hint, value) is fits


def test_descriptions() -> None:
    assert describe(int | None) == 'int or None'
    assert describe(Literal['a', 'b']) == "'a' or 'b'"
    assert choices_of(Literal['a', 1] | list[int] | Literal['b'] | None) == ['a', 'b']
    assert describe(list[int]) == 'list of int'
    assert describe(Mapping[str, int]) == 'dict'
