"""JSON Schema: of a Python function, and of calls that should fit one."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema
import referencing.exceptions

from internlm_mm.agents.bounded_schema import MOST_ERRORS, TooMuchWork, check, find_errors

_PLAIN = {
    str: 'string',
    int: 'integer',
    float: 'number',
    bool: 'boolean',
    list: 'array',
    dict: 'object',
    type(None): 'null',
}
_LISTS = (list, tuple, set, Sequence)
_MOST = 3  # errors of one call that are told


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What OpenAI's form says of a function: name, description and parameters.

    Types are those of the signature, descriptions those of the docstring in Google's form.

    Args:
        function: With a type for every parameter.

    Raises:
        ValueError: If a parameter has no type, one that JSON has no word for, or none of its own.
    """
    name = function.__name__
    hints = typing.get_type_hints(function)
    summary, described = _docstring(inspect.getdoc(function) or '')
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f'tool {name!r}: parameter {parameter.name!r} has no name to call it by'
            )
        if parameter.name not in hints:
            raise ValueError(f'tool {name!r}: parameter {parameter.name!r} has no type')
        schema = _type_schema(hints[parameter.name], f'tool {name!r}: parameter {parameter.name!r}')
        if parameter.name in described:
            schema['description'] = described[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif _is_json(parameter.default):
            schema['default'] = parameter.default
        properties[parameter.name] = schema
    parameters: dict[str, Any] = {
        'type': 'object',
        'properties': properties,
        'required': required,
        'additionalProperties': False,
    }
    return {'name': name, 'description': summary, 'parameters': parameters}


def check_schema(parameters: Any, field: str) -> None:
    """Refuse parameters that are no JSON Schema.

    Raises:
        ValueError: Beginning with `field`.
    """
    try:
        check(parameters)
    except jsonschema.SchemaError as error:
        raise ValueError(f'{field}: no JSON Schema: {_first_line(error.message)}') from None
    except RecursionError:
        raise ValueError(f'{field}: nested too deeply') from None


def argument_errors(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """What is wrong with a call's arguments; nothing if they fit.

    Args:
        arguments: By name.
        parameters: JSON Schema of the function.
    """
    try:
        errors = find_errors(arguments, parameters)
    except referencing.exceptions.Unresolvable as missing:
        return [f'the schema refers to {missing.ref!r}, which is not in it']
    except RecursionError:
        return ['they are nested too deeply, or the schema refers to itself without end']
    except TooMuchWork as why:
        return [_first_line(str(why))]
    except ArithmeticError as why:  # such as 10**400 with a `multipleOf` of 0.5
        return [f'a number cannot be compared with the schema: {why}']
    told = []
    for error in errors[:_MOST]:
        place = ''.join(f'[{p!r}]' for p in error.absolute_path)
        told.append(
            f'{place}: {_first_line(error.message)}' if place else _first_line(error.message)
        )
    if len(errors) > _MOST:
        told.append(f'and {len(errors) - _MOST}{" or" * (len(errors) == MOST_ERRORS)} more')
    return told


def _type_schema(hint: Any, field: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {'type': _PLAIN[hint]}
    if origin is typing.Literal:
        return {'enum': list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return _union_schema([_type_schema(one, field) for one in arguments])
    if origin in _LISTS or hint in _LISTS:
        items = [one for one in arguments if one is not Ellipsis]
        if len(set(map(repr, items))) > 1:
            raise ValueError(f'{field}: {hint} has items of several types')
        return {'type': 'array'} | ({'items': _type_schema(items[0], field)} if items else {})
    if origin in (dict, Mapping) or hint is Mapping:
        if arguments and arguments[0] is not str:
            raise ValueError(f'{field}: {hint}: keys are texts in JSON')
        values = {'additionalProperties': _type_schema(arguments[1], field)} if arguments else {}
        return {'type': 'object'} | values
    raise ValueError(
        f'{field}: there is no JSON for {hint}; str, int, float, bool, list, dict, Literal, None, '
        'and unions of them'
    )


def _union_schema(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(set(schema) == {'type'} for schema in schemas):
        return {'type': [schema['type'] for schema in schemas]}
    return {'anyOf': schemas}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Description of a function, and of its arguments, in a docstring of Google's form."""
    before, _, after = text.partition('\nArgs:\n')
    summary = re.split(r'\n(?:Returns|Raises|Yields|Example|Examples|Note|Notes):\n', before)[0]
    described: dict[str, str] = {}
    name = ''
    for line in after.split('\n'):
        if line.strip() and not line.startswith(' '):
            break
        match = re.match(r' {4}(\w+)(?: ?\([^)]*\))?: *(.*)', line)
        if match is not None:
            name = match[1]
            described[name] = match[2]
        elif name and line.strip():
            described[name] += f' {line.strip()}'
    return ' '.join(summary.split()), described


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _first_line(text: str) -> str:
    line = text.split('\n')[0]
    return line if len(line) <= 300 else f'{line[:300]}...'
