"""What plugins import of Lagent, for where it is not installed."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

NEEDS_TYPES = 'Lagent wants the types of arguments in the docstring as well: {name} (str): ...'


def tool_api(
    func: Callable[..., Any] | None = None,
    *,
    include_arguments: Iterable[str] | None = None,
    exclude_arguments: Iterable[str] | None = None,
    **parsing: Any,
) -> Any:
    """Mark a function, or a method of a `BaseAction`, as a tool.

    Args:
        func: It; None where the decorator is given options.
        include_arguments: Those that the model is told of; all if None.
        exclude_arguments: Those that it is not told of.
        parsing: How Lagent reads docstrings; here they are of Google's form.

    Raises:
        ValueError: If the docstring describes an argument without its type, where Lagent would
            fail.
    """
    if func is None:
        chosen = dict(include_arguments=include_arguments, exclude_arguments=exclude_arguments)
        return lambda function: tool_api(function, **chosen, **parsing)
    section = (inspect.getdoc(func) or '').partition('\nArgs:\n')[2].partition('\n\n')[0]
    untyped = re.search(r'^ {4}(\w+):', section, re.MULTILINE)
    if untyped is not None:
        raise ValueError(f'{func.__name__}: {NEEDS_TYPES.format(name=untyped[1])}')
    names = [name for name in inspect.signature(func).parameters if name != 'self']
    if include_arguments is not None:
        names = [name for name in names if name in _names(include_arguments)]
    names = [name for name in names if name not in _names(exclude_arguments or ())]
    parameters = [{'name': name} for name in names]
    func.api_description = {  # type: ignore[attr-defined]
        'name': func.__name__,
        'parameters': parameters,
    }
    return func


def _names(given: Iterable[str]) -> set[str]:
    return {given} if isinstance(given, str) else set(given)


class BaseAction:
    """A tool, by its method `run`, or several, by methods with `@tool_api`."""

    def __init__(self, description: dict[str, Any] | None = None, parser: Any = None) -> None:
        self.description = description or {'name': type(self).__name__}
        self.parser = parser

    @property
    def name(self) -> str:
        """What the model calls it."""
        return self.description['name']


class ActionStatusCode(IntEnum):
    """How an action ended."""

    ING = 1
    SUCCESS = 0
    HTTP_ERROR = -1000
    ARGS_ERROR = -1001
    API_ERROR = -1002


@dataclass
class ActionReturn:
    """What an action gives that says how it ended."""

    args: dict[str, Any] | None = None
    url: str | None = None
    type: str | None = None
    result: list[dict[str, Any]] | None = None
    errmsg: str | None = None
    state: int = ActionStatusCode.SUCCESS
    thought: str | None = None


@contextmanager
def importable() -> Iterator[type]:
    """Lagent's names can be imported inside; gives its `BaseAction`, or the one of here."""
    if importlib.util.find_spec('lagent') is not None:
        from lagent.actions import BaseAction as Theirs

        yield Theirs
        return
    here: dict[str, dict[str, Any]] = {
        'lagent': {},
        'lagent.actions': {'BaseAction': BaseAction, 'tool_api': tool_api},
        'lagent.actions.base_action': {'BaseAction': BaseAction, 'tool_api': tool_api},
        'lagent.schema': {'ActionReturn': ActionReturn, 'ActionStatusCode': ActionStatusCode},
    }
    for name, content in here.items():
        module = ModuleType(name, 'Stands for a part of Lagent.')
        module.__path__ = []
        vars(module).update(content)
        sys.modules[name] = module
    try:
        yield BaseAction
    finally:
        for name in here:
            del sys.modules[name]
