"""What a constructor takes, and whether a value fits an annotation."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SEQUENCES = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
_SCALARS = (bool, int, float, str)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@dataclass(frozen=True)
class Options:
    """The keyword arguments of a constructor or function.

    Attributes:
        hints: Annotation of each argument by name; `Any` where there is none.
        defaults: Default of each argument that has one.
        required: Arguments without a default.
        takes_any: Whether further arguments are accepted and not passed on to a parent class.
    """

    hints: dict[str, Any]
    defaults: dict[str, Any]
    required: tuple[str, ...]
    takes_any: bool


@cache
def options_of(target: Callable[..., Any]) -> Options | None:
    """Options of a class or function, or None where Python cannot tell.

    A class that hands `**kwargs` on is followed up its parents, nearest first.
    """
    if inspect.isclass(target):
        owners = [owner for owner in target.__mro__ if '__init__' in vars(owner)]
        functions = [vars(owner)['__init__'] for owner in owners]
    else:
        functions = [target]
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    required: list[str] = []
    takes_any = False
    for depth, function in enumerate(functions):
        if function is object.__init__:
            break
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return None
        if inspect.isclass(target):
            parameters = parameters[1:]
        annotations = _annotations(function)
        takes_any = False
        for parameter in parameters:
            if parameter.kind is parameter.VAR_KEYWORD:
                takes_any = True
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                continue
            elif parameter.name not in hints:
                hints[parameter.name] = annotations.get(parameter.name, Any)
                if parameter.default is not parameter.empty:
                    defaults[parameter.name] = parameter.default
                elif depth == 0:  # what a parent needs, the child may pass itself
                    required.append(parameter.name)
        if not takes_any:
            break
    return Options(hints, defaults, tuple(required), takes_any)


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # an annotation that only a type checker understands tells us nothing
        return {}


def accepts(hint: Any, value: Any) -> bool:
    """Whether `value` may be passed where `hint` is annotated. Unknown annotations take all.

    As type checkers have it, an int is a float; unlike them, a bool is no int, and a list is a
    tuple, because configs and their dumps do not tell these apart.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, _SCALARS) and any(argument in _SCALARS for argument in arguments):
            # `float | Tensor` says what a scalar has to be; the Tensor is for code
            arguments = tuple(a for a in arguments if a in _SCALARS or not _is_opaque(a))
        return any(accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is typing.Annotated:
        return accepts(arguments[0], value)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint is Path:
        return isinstance(value, (str, Path))
    kind = origin or hint
    if kind in _SEQUENCES:
        return isinstance(value, (list, tuple)) and _items_fit(kind, arguments, value)
    if kind in _MAPPINGS:
        return isinstance(value, dict)
    return True


def _is_opaque(hint: Any) -> bool:
    """Whether an annotation is a class of which nothing is known here."""
    return isinstance(hint, type) and hint not in (*_SEQUENCES, *_MAPPINGS, types.NoneType, Path)


def _items_fit(kind: Any, arguments: tuple[Any, ...], value: list | tuple) -> bool:
    if not arguments:
        return True
    if kind is tuple and arguments[-1] is not ...:
        return len(arguments) == len(value) and all(map(accepts, arguments, value))
    return all(accepts(arguments[0], item) for item in value)


def choices_of(hint: Any) -> list[str]:
    """The strings that an annotation lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [choice for one in arguments for choice in choices_of(one)]
    return [one for one in arguments if isinstance(one, str)] if origin is typing.Literal else []


def describe(hint: Any) -> str:
    """How an error message names an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(map(describe, arguments))
    if origin is typing.Literal:
        return ' or '.join(map(repr, arguments))
    if hint is types.NoneType:
        return 'None'
    if hint in _MAPPINGS or origin in _MAPPINGS:
        return 'dict'
    if hint in _SEQUENCES or origin in _SEQUENCES:
        return f'list of {describe(arguments[0])}' if arguments else 'list'
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)
