"""xLAM and APIGen: a question, functions, and the calls that answer it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    a_call,
    calling,
    calls_of,
    list_of,
    need,
    parsed,
    plain_text,
    text_of,
    to_json,
)
from internlm_mm.utils.suggest import kind

# Their parameters have types of Python; JSON Schema has these.
_TYPES = {
    'str': 'string',
    'int': 'integer',
    'float': 'number',
    'bool': 'boolean',
    'list': 'array',
    'dict': 'object',
}
_OPTIONAL = ', optional'
TYPE_KEY = 'x-type'
"""Keyword of a parameter's schema: its type in the data set, where the schema has none for it."""


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    return all(key in record for key in ('query', 'answers', 'tools'))


def read(record: Mapping[str, Any]) -> Parts:
    """Messages and functions, their parameters as JSON Schema.

    Raises:
        ValueError: With the field that is wrong.
    """
    tools = list_of(parsed(need(record, 'tools'), 'tools'), 'tools')
    calls = []
    for index, answer in enumerate(list_of(parsed(need(record, 'answers'), 'answers'), 'answers')):
        if not isinstance(answer, Mapping) or 'name' not in answer:
            raise ValueError(f'answers[{index}]: an object with name and arguments')
        calls.append(a_call(answer['name'], answer.get('arguments') or {}))
    question = {'role': 'user', 'content': text_of(need(record, 'query'), 'query')}
    answered = calling('', calls) if calls else {'role': 'assistant', 'content': ''}
    return [question, answered], [_tool(tool, f'tools[{n}]') for n, tool in enumerate(tools)]


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    roles = [message['role'] for message in messages]
    if roles != ['user', 'assistant'] or plain_text(messages[1], 1):
        raise ValueError('this form has one question, and calls without a text as its answer')
    calls = [{'name': name, 'arguments': given} for name, given in calls_of(messages[1], 1)]
    listed = [_listed(tool['function']) for tool in tools]
    return {
        'query': plain_text(messages[0], 0),
        'answers': to_json(calls),
        'tools': to_json(listed),
    }


def _tool(tool: Any, field: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise ValueError(f'{field}: an object with name and parameters, not {kind(tool)}')
    given = tool.get('parameters') or {}
    if 'function' in tool:
        return dict(tool)
    if not isinstance(given, Mapping):
        raise ValueError(f'{field}.parameters: an object, not {kind(given)}')
    if given.get('type') == 'object':  # JSON Schema already
        return {'type': 'function', 'function': dict(tool)}
    properties, required = {}, []
    for name, parameter in given.items():
        if not isinstance(parameter, Mapping):
            raise ValueError(f'{field}.parameters.{name}: an object, not {kind(parameter)}')
        said = parameter.get('type', '')
        if not isinstance(said, str):
            raise ValueError(f'{field}.parameters.{name}.type: a text, not {kind(said)}')
        properties[name] = _schema(said.removesuffix(_OPTIONAL)) | {
            key: value for key, value in parameter.items() if key != 'type'
        }
        if not said.endswith(_OPTIONAL):
            required.append(name)
    schema = {'type': 'object', 'properties': properties, 'required': required}
    return {'type': 'function', 'function': {**tool, 'parameters': schema}}


def _schema(said: str) -> dict[str, Any]:
    if said in _TYPES:
        return {'type': _TYPES[said]}
    items = re.fullmatch(r'List\[(.*)\]', said)
    if items is not None:
        return {'type': 'array', 'items': _schema(items[1])}
    if re.fullmatch(r'Dict(\[.*\])?', said):
        return {'type': 'object', TYPE_KEY: said}
    return {TYPE_KEY: said}


def _listed(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get('parameters') or {}
    required = schema.get('required', [])
    parameters = {}
    for name, parameter in schema.get('properties', {}).items():
        rest = {k: v for k, v in parameter.items() if k not in ('type', 'items', TYPE_KEY)}
        said = _said(parameter) + ('' if name in required else _OPTIONAL)
        parameters[name] = {**rest, 'type': said}
    return {**function, 'parameters': parameters}


def _said(schema: Mapping[str, Any]) -> str:
    if TYPE_KEY in schema:
        return schema[TYPE_KEY]
    if schema.get('type') == 'array' and 'items' in schema:
        return f'List[{_said(schema["items"])}]'
    names = {theirs: ours for ours, theirs in _TYPES.items()}
    if schema.get('type') not in names:
        raise ValueError(f'tools: this form has no type for {to_json(schema)}')
    return names[schema['type']]
