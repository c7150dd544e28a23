"""What a model wrote, read back: an answer's text, its calls, and what is wrong with them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_grammar import Frame, Marks, frames, loosely
from internlm_mm.tokenizers.chat_messages import CODE_TOOL, Call, check_name
from internlm_mm.tokenizers.chat_spelling import ToolFormat

Problem = Literal['format', 'json', 'name', 'arguments', 'truncated', 'trailing', 'parallel']
_ARGUMENTS = ('arguments', 'parameters')  # models that know both forms mix them up


@dataclass(frozen=True, slots=True)
class CallError:
    """A call that cannot be read.

    Attributes:
        kind: 'format' is no call where one should be; 'json' is broken JSON; 'name' and
            'arguments' are missing or of the wrong type; 'truncated' ends too early; 'trailing' is
            text after a call; 'parallel' are more calls than the template spells in a turn.
        message: What is wrong, and where.
        text: What could not be read.
        form: How a call is spelt.
    """

    kind: Problem
    message: str
    text: str
    form: str

    def to_model(self) -> str:
        """What a model is told, so that it can try once more."""
        return f'The call could not be read: {self.message}. The form of a call is:\n{self.form}'


class Answer(NamedTuple):
    """An assistant's message, as a model wrote it.

    Attributes:
        content: Its text: all of it, or what stands before the calls.
        calls: Those that could be read, in order.
        thought: What the template keeps apart from the content: `reasoning_content`.
        errors: Calls that could not be read.
    """

    content: str
    calls: tuple[Call, ...] = ()
    thought: str = ''
    errors: tuple[CallError, ...] = ()

    def message(self, first: int = 0) -> dict[str, Any]:
        """The message in OpenAI's form; calls that could not be read are not in it.

        Args:
            first: Number of the first call in its conversation; ids are 'call_NUMBER'.
        """
        message: dict[str, Any] = {'role': 'assistant', 'content': self.content}
        if self.thought:
            message['reasoning_content'] = self.thought
        if self.calls:
            message['tool_calls'] = [
                {
                    'id': f'call_{number}',
                    'type': 'function',
                    'function': {'name': call.name, 'arguments': call.arguments},
                }
                for number, call in enumerate(self.calls, first)
            ]
        return message


def read_answer(template: ChatTemplate, text: str, *, uses_tools: bool = True) -> Answer:
    """Read what a model wrote after the prompt of an answer.

    What is near enough to the template's form is read, too: other blanks, 'Action Input' for
    'ActionInput', 'arguments' for 'parameters', code without its fence, a call without what ends
    it, which servers take for the end of the answer.

    Args:
        template: That the prompt was spelt with.
        text: As `Chat.stream` gives it; marks in it count as marks, and one at its end that ends
            answers does no harm.
        uses_tools: Whether functions are declared or called in the conversation; without them
            everything is content.
    """
    reader = _Reader(template)
    return reader.read(reader.marks.hide(text), uses_tools)


def read_answer_ids(
    template: ChatTemplate, tokenizer: Tokenizer, ids: Sequence[int], *, uses_tools: bool = True
) -> Answer:
    """Read tokens that a model wrote, up to the first that ends an answer.

    Here a mark is a token: text that only spells one is text, in the content and in arguments.
    """
    reader = _Reader(template)
    spelt = (*template.marks, *template.words)
    found = {template.token_id(tokenizer, mark): mark for mark in spelt}
    marks = {index: mark for index, mark in found.items() if index is not None}
    ends = {*template.stops(tokenizer)[0], tokenizer.eos_id}
    text = ''
    plain: list[int] = []
    for index in ids:
        if index in ends:
            break
        if index not in marks:
            plain.append(index)
            continue
        text += reader.marks.hide(tokenizer.decode(plain), marks.values())
        text += reader.marks.hide(marks[index])
        plain = []
    text += reader.marks.hide(tokenizer.decode(plain), marks.values())
    return reader.read(text, uses_tools)


class _Wrong(Exception):
    """A call is none; what follows it begins at `stop`."""

    def __init__(self, kind: Problem, message: str, stop: int) -> None:
        super().__init__(message)
        self.kind: Problem = kind
        self.stop = stop


class _Reader:
    """Reads answers of one template; texts have their marks hidden."""

    def __init__(self, template: ChatTemplate) -> None:
        self.marks = Marks(template)
        self._tools = template.tools
        self._stops = tuple(self.marks.hide(mark) for mark in template.stop)
        self._frames: list[Frame] = []
        self._form = ''
        if template.tools is not None:
            self._frames = list(frames(template.tools, self.marks))
            form = template.tools.call.replace('{name}', 'NAME')
            self._form = form.replace('{arguments}', '{"ARGUMENT": VALUE}')

    def read(self, text: str, uses_tools: bool) -> Answer:
        for stop in self._stops:
            text = text.removesuffix(stop)
        form = self._tools
        if form is None or not uses_tools:
            return Answer(self.marks.show(text))
        if form.answer:
            return self._read_steps(form, text)
        start = self._next_call(text, 0)
        if start is None:
            return Answer(self.marks.show(text))
        content = text[:start].removesuffix(form.before_call)
        calls, errors = self._read_calls(form, text, start)
        return Answer(self.marks.show(content), calls, '', errors)

    def _read_steps(self, form: ToolFormat, text: str) -> Answer:
        """Answers in the manner of ReAct: thoughts, and behind them a call or the answer."""
        start = self._next_call(text, 0)
        final = re.search(rf'(?:^|\n){loosely(form.answer)}', text)
        if final is not None and (start is None or final.start() < start):
            content = text[final.end() :]
            if not final.group().endswith(form.answer):
                content = content.removeprefix(' ')  # 'Final Answer: 42'
            before = text[: final.start()] + ('\n' if final.group().startswith('\n') else '')
            thoughts = self._thoughts(form, before)
            return Answer(self.marks.show(content), (), '\n'.join(thoughts))
        if start is not None:
            thoughts = self._thoughts(form, text[:start])
            calls, errors = self._read_calls(form, text, start)
            return Answer(thoughts[-1] if thoughts else '', calls, '\n'.join(thoughts[:-1]), errors)
        begins = form.thought is not None and text.startswith(form.thought[0])
        if not begins and not re.search(r'(?:^|\n)Action', text):
            return Answer(self.marks.show(text))
        what = f'there is neither a whole call nor {form.answer!r}'
        error = CallError('format', what, self.marks.show(text), self._form)
        return Answer(self.marks.show(text), (), '', (error,))

    def _thoughts(self, form: ToolFormat, text: str) -> list[str]:
        """What the thoughts say that stand before a call or an answer."""
        if not text:
            return []
        begin, end = form.thought or ('', '')
        text = text.removesuffix(end)
        if not begin or not text.startswith(begin):
            return [self.marks.show(text)]
        return [self.marks.show(part) for part in text.removeprefix(begin).split(end + begin)]

    def _next_call(self, text: str, start: int) -> int | None:
        found = (frame.head.search(text, start) for frame in self._frames)
        return min((match.start() for match in found if match), default=None)

    def _read_calls(
        self, form: ToolFormat, text: str, place: int
    ) -> tuple[tuple[Call, ...], tuple[CallError, ...]]:
        calls: list[Call] = []
        errors: list[CallError] = []
        while place < len(text):
            start = place
            try:
                call, place = self._read_call(text, start)
                if calls and not form.parallel:
                    raise _Wrong('parallel', 'only one call may be made in a turn', place)
                calls.append(call)
            except _Wrong as error:
                place = error.stop
                shown = self.marks.show(text[start:place])
                errors.append(CallError(error.kind, str(error), shown, self._form))
        return tuple(calls), tuple(errors)

    def _read_call(self, text: str, start: int) -> tuple[Call, int]:
        """A call that begins at `start`, and where what follows it begins."""
        for frame in self._frames:
            match = frame.head.match(text, start)
            if match is not None:
                break
        else:
            following = self._next_call(text, start)
            stop = len(text) if following is None else following
            raise _Wrong('trailing', 'text stands after a call, where nothing may follow', stop)
        start = match.end()
        if frame.fence is not None:
            stop, end = self._end(frame, text, start)
            return self._read_code(frame.fence, text[start:stop], end), end
        start = _skip(text, start)
        try:
            _, stop = _DECODER.raw_decode(text, start)
            given = json.loads(self.marks.show(text[start:stop]))
        except (ValueError, RecursionError) as error:
            self._refuse_json(error, text, start, frame)
        _, end = self._end(frame, text, stop, at_once=True)
        if not isinstance(given, dict):
            raise _Wrong('arguments', f'an object is expected, not {_short(given)}', end)
        if frame.keys is None:
            return self._checked(match.group('name').strip(), given, end), end
        name = given.get(frame.keys[0])
        arguments = next((given[key] for key in (frame.keys[1], *_ARGUMENTS) if key in given), None)
        if isinstance(arguments, str):
            arguments = _object(arguments) or arguments
        if not isinstance(arguments, dict):
            was = f'not {_short(arguments)}' if arguments is not None else 'but is missing'
            raise _Wrong('arguments', f'{frame.keys[1]!r} must be an object, {was}', end)
        return self._checked(name, arguments, end), end

    def _refuse_json(self, error: Exception, text: str, start: int, frame: Frame) -> NoReturn:
        """Say why there is no JSON at `start`."""
        stop, end = self._end(frame, text, start)
        inside = self.marks.show(text[start:stop])
        if stop == len(text) and _unfinished(inside):
            raise _Wrong('truncated', 'it ends before its JSON does', end)
        reason = str(error)
        if isinstance(error, RecursionError):
            reason = 'lists or objects are nested too deep'
        elif isinstance(error, json.JSONDecodeError):
            place, what = max(error.pos - start, 0), error.msg.removesuffix(' at')
            reason = f'{what} at character {place} of {_short(inside)}'
        raise _Wrong('json', f'it is no JSON: {reason}', end)

    def _checked(self, name: Any, arguments: Mapping[str, Any], end: int) -> Call:
        assert self._tools is not None
        name = CODE_TOOL if name == self._tools.code_name else name
        try:
            check_name(name, 'its name')
        except ValueError as error:
            raise _Wrong('name', str(error), end) from None
        if name == CODE_TOOL and not isinstance(arguments.get('code'), str):
            raise _Wrong('arguments', f"{self._tools.code_name!r} takes a text 'code'", end)
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON may spell half a character
            raise _Wrong('arguments', 'a text has a lone surrogate', end) from None
        return Call(name, dict(arguments))

    def _read_code(self, fence: tuple[str, str], inside: str, end: int) -> Call:
        opening, closing = fence
        whole = inside.startswith(opening) and inside.endswith(closing)
        if whole and len(inside) >= len(opening) + len(closing):
            code = inside[len(opening) : len(inside) - len(closing)]
            return Call(CODE_TOOL, {'code': self.marks.show(code)})
        arguments = _object(self.marks.show(inside))
        if arguments is not None:
            return self._checked(CODE_TOOL, arguments, end)
        if '```' not in inside:
            return self._checked(CODE_TOOL, {'code': self.marks.show(inside).strip()}, end)
        first, _, rest = inside.strip().partition('\n')
        if not re.fullmatch(r'```[ \t]*\w*[ \t]*', first) or not rest.endswith('```'):
            raise _Wrong('truncated', 'its code is not closed with ```, or has text around it', end)
        code = rest.removesuffix('```').rstrip(' \t').removesuffix('\n')
        return Call(CODE_TOOL, {'code': self.marks.show(code)})

    def _end(
        self, frame: Frame, text: str, start: int, *, at_once: bool = False
    ) -> tuple[int, int]:
        """Where a call's inside ends, and where what follows the call begins.

        Args:
            frame: Of the call.
            text: All of it.
            start: Somewhere inside, or where the inside ends.
            at_once: Whether it ends here.
        """
        stop = _skip(text, start) if at_once else text.find(frame.tail, start)
        if stop < 0 or not frame.tail:
            stop = stop if at_once else len(text)
            return stop, stop
        found = text.startswith(frame.tail, stop)
        return stop, _skip(text, stop + len(frame.tail)) if found else stop


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f'{text[:200]}...'


def _unfinished(text: str) -> bool:
    """Whether something is open at the end of what should be JSON."""
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '', text, flags=re.DOTALL)
    opened = sum(map(outside.count, '{[')) - sum(map(outside.count, '}]'))
    return '"' in outside or opened > 0 or not text.strip()


def _object(text: str) -> dict[str, Any] | None:
    """The object that JSON text holds; None if it holds none."""
    try:
        given = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is none of JSON')


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f'{digits} is too large a number')
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
