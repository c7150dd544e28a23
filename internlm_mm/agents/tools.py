"""Python functions that a model may call, and what becomes of each call."""

from __future__ import annotations

import base64
import copy
import json
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from internlm_mm.agents.schemas import argument_errors, check_schema, schema_of
from internlm_mm.tokenizers.chat_messages import CODE_TOOL, check_name
from internlm_mm.utils.suggest import did_you_mean

_PNG = b'\x89PNG'
_MOST_IMAGES, _MOST_IMAGE_BYTES = 8, 4 << 20  # as the sandbox shows them

Status = Literal['ok', 'unknown', 'arguments', 'error', 'timeout']


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: Letters, digits and . _ -
        description: Tells the model what it does.
        parameters: JSON Schema of its arguments.
        function: Takes them by name.
        seconds: How long a call may take; None for functions that keep to a limit of their own.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    seconds: float | None = 60.0

    def __post_init__(self) -> None:
        check_name(self.name, 'name of a tool')
        check_schema(self.parameters, f'tool {self.name!r}: parameters')
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f'tool {self.name!r}: seconds={self.seconds}: more than 0, or None')

    def declaration(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        function = {
            'name': self.name,
            'description': self.description,
            'parameters': dict(self.parameters),
        }
        return {'type': 'function', 'function': function}


def tool(function: Callable[..., Any], *, seconds: float | None = 60.0) -> Tool:
    """A tool of a Python function, by its signature and docstring.

    Raises:
        ValueError: As `schema_of`.
    """
    schema = schema_of(function)
    return Tool(schema['name'], schema['description'], schema['parameters'], function, seconds)


class Reply(Protocol):
    """What an interpreter gives: `internlm_mm.sandbox.Reply`, or anything like it."""

    @property
    def text(self) -> str:
        """What the model is shown."""

    @property
    def images(self) -> Sequence[bytes]:
        """PNG files."""

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end."""


def interpreter(run: Callable[[str], Reply]) -> Tool:
    """The tool `python`, which templates spell in a way of its own.

    Args:
        run: Runs code and keeps to limits of time and output: `Session.run` of the sandbox.
    """
    description = (
        'Runs Python in a session that keeps its variables, and gives what was printed and the '
        'value of the last expression.'
    )
    code = {'type': 'string', 'description': 'The program.'}
    parameters = {'type': 'object', 'properties': {'code': code}, 'required': ['code']}

    def run_code(code: str) -> Reply:
        return run(code)

    return Tool(CODE_TOOL, description, parameters, run_code, seconds=None)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call.

    Attributes:
        status: 'ok'; 'unknown' is no such tool; 'arguments' do not fit its schema; 'error' was
            raised, by the function or by the code that it ran; 'timeout'.
        text: What the model is shown, errors too.
        images: PNG files.
    """

    status: Status
    text: str
    images: tuple[bytes, ...] = ()

    def content(self) -> str | list[dict[str, Any]]:
        """Content of a tool's message in OpenAI's form."""
        if not self.images:
            return self.text
        parts: list[dict[str, Any]] = [{'type': 'text', 'text': self.text}] if self.text else []
        for image in self.images:
            url = f'data:image/png;base64,{base64.b64encode(image).decode()}'
            parts.append({'type': 'image_url', 'image_url': {'url': url}})
        return parts


class Toolbox:
    """Tools by name; calling one never raises.

    Args:
        tools: Tools, and functions that are made tools.
        max_chars: Longer results lose their middle.

    Raises:
        ValueError: If two have one name, or a function cannot be a tool.
    """

    def __init__(
        self, tools: Iterable[Tool | Callable[..., Any]] = (), *, max_chars: int = 20_000
    ) -> None:
        if max_chars < 100:
            raise ValueError(f'max_chars={max_chars}: at least 100')
        self.max_chars = max_chars
        self.tools: dict[str, Tool] = {}
        for given in tools:
            one = given if isinstance(given, Tool) else tool(given)
            if one.name in self.tools:
                raise ValueError(f'two tools are called {one.name!r}')
            self.tools[one.name] = one

    def declarations(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form."""
        return [one.declaration() for one in self.tools.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Run a tool; what goes wrong is in the result, as a text that a model can act on.

        A function that takes too long is left to itself in its thread: it cannot be ended from
        outside. What may hang for good belongs into a process, as the sandbox's is.
        """
        one = self.tools.get(name)
        if one is None:
            known = ', '.join(map(repr, self.tools)) or 'there are none'
            hint = did_you_mean(name, self.tools)
            return Result('unknown', f'There is no tool {name!r}.{hint} Tools: {known}.')
        wrong = argument_errors(arguments, one.parameters)
        if wrong:
            return Result('arguments', f'Wrong arguments of {name!r}: {"; ".join(wrong)}.')
        try:
            # What a function does to its arguments does not change what was said.
            return self._result(_within(one, copy.deepcopy(dict(arguments))))
        except _TooLong as error:
            return Result('timeout', str(error))
        except (Exception, SystemExit) as error:
            return Result('error', self._cut(f'{name!r} raised an error:\n{_told(error)}'))

    def _result(self, value: Any) -> Result:
        images = getattr(value, 'images', None)
        if isinstance(images, (tuple, list)) and isinstance(getattr(value, 'text', None), str):
            late = getattr(value, 'timed_out', False)
            status: Status = 'ok' if getattr(value, 'ok', True) else 'timeout' if late else 'error'
            shown, left_out = _shown_images(images)
            return Result(
                status, '\n'.join(filter(None, [self._cut(value.text), *left_out])), shown
            )
        return Result('ok', self._cut(_spell(value)))

    def _cut(self, text: str) -> str:
        text = text.encode('utf-8', 'replace').decode()  # half a character cannot be spelt
        if len(text) <= self.max_chars:
            return text
        part = self.max_chars // 2
        left_out = len(text) - 2 * part
        return f'{text[:part]}\n[... {left_out:,} characters left out ...]\n{text[-part:]}'


def _shown_images(images: Sequence[Any]) -> tuple[tuple[bytes, ...], list[str]]:
    """Those that a message can hold, and what is told of the others."""
    shown: list[bytes] = []
    told = []
    for image in images:
        if not isinstance(image, bytes) or not image.startswith(_PNG):
            told.append('[an image is left out: it is no PNG file]')
        elif len(image) > _MOST_IMAGE_BYTES:
            told.append(f'[an image of {len(image):,} bytes is left out: it is too large]')
        elif len(shown) < _MOST_IMAGES:
            shown.append(image)
    more = len(images) - len(shown) - len(told)
    if more:
        told.append(f'[{more} more images are left out]')
    return tuple(shown), told[: _MOST_IMAGES + 1]


class _TooLong(Exception):
    """A call took longer than it may; a `TimeoutError` may be a function's own."""


def _within(one: Tool, arguments: Mapping[str, Any]) -> Any:
    """What a function gives, if it gives it in time."""
    if one.seconds is None:
        return one.function(**arguments)
    given: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            given.put((True, one.function(**arguments)))
        except BaseException as error:  # SystemExit would end the thread without a word
            given.put((False, error))

    threading.Thread(target=run, name=f'tool {one.name}', daemon=True).start()
    try:
        done, value = given.get(timeout=one.seconds)
    except queue.Empty:
        raise _TooLong(f'{one.name!r} took longer than {one.seconds:g} seconds.') from None
    if done:
        return value
    raise value if isinstance(value, Exception) else RuntimeError(repr(value))


def _told(error: BaseException) -> str:
    """The last lines of a traceback, without paths of this machine."""
    return ''.join(traceback.format_exception_only(error)).strip()


def _spell(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ''
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
