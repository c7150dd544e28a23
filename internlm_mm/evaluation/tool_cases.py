"""Rows of conversations with calls -> what is asked, which functions there are, what is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from internlm_mm.agents.schemas import check_schema
from internlm_mm.datasets.conversation_formats import FORMATS, detect_format
from internlm_mm.evaluation.ast_match import OPTIONAL, Expected
from internlm_mm.evaluation.fields import as_object, need, need_text
from internlm_mm.evaluation.rows import find_files, read_rows
from internlm_mm.tokenizers.chat_messages import check_name, read_conversation
from internlm_mm.utils.suggest import did_you_mean, kind

CATEGORIES = (
    'simple',
    'simple_python',
    'multiple',
    'parallel',
    'parallel_multiple',
    'irrelevance',
    'live_simple',
    'live_multiple',
    'live_parallel',
    'live_parallel_multiple',
    'live_irrelevance',
)
"""Of the Berkeley Function Calling Leaderboard: those of one turn with functions of Python."""

ANSWERS_FOLDER = 'possible_answer'
"""Beside the leaderboard's questions: files of the same names with what is right."""

_JSON_TYPES = {'dict': 'object', 'float': 'number', 'tuple': 'array'}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCase:
    """A conversation that the model goes on with, and the calls that are right.

    Attributes:
        messages: In OpenAI's form; the last is the user's or a function's.
        tools: Functions in OpenAI's form.
        schemas: Parameters of each function, in the types of the data.
        expected: The right calls; none where the model should answer in words.
        subject: The category.
        place: `file:line` of the row.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    expected: tuple[Expected, ...]
    subject: str
    place: str = ''


@dataclass(frozen=True, slots=True)
class CaseFormat:
    """How rows are read.

    Attributes:
        read: From a row to its cases, or a ValueError with the field.
        by_file: Whether files are subjects.
    """

    read: Callable[[Any], Iterator[ToolCase]]
    by_file: bool = False


def case_format(format: str, files: Sequence[Path]) -> CaseFormat:
    """The format of a task's rows.

    Args:
        format: 'bfcl', a form of conversations with calls, or 'auto' for what each row is.
        files: Of `bfcl_files`; the leaderboard's answers are looked for beside its questions.

    Raises:
        FileNotFoundError: If there are no answers.
        ValueError: If they are malformed.
    """
    if format == 'bfcl':
        return CaseFormat(partial(_bfcl, _answers(files)))
    return CaseFormat(partial(_conversation, format))


def check_case_format(format: str) -> None:
    """Refuse a format that there is not.

    Raises:
        ValueError: With the nearest name.
    """
    known = ('bfcl', 'auto', *FORMATS)
    if format not in known:
        raise ValueError(f'format={format!r} holds no tool calls.{did_you_mean(format, known)}')


def _conversation(format: str, row: Any) -> Iterator[ToolCase]:
    """A case for each answer of the assistant that is trained on, or one with `expected`."""
    row = as_object(row)
    format = detect_format(row) if format == 'auto' else format
    if format == 'messages' and row.get('expected') is not None:
        messages, tools = FORMATS[format](row)
        schemas = _schemas(tools)
        read = read_conversation(messages, tools)
        if read.messages[-1].role not in ('user', 'tool'):
            raise ValueError(f'expected: the last message is of {read.messages[-1].role!r}')
        expected = tuple(_read_expected(row['expected']))
        yield _case(messages, tools, schemas, expected)
        return
    messages, tools = FORMATS[format](row)
    if not tools:
        return
    schemas = _schemas(tools)
    for index, message in enumerate(read_conversation(messages, tools).messages):
        if message.role == 'assistant' and message.loss:
            expected = tuple(
                Expected(call.name, accepted_of(call.arguments, schemas.get(call.name, {})))
                for call in message.calls
            )
            yield _case(messages[:index], tools, schemas, expected)


def _case(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    schemas: Mapping[str, Mapping[str, Any]],
    expected: tuple[Expected, ...],
) -> ToolCase:
    if expected:
        category = 'parallel' if len(expected) > 1 else 'simple'
        if len(tools) > 1:
            category = 'parallel_multiple' if len(expected) > 1 else 'multiple'
    else:
        category = 'irrelevance' if messages[-1]['role'] == 'user' else 'answer'
    return ToolCase(
        messages=messages, tools=tools, schemas=schemas, expected=expected, subject=category
    )


def accepted_of(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Accepted values where one call is known to be right: its own, and defaults.

    Args:
        arguments: Of the call.
        schema: JSON Schema of the function's parameters.
    """
    properties = schema.get('properties') or {}
    required = schema.get('required') or ()
    accepted = {}
    for name, value in arguments.items():
        declared = properties.get(name) or {}
        accepted[name] = [_spread(value, declared)]
        if name not in required and 'default' in declared and declared['default'] == value:
            accepted[name].append(OPTIONAL)
    for name, declared in properties.items():
        if name not in accepted and isinstance(declared, Mapping) and 'default' in declared:
            accepted[name] = [_spread(declared['default'], declared), OPTIONAL]
    return accepted


