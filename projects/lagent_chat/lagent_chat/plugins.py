"""Tools from a Python file that is written for Lagent: `@tool_api` on functions and methods."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from internlm_mm.agents import Tool, schema_of
from internlm_mm.sandbox.png import check_png
from internlm_mm.utils.suggest import nearest_path
from lagent_chat.stand_in import NEEDS_TYPES, importable

MAX_BYTES, MAX_PIXELS = 4_000_000, 10_000_000
"""Largest image that a plugin may give."""


class PluginError(ValueError):
    """A file of plugins cannot be used, and why."""


def load_plugins(file: str | Path, seconds: float = 60.0) -> list[Tool]:
    """The tools of a file.

    Functions with `@tool_api` are tools; so are classes of Lagent's `BaseAction`, made without
    arguments, and objects of them: by their method `run`, under the name of the class, or by each
    method with `@tool_api`, as `Class.method`.

    Args:
        file: Python, which is run; where Lagent is not installed, it may import `lagent.actions`
            and `lagent.schema` all the same.
        seconds: How long a call may take.

    Raises:
        FileNotFoundError: If there is no such file.
        PluginError: If it raises, has no tool, or one that cannot be one.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f'--plugins {file}: there is no such file{nearest_path(file)}')
    with importable() as action:
        module = _run(path)
        tools = []
        for name, value in list(vars(module).items()):
            if name.startswith('_') or getattr(value, '__module__', None) != module.__name__:
                continue
            try:
                tools += list(_tools_of(value, action, seconds))
            except Exception as error:
                raise PluginError(f'{path}: {name}: {_said(error)}') from error
    if not tools:
        raise PluginError(f'{path}: no function has @tool_api, and no class is a BaseAction')
    return tools


def _run(path: Path) -> ModuleType:
    """Import a file without leaving compiled code beside it."""
    name = f'lagent_chat_plugins_{path.stem}'
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[name] = module  # dataclasses look for it
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__)
                 if at.filename == str(path)]  # fmt: skip
        if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
            lines.append(error.lineno)
        line = f':{lines[-1]}' if lines else ''
        said = _said(error)
        if said.endswith("'NoneType' object has no attribute 'lower'"):  # of Lagent's tool_api
            said = NEEDS_TYPES.format(name='NAME')
        raise PluginError(f'{path}{line}: {said}') from error
    finally:
        sys.dont_write_bytecode = wrote
    return module


def _tools_of(value: Any, action: type, seconds: float) -> Iterator[Tool]:
    if isinstance(value, type):
        if issubclass(value, action):
            yield from _actions(value(), seconds)
    elif isinstance(value, action):
        yield from _actions(value, seconds)
    elif callable(value) and hasattr(value, 'api_description'):
        plain = getattr(value, '__wrapped__', value)  # Lagent's own wants a `self` before the rest
        yield _tool(plain.__name__, plain, value, seconds)


def _actions(action: Any, seconds: float) -> Iterator[Tool]:
    """The tools of an object of Lagent's `BaseAction`."""
    kind = type(action)
    marked = [name for name in dir(kind) if hasattr(getattr(kind, name), 'api_description')]
    if not marked or 'run' in marked:
        run = getattr(action, 'run', None)
        if run is None:
            raise ValueError('has neither a method `run` nor one with @tool_api')
        yield _tool(action.name, run, run, seconds, inspect.getdoc(kind) or '')
        return
    for name in sorted(marked, key=lambda name: _line(getattr(kind, name))):
        method = getattr(action, name)
        yield _tool(f'{action.name}.{name}', method, method, seconds)


def _line(function: Any) -> int:
    return inspect.unwrap(function).__code__.co_firstlineno


def _tool(
    name: str, function: Callable[..., Any], marked: Any, seconds: float, about: str = ''
) -> Tool:
    schema = schema_of(function)
    parameters = schema['parameters']
    properties = parameters['properties']
    for argument, hint in typing.get_type_hints(function, include_extras=True).items():
        said = [note for note in getattr(hint, '__metadata__', ()) if isinstance(note, str)]
        if said and argument in properties:
            properties[argument].setdefault('description', said[0])
    told = getattr(marked, 'api_description', None)
    if told is not None:
        names = {one['name'] for one in told['parameters']}
        hidden = [one for one in parameters['required'] if one not in names]
        if hidden:
            raise ValueError(f'{hidden[0]!r} has no default, and the model is not told of it')
        parameters['properties'] = {key: properties[key] for key in properties if key in names}
    description = schema['description'] or ' '.join(about.split('\n\n')[0].split())

    def call(**arguments: Any) -> Any:
        value = function(**arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        return _given(value)

    return Tool(name, description, parameters, call, seconds)


@dataclass(frozen=True, slots=True)
class Given:
    """What a plugin gave, in the form that an interpreter gives it in.

    Attributes:
        text: For the model.
        images: PNG files.
        ok: Whether it went well.
    """

    text: str
    images: tuple[bytes, ...] = ()
    ok: bool = True


def _given(value: Any) -> Any:
    """Take Lagent's `ActionReturn` apart; anything else is left alone."""
    if not all(hasattr(value, name) for name in ('state', 'result', 'errmsg')):
        return value
    if value.state != 0:
        return Given(str(value.errmsg or 'it failed and did not say why'), ok=False)
    texts, images = [], []
    for item in value.result or ():
        if not isinstance(item, Mapping) or 'content' not in item:
            texts.append(str(item))
        elif item.get('type') == 'text':
            texts.append(str(item['content']))
        elif item.get('type') == 'image' and Path(str(item['content'])).suffix.lower() == '.png':
            data = Path(item['content']).read_bytes()
            check_png(data, MAX_BYTES, MAX_PIXELS)
            images.append(data)
        else:
            texts.append(f'[{item.get("type")}]({item["content"]})')
    return Given('\n'.join(texts), tuple(images))


def _said(error: BaseException) -> str:
    return ' '.join(traceback.format_exception_only(error)[-1].split())
