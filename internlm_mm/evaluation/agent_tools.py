"""The tools of an agent that is scored: found by name, and at hand for one question."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from internlm_mm.agents import Result, Tool, Toolbox, interpreter, tool
from internlm_mm.evaluation.programs import Programs
from internlm_mm.sandbox import Reply, SandboxError, Session
from internlm_mm.utils.suggest import nearest

_CLASSES = {
    'unknown': 'unknown_tool',
    'arguments': 'schema',
    'error': 'raised',
    'timeout': 'timeout',
}
"""Class of error by the status of a call's result."""


def _nowhere(code: str) -> NoReturn:
    raise RuntimeError(f'no session runs {code!r}')


PYTHON = interpreter(_nowhere)
"""The tool `python` as it is declared; a desk has one of its own in its place."""


def find_tool(given: str | Tool | Callable[..., Any]) -> Tool:
    """A tool, or the one that a function or a name such as 'my_module.weather' gives.

    Raises:
        ValueError: If there is none of that name, or it cannot be a tool.
    """
    if isinstance(given, str):
        module, _, name = given.rpartition('.')
        try:
            holder = importlib.import_module(module)
        except Exception as error:  # of the file, which is somebody's
            said = f'{type(error).__name__}: {error}'
            raise ValueError(f'tools: {given!r} is not found: {said}') from error
        if not hasattr(holder, name):
            hint = nearest(name, [key for key, value in vars(holder).items() if callable(value)])
            said = f'module {module!r} has no attribute {name!r}.{hint}'
            raise ValueError(f'tools: {given!r} is not found: {said}')
        found = getattr(holder, name)
    else:
        found = given
    if isinstance(found, Tool):
        return found
    if not callable(found):
        raise ValueError(f'tools: {given!r} is no function')
    return tool(found)


class Desk:
    """What one question is worked on with: tools, an interpreter that remembers, and time.

    Args:
        tools: Those that are offered; `PYTHON` may be one.
        programs: Where code runs.
        seconds: Time of all calls together.

    Attributes:
        left: What is left of it.
    """

    def __init__(self, tools: Sequence[Tool], programs: Programs | None, seconds: float) -> None:
        self.left = seconds
        self._programs = programs
        self._session: Session | None = None
        self._failed = False
        self._box = Toolbox(interpreter(self._run) if one is PYTHON else one for one in tools)

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[Result, str]:
        """Run a tool.

        Returns:
            What came of it, and the class of what went wrong: 'unknown_tool', 'schema', 'raised',
            'timeout', 'sandbox' (no interpreter could be started), or '' for nothing.
        """
        if self.left <= 0:
            return Result('timeout', 'No time is left for calls.'), 'timeout'
        began, self._failed = time.monotonic(), False
        result = self._box.call(name, arguments)
        self.left -= time.monotonic() - began
        return result, 'sandbox' if self._failed else _CLASSES.get(result.status, '')

    def close(self) -> None:
        """End the interpreter."""
        if self._session is not None:
            self._session.close()

    def _run(self, code: str) -> Reply:
        assert self._programs is not None
        try:
            if self._session is None:
                self._session = self._programs.session()
            return self._session.run(code, min(self.left, self._programs.limits.seconds))
        except SandboxError:
            self._failed = True
            raise