def _spread(value: Any, schema: Mapping[str, Any]) -> Any:
    """A value with a list of accepted values for each key, where objects are compared by key."""
    if isinstance(value, dict):
        return {key: [one] for key, one in value.items()}
    items = schema.get('items')
    inner = items.get('type') if isinstance(items, Mapping) else None
    if schema.get('type') == 'array' and inner in ('object', 'dict') and isinstance(value, list):
        return [_spread(one, {}) for one in value]
    return value


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    schemas = {}
    for index, tool in enumerate(tools):
        function = tool['function']
        parameters = function.get('parameters') or {}
        _check_schema(json.dumps(parameters), f'tools[{index}].function.parameters')
        schemas[function['name']] = parameters
    return schemas


@lru_cache(4096)  # files have the same functions many times over, and a check takes milliseconds
def _check_schema(parameters: str, field: str) -> None:
    check_schema(json.loads(parameters), field)


def _read_expected(value: Any) -> Iterator[Expected]:
    """`[{"name": ..., "arguments": {"city": ["Paris", "paris"], "days": [1, ""]}}]`."""
    if not isinstance(value, list):
        raise ValueError(f'expected: a list of calls, not {kind(value)}')
    for index, call in enumerate(value):
        field = f'expected[{index}]'
        if not isinstance(call, Mapping):
            raise ValueError(f'{field}: an object with name and arguments, not {kind(call)}')
        name = check_name(call.get('name'), f'{field}.name')
        yield Expected(name, _accepted(call.get('arguments', {}), f'{field}.arguments'))


def _accepted(arguments: Any, field: str) -> dict[str, list[Any]]:
    if not isinstance(arguments, Mapping):
        raise ValueError(f'{field}: an object, not {kind(arguments)}')
    for name, values in arguments.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f'{field}.{name}: a list of accepted values, not {values!r}')
    return dict(arguments)


def bfcl_files(path: str | Path, split: str | None) -> list[Path]:
    """The leaderboard's files of questions.

    Args:
        path: A file, or a folder with files such as `BFCL_v4_simple_python.json`.
        split: One of `CATEGORIES`; None for all that are there.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If there is no such category.
    """
    if split is not None and split not in CATEGORIES:
        raise ValueError(f'split={split!r} is no category.{did_you_mean(split, CATEGORIES)}')
    path = Path(path)
    if not path.is_dir():
        return list(find_files(path, None, 'path').files)
    wanted = CATEGORIES if split is None else (split,)
    found = [
        file
        for file in sorted(path.glob('*.json*'))
        if re.sub(r'^BFCL_v\d+_', '', file.name.split('.')[0]) in wanted
    ]
    if not found:
        raise FileNotFoundError(f'path: no BFCL_v4_{split or "simple_python"}.json in {path}')
    return found


