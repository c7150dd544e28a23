"""ms-agent (MSAgent-Bench): calls and their results inside the assistant's text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    a_call,
    calling,
    literal,
    need,
    one_call,
    plain_text,
    speakers,
    to_json,
    turns_of,
    unknown_speaker,
)
from internlm_mm.utils.suggest import kind

_ROLES = ('system', 'user', 'assistant')
_BEGINS = re.compile(r'<\|startof(think|exec)\|>')
_INTRODUCTION = '当前对话可以使用的插件信息如下'
_PROTOCOL = """\
当前对话可以使用的插件信息如下，请自行判断是否需要调用插件来解决当前用户问题。\
若需要调用插件，则需要将插件调用请求按照json格式给出，必须包含api_name、url、parameters字段，\
并在其前后使用<|startofthink|>和<|endofthink|>作为标志。\
然后你需要根据插件API调用结果生成合理的答复； 若无需调用插件，则直接给出对应回复即可：\n\n"""


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    text = record.get('conversations')
    if isinstance(text, str):
        return '<|startofthink|>' in text or _INTRODUCTION in text
    return any('<|startofthink|>' in said or _INTRODUCTION in said for _, said in speakers(record))


def read(record: Mapping[str, Any]) -> Parts:
    """Messages and functions; the list of plugins is taken out of the system's text.

    The address of a plugin is none of a call's arguments and goes.

    Raises:
        ValueError: With the field that is wrong.
    """
    said = need(record, 'conversations')
    said = literal(said, 'conversations') if isinstance(said, str) else said
    messages: list[Message] = []
    tools: list[dict[str, Any]] = []
    for field, speaker, text in turns_of(said, 'conversations'):
        if speaker not in _ROLES:
            raise unknown_speaker(field, speaker, _ROLES)
        if speaker == 'system':
            before, introduction, listed = text.partition(_INTRODUCTION)
            tools = [_tool(plugin, f'{field}.value') for plugin in _plugins(listed)]
            text = before.rstrip() if introduction else text
            messages += [{'role': 'system', 'content': text}] if text else []
        elif speaker == 'user':
            messages.append({'role': 'user', 'content': text})
        else:
            messages += _answers(text, f'{field}.value')
    return messages, tools


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    turns: list[dict[str, str]] = []
    plugins = '\n\n'.join(f'{n}. {to_json(_plugin(tool))}' for n, tool in enumerate(tools, 1))
    prompt = _PROTOCOL + plugins if tools else ''
    if prompt and messages[0]['role'] != 'system':
        turns.append({'from': 'system', 'value': prompt})
    for index, message in enumerate(messages):
        role, text = message['role'], plain_text(message, index)
        if role == 'system':
            text = f'{text}\n{prompt}' if prompt else text
        elif role == 'tool':
            turns[-1]['value'] += f'\n\n<|startofexec|>```JSON\n{text}\n```<|endofexec|>\n'
            continue
        elif role == 'assistant':
            called = one_call(message, index)
            if called is not None:
                request = {'api_name': called[0], 'url': '', 'parameters': called[1]}
                text += f'<|startofthink|>```JSON\n{to_json(request)}\n```<|endofthink|>'
            if turns and turns[-1]['from'] == 'assistant':
                turns[-1]['value'] += text
                continue
        turns.append({'from': role, 'value': text})
    return {'conversations': turns}


def _answers(text: str, field: str) -> Iterator[Message]:
    """What an assistant's text is made of: thoughts with calls, results, and an answer."""
    place = 0
    waits = False
    while (match := _BEGINS.search(text, place)) is not None:
        before = text[place : match.start()]
        close = f'<|endof{match[1]}|>'
        stop = text.find(close, match.end())
        if stop < 0:
            raise ValueError(f'{field}: {match[0]} without {close}')
        inside = _unfenced(text[match.end() : stop])
        place = stop + len(close)
        if match[1] == 'exec':
            if not waits or before.strip():
                raise ValueError(f'{field}: a result (startofexec) that follows no call')
            yield {'role': 'tool', 'content': inside}
            place += text.startswith('\n', place)
            waits = False
            continue
        if waits:
            raise ValueError(f'{field}: a call (startofthink) without its result (startofexec)')
        called = literal(inside, f'{field}, startofthink')
        if not isinstance(called, dict) or 'api_name' not in called:
            raise ValueError(f'{field}, startofthink: an object with api_name and parameters')
        yield calling(before, [a_call(called['api_name'], called.get('parameters') or {})])
        waits = True
    rest = text[place:]
    if waits and rest.strip():
        raise ValueError(f'{field}: a call (startofthink) without its result (startofexec)')
    if not place or (rest.strip() and not waits):
        yield {'role': 'assistant', 'content': rest}


def _unfenced(text: str) -> str:
    """What stands between ```JSON and ```; a text without them as it is."""
    inside = text.strip()
    if not (inside.startswith('```JSON') and inside.endswith('```')):
        return text
    return inside.removeprefix('```JSON').removesuffix('```').strip()


def _plugins(text: str) -> Iterator[dict[str, Any]]:
    """Objects of JSON that describe a plugin, wherever they stand in a text."""
    decoder = json.JSONDecoder()
    place = text.find('{')
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except ValueError:
            found, end = None, place + 1
        if isinstance(found, dict) and ('plugin_name' in found or 'paths' in found):
            yield found
        place = text.find('{', end)


def _tool(plugin: Mapping[str, Any], field: str) -> dict[str, Any]:
    schema = plugin.get('plugin_schema_for_model') or plugin
    paths = schema.get('paths') or []
    given = paths[0].get('parameters') or [] if paths else []
    properties, required = {}, []
    for parameter in given:
        if not isinstance(parameter, Mapping) or not isinstance(parameter.get('name'), str):
            raise ValueError(f'{field}: a parameter of a plugin without a name: {kind(parameter)}')
        rest = {k: v for k, v in parameter.items() if k not in ('name', 'required')}
        properties[parameter['name']] = {'type': 'string', **rest}
        if str(parameter.get('required', '')).lower() == 'true':
            required.append(parameter['name'])
    function = {
        'name': plugin.get('plugin_name') or schema.get('name'),
        'description': schema.get('description') or '',
        'parameters': {'type': 'object', 'properties': properties, 'required': required},
    }
    return {'type': 'function', 'function': function}


def _plugin(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool['function']
    name, description = function['name'], function.get('description', '')
    schema = function.get('parameters') or {}
    parameters = [
        {'name': key, **value, 'required': str(key in schema.get('required', []))}
        for key, value in schema.get('properties', {}).items()
    ]
    path = {'name': name, 'method': 'post', 'parameters': parameters}
    model = {'name': name, 'description': description, 'paths': [path]}
    return {'plugin_name': name, 'plugin_type': 'default', 'plugin_schema_for_model': model}
