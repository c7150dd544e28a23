"""Whether calls are the right ones, by the rules of the Berkeley Function Calling Leaderboard.

Restated after its AST checker for Python, https://github.com/ShishirPatil/gorilla.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from internlm_mm.tokenizers.chat_messages import CODE_TOOL, Call

Mismatch = Literal[
    'count', 'function', 'missing', 'unexpected', 'type', 'value'
]  # fmt: skip
"""How calls differ from the right ones; see `match_calls`."""

OPTIONAL = ''
"""Among accepted values: the argument may be left out."""

_TYPES: dict[str, type] = {
    'string': str,
    'any': str,  # as the leaderboard has it: other types are right where an accepted value has them
    'integer': int,
    'float': float,
    'number': float,
    'boolean': bool,
    'array': list,
    'tuple': list,
    'dict': dict,
    'object': dict,
}
_IGNORED = re.compile(r'[ ,./\-_*^]')


@dataclass(frozen=True, slots=True)
class Expected:
    """A call that is right.

    Attributes:
        name: Of the function.
        arguments: By name, the values that are accepted, `OPTIONAL` among them where the argument
            may be left out. In a value that is an object, each key has a list of its own.
    """

    name: str
    arguments: Mapping[str, Sequence[Any]]


def match_calls(
    calls: Sequence[Call],
    expected: Sequence[Expected],
    schemas: Mapping[str, Mapping[str, Any]],
) -> Mismatch | None:
    """Compare calls, in any order, with those that are right.

    Each of those needs a call of its own. The call of `CODE_TOOL` is right whatever its code is.

    Args:
        calls: What was called.
        expected: What is right, at least one.
        schemas: JSON Schema of each function's parameters; the leaderboard's types are known too.

    Returns:
        None if they match. Otherwise 'count' are more or fewer calls, 'function' one of another
        function, 'missing' an argument that has to be there, 'unexpected' one that has not,
        'type' and 'value' one that is another: of the first right call that has no match, by
        comparison with the call that comes closest.
    """
    if len(calls) != len(expected):
        return 'count'
    found = [
        [_match_call(call, right, schemas.get(right.name, {})) for call in calls]
        for right in expected
    ]
    taken: dict[int, int] = {}
    for index, row in enumerate(found):
        if not _find_place(index, found, taken, set()):
            order = ('value', 'type', 'unexpected', 'missing', 'function')
            free = [kind for place, kind in enumerate(row) if kind and place not in taken]
            return min(free, key=order.index)
    return None


def _find_place(
    index: int,
    found: Sequence[Sequence[Mismatch | None]],
    taken: dict[int, int],
    seen: set[int],
) -> bool:
    """Give a right call a call that matches, moving others to other ones if need be."""
    for place, mismatch in enumerate(found[index]):
        if mismatch is not None or place in seen:
            continue
        seen.add(place)
        if place not in taken or _find_place(taken[place], found, taken, seen):
            taken[place] = index
            return True
    return False


def _match_call(call: Call, right: Expected, schema: Mapping[str, Any]) -> Mismatch | None:
    if call.name != right.name:
        return 'function'
    if right.name == CODE_TOOL and 'code' in right.arguments:
        return None if isinstance(call.arguments.get('code'), str) else 'missing'
    if any(name not in call.arguments for name in schema.get('required') or ()):
        return 'missing'
    properties = schema.get('properties') or {}
    for name, value in call.arguments.items():
        if name not in right.arguments or (properties and name not in properties):
            return 'unexpected'
        mismatch = _match_value(value, right.arguments[name], properties.get(name) or {})
        if mismatch is not None:
            return mismatch
    for name, accepted in right.arguments.items():
        if name not in call.arguments and OPTIONAL not in accepted:
            return 'missing'
    return None


def _match_value(value: Any, accepted: Sequence[Any], schema: Mapping[str, Any]) -> Mismatch | None:
    declared = _TYPES.get(schema['type']) if isinstance(schema.get('type'), str) else None
    of_answers = next((type(one) for one in accepted if one != OPTIONAL), None)
    if declared is None:  # several types, or none: the value's own
        declared = of_answers if _is(value, of_answers) else type(value)
    if declared is float and _is(value, int):
        value = float(value)
    items = schema.get('items')
    inner = _TYPES.get(items['type']) if isinstance(items, Mapping) and _named(items) else None
    inner = inner if declared is list else None
    is_declared = _is(value, declared)
    if is_declared and inner is not None and not _items_fit(value, accepted, inner):
        return 'type'
    if not is_declared and not _is(value, of_answers):
        return 'type'
    if is_declared and of_answers in (None, declared):  # others are variables, compared as they are
        if declared is dict:
            right = any(_match_object(value, one) for one in accepted if one != OPTIONAL)
            return None if right else 'value'
        if declared is list and inner is dict:
            return None if any(_match_objects(value, one) for one in accepted) else 'value'
        if declared is str:
            strings = [one for one in accepted if isinstance(one, str)]
            return None if _among(value, strings) else 'value'
        if declared is list:
            plain = [normalise(one) for one in value]
            lists = [list(one) for one in accepted if not isinstance(one, dict)]
            right = any(plain == [normalise(one) for one in other] for other in lists)
            return None if right else 'value'
    return None if value in accepted else 'value'


def _named(schema: Mapping[str, Any]) -> bool:
    return isinstance(schema.get('type'), str)


def _is(value: Any, kind: type | None) -> bool:
    """Whether a value is of a type and of no sub-type: True is no number."""
    return kind is not None and type(value) is kind


def _items_fit(value: list[Any], accepted: Sequence[Any], kind: type) -> bool:
    """Whether items have their type, or that of the items of an accepted list."""
    for one in accepted:
        if not isinstance(one, list):
            return True
        first = next((type(item) for item in one if item != OPTIONAL), None)
        if all(_is(item, kind) or _is(item, first) for item in value):
            return True
    return False


def normalise(value: Any) -> Any:
    """A text without blanks, case and the signs `,./-_*^`; anything else as it is."""
    if not isinstance(value, str):
        return value
    return _IGNORED.sub('', value).lower().replace("'", '"')


def _among(value: Any, accepted: Sequence[Any]) -> bool:
    return normalise(value) in [normalise(one) for one in accepted]


def _match_object(value: Any, right: Any) -> bool:
    """Whether each key has an accepted value, and those that have to be there are."""
    if not isinstance(value, dict) or not isinstance(right, Mapping):
        return False
    known = all(key in right and _among(one, right[key]) for key, one in value.items())
    return known and all(key in value or OPTIONAL in right[key] for key in right)


def _match_objects(value: Any, right: Any) -> bool:
    if not isinstance(value, list) or not isinstance(right, list) or len(value) != len(right):
        return False
    return all(_match_object(one, other) for one, other in zip(value, right, strict=True))
