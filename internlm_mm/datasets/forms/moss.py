"""MOSS-003 with plugins, InternLM's own tool data: turns of thoughts, commands and results."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    a_call,
    calling,
    calls_of,
    named,
    need,
    plain_text,
    text_of,
    to_json,
)
from internlm_mm.utils.suggest import kind

_TAGS = {
    'Human': ('<|Human|>:', '<eoh>'),
    'Inner Thoughts': ('<|Inner Thoughts|>:', '<eot>'),
    'Commands': ('<|Commands|>:', '<eoc>'),
    'Tool Responses': ('<|Results|>:', '<eor>'),
    'MOSS': ('<|MOSS|>:', '<eom>'),
}
_API = re.compile(r'API: (\w+)\(([\w, ]*)\)')
# Names of arguments, which commands lack; where meta_instruction tells of them it has the word.
_KNOWN = {
    'Search': ('query',),
    'Calculate': ('expression',),
    'Solve': ('equation',),
    'Text2Image': ('description',),
    'python': ('code',),
}
_NONE = 'None'


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    return 'meta_instruction' in record and isinstance(record.get('chat'), Mapping)


def read(record: Mapping[str, Any]) -> Parts:
    """Messages and functions, those that `meta_instruction` enables.

    A thought before a command is the call's content. One without a command goes.

    Raises:
        ValueError: With the field that is wrong.
    """
    meta = text_of(record.get('meta_instruction') or '', 'meta_instruction')
    names = {
        name: tuple(filter(None, re.split(r',\s*', given))) for name, given in _API.findall(meta)
    }
    tools = [_tool(name, given) for name, given in names.items()]
    messages: list[Message] = [{'role': 'system', 'content': meta}] if meta else []
    chat = need(record, 'chat')
    if not isinstance(chat, Mapping):
        raise ValueError(f'chat: an object of turns, not {kind(chat)}')
    for key in sorted(chat, key=_number):
        turn = chat[key]
        if not isinstance(turn, Mapping):
            raise ValueError(f'chat.{key}: an object, not {kind(turn)}')
        said = {name: _inside(turn.get(name), name, f'chat.{key}') for name in _TAGS}
        messages.append({'role': 'user', 'content': said['Human']})
        if said['Commands'] not in ('', _NONE):
            commands = list(_commands(said['Commands'], {**_KNOWN, **names}))
            thought = '' if said['Inner Thoughts'] == _NONE else said['Inner Thoughts']
            messages.append(calling(thought, [call for _, call in commands]))
            spelt = [spelling for spelling, _ in commands]
            results = _results(said['Tool Responses'], spelt)
            messages += [{'role': 'tool', 'content': result} for result in results]
        messages.append({'role': 'assistant', 'content': said['MOSS']})
    return named(messages), tools


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    turns: list[dict[str, str]] = []
    commands: list[str] = []
    meta = plain_text(messages[0], 0) if messages[0]['role'] == 'system' else ''
    enabled = {name for name, _ in _API.findall(meta)}
    missing = [
        tool['function']['name'] for tool in tools if tool['function']['name'] not in enabled
    ]
    if missing:
        raise ValueError(f"tools: the system's text does not say 'API: {missing[0]}(...)'")
    for index, message in enumerate(messages):
        role, text = message['role'], plain_text(message, index)
        if role == 'user':
            commands = []
            turns.append({'Human': text, 'Inner Thoughts': _NONE, 'Commands': _NONE,
                          'Tool Responses': _NONE, 'MOSS': ''})  # fmt: skip
        elif role == 'tool':
            before = '' if turns[-1]['Tool Responses'] == _NONE else turns[-1]['Tool Responses']
            turns[-1]['Tool Responses'] = f'{before}\n{commands.pop(0)} =>\n{text}'
        elif role == 'assistant':
            calls = calls_of(message, index)
            if calls and turns[-1]['Commands'] != _NONE:
                raise ValueError(f'message {index}: this form has calls once a turn')
            if calls:
                commands = [_command(*call) for call in calls]
                turns[-1]['Commands'] = ', '.join(commands)
                turns[-1]['Inner Thoughts'] = text or _NONE
            else:
                turns[-1]['MOSS'] = text
    chat = {
        f'turn_{number}': {name: _tagged(turn[name], name) for name in _TAGS}
        for number, turn in enumerate(turns, 1)
    }
    return {'meta_instruction': meta, 'num_turns': len(turns), 'chat': chat}


def _number(key: str) -> int:
    number = key.rpartition('_')[2]
    if not number.isdecimal():
        raise ValueError(f"chat: 'turn_1' and so on, not {key!r}")
    return int(number)


def _inside(value: Any, name: str, field: str) -> str:
    if value is None:
        return _NONE
    begin, end = _TAGS[name]
    text = text_of(value, f'{field}.{name}').strip('\n').removesuffix(end)
    if text.startswith(begin):
        text = text.removeprefix(begin).removeprefix(' ')
    return text.strip('\n') if name == 'Tool Responses' else text


def _tagged(text: str, name: str) -> str:
    begin, end = _TAGS[name]
    if name == 'Tool Responses' and text != _NONE:
        return f'{begin}{text}\n{end}\n'
    return f'{begin} {text}{end}\n'


def _commands(
    text: str, names: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Commands, as they are spelt and as calls; they are read, and never run."""
    try:
        body = ast.parse(text.strip(), mode='eval').body
        nodes = list(body.elts) if isinstance(body, ast.Tuple) else [body]
        yield from [(ast.get_source_segment(text.strip(), node) or '', _call(node, names))
                    for node in nodes]  # fmt: skip
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        loose = re.fullmatch(r'(\w+)\((.*)\)', text.strip(), re.DOTALL)  # Calculate(2^3!)
        if loose is None:
            raise ValueError(f'Commands: no call: {text!r}') from None
        given = (names.get(loose[1]) or ('input',))[0]
        yield text.strip(), a_call(loose[1], {given: loose[2]})


def _call(node: ast.expr, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError('no call')
    known = names.get(node.func.id) or ('input',)
    if len(node.args) > len(known):
        raise ValueError('more arguments than names')
    given = zip(known, (ast.literal_eval(one) for one in node.args), strict=False)
    keywords = {str(key.arg): ast.literal_eval(key.value) for key in node.keywords}
    return a_call(node.func.id, {**dict(given), **keywords})


def _results(text: str, commands: Sequence[str]) -> list[str]:
    """What each command gave; all is the last one's where the text does not tell them apart."""
    text = '' if text == _NONE else text
    found: list[str] = []
    place = 0
    for number, command in enumerate(commands):
        head = f'{command} =>\n'
        start = text.find(head, place)
        if start != place:
            return [*[''] * (len(commands) - 1), text]
        start += len(head)
        following = commands[number + 1] if number + 1 < len(commands) else None
        stop = -1 if following is None else text.find(f'\n{following} =>\n', start)
        stop = len(text) if stop < 0 else stop
        found.append(text[start:stop])
        place = stop + 1
    return found


def _command(name: str, arguments: Mapping[str, Any]) -> str:
    if len(arguments) != 1:
        raise ValueError(f'call of {name!r}: this form has one argument a call')
    return f'{name}({to_json(next(iter(arguments.values())))})'


def _tool(name: str, given: Sequence[str]) -> dict[str, Any]:
    properties = {key: {'type': 'string'} for key in given}
    schema = {'type': 'object', 'properties': properties, 'required': list(given)}
    return {'type': 'function', 'function': {'name': name, 'parameters': schema}}