def _answers(files: Sequence[Path]) -> dict[str, Any]:
    """What is right, by the id of the question; from the files beside those of the questions."""
    answers: dict[str, Any] = {}
    for file in files:
        if 'irrelevance' in file.name:
            continue
        beside = file.parent / ANSWERS_FOLDER / file.name
        if not beside.is_file():
            raise FileNotFoundError(f'path: the answers to {file} should be in {beside}')
        for row in read_rows(find_files(beside, None, 'path'), True):
            value = as_object(row.value)
            try:
                answers[str(need(value, 'id'))] = need(value, 'ground_truth')
            except ValueError as error:
                raise ValueError(f'{row.place}, {error}') from None
    return answers


def _bfcl(answers: Mapping[str, Any], row: Any) -> Iterator[ToolCase]:
    """`id`, `question` of one turn, `function`; the answer is the one of the same id."""
    row = as_object(row)
    name = need_text(row, 'id')
    category = re.sub(r'_\d.*$', '', name)
    if category not in CATEGORIES:
        hint = did_you_mean(category, CATEGORIES)
        raise ValueError(
            f'id {name!r}: {category!r} is none of the categories that are read.{hint}'
        )
    turns, functions = need(row, 'question'), need(row, 'function')
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], list):
        raise ValueError('question: a list with one turn, which is a list of messages')
    if not isinstance(functions, list):
        raise ValueError(f'function: a list, not {kind(functions)}')
    tools, schemas = [], {}
    for index, function in enumerate(functions):
        field = f'function[{index}]'
        if not isinstance(function, Mapping):
            raise ValueError(f'{field}: an object, not {kind(function)}')
        check_name(function.get('name'), f'{field}.name')
        parameters = json_schema(function.get('parameters') or {})
        _check_schema(json.dumps(parameters), f'{field}.parameters')
        tools.append({'type': 'function', 'function': {**function, 'parameters': parameters}})
        schemas[function['name']] = function.get('parameters') or {}
    messages = _merged(turns[0])
    read_conversation(messages, tools)
    expected: list[Expected] = []
    if 'irrelevance' not in category:
        if name not in answers:
            raise ValueError(f'id {name!r}: there is no answer of that id')
        for index, call in enumerate(answers[name]):
            if not isinstance(call, Mapping) or len(call) != 1:
                raise ValueError(f'ground_truth[{index}]: an object with the name of a function')
            ((called, arguments),) = call.items()
            if called not in schemas:
                raise ValueError(f'ground_truth[{index}]: no function {called!r} in the question')
            expected.append(Expected(called, dict(arguments)))
    yield ToolCase(
        messages=messages,
        tools=tools,
        schemas=schemas,
        expected=tuple(expected),
        subject=category,
    )


def _merged(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of which no two of one speaker follow each other."""
    merged: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get('content'), str):
            raise ValueError(f'question[0][{index}]: an object with role and content')
        if merged and merged[-1]['role'] == message.get('role'):
            merged[-1]['content'] += f'\n{message["content"]}'
        else:
            merged.append({'role': message.get('role'), 'content': message['content']})
    return merged


def json_schema(schema: Any) -> Any:
    """A schema of the leaderboard in the types of JSON Schema; 'any' is no type at all."""
    if not isinstance(schema, Mapping):
        return schema
    said = {key: value for key, value in schema.items() if key != 'optional'}
    if said.get('type') == 'any':
        del said['type']
    elif isinstance(said.get('type'), str):
        said['type'] = _JSON_TYPES.get(said['type'], said['type'])
    if isinstance(said.get('properties'), Mapping):
        said['properties'] = {key: json_schema(one) for key, one in said['properties'].items()}
    for key in ('items', 'additionalProperties'):
        if isinstance(said.get(key), Mapping):
            said[key] = json_schema(said[key])
    return said
