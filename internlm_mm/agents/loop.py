"""A model and its tools, turn by turn, until there is an answer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from internlm_mm.agents.tools import Result, Toolbox
from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_messages import Call, read_conversation
from internlm_mm.tokenizers.chat_parsing import Answer, CallError
from internlm_mm.tokenizers.chat_stream import AnswerStream

Message = dict[str, Any]
Model = Callable[[Sequence[Message], Sequence[dict[str, Any]]], str | Iterable[str]]
"""Goes on from messages, with functions in OpenAI's form, and gives a text or its pieces."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        kind: 'text', 'thought' and 'spelling' are pieces of what the model writes, the last one of
            a call as it spells it; 'call' is one that is made; 'result' is what came of it;
            'malformed' is one that cannot be read; 'answer' ends the work; 'turn_limit' and
            'gave_up' end it without an answer.
        text: A piece, the answer, a result's text, or what is wrong.
        call: Of a call and its result.
        result: Of a result.
    """

    kind: Literal['text', 'thought', 'spelling', 'call', 'result', 'malformed', 'answer',
                  'turn_limit', 'gave_up']  # fmt: skip
    text: str = ''
    call: Call | None = None
    result: Result | None = None


@dataclass
class Trace:
    """What was said and done; a record to train on.

    Attributes:
        messages: All of them, those that the work began with first.
        tools: Functions in OpenAI's form.
        status: 'answer', 'turn_limit' or 'gave_up'; '' while it goes on.
        answer: The last text.
        turns: How often the model was asked.
        results: What came of each call.
        errors: Calls that could not be read.
        repairs: Answers in a row, the last one included, with a call that could not be read.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    status: str = ''
    answer: str = ''
    turns: int = 0
    results: list[Result] = field(default_factory=list)
    errors: list[CallError] = field(default_factory=list)
    repairs: int = 0

    def waiting(self) -> list[Call]:
        """Calls of the last answer that have no result yet, in order."""
        message, given = self._asking()
        return [
            Call(call['function']['name'], call['function']['arguments'], call['id'])
            for call in message.get('tool_calls', [])[given:]
        ]

    def take(self, result: Result) -> None:
        """Add the result of the first call that waits for one."""
        message, given = self._asking()
        call = message['tool_calls'][given]
        self.results.append(result)
        if result.status in ('unknown', 'arguments'):
            message['loss'] = False
        self.messages.append(
            {
                'role': 'tool',
                'tool_call_id': call['id'],
                'name': call['function']['name'],
                'content': result.content(),
            }
        )

    def _asking(self) -> tuple[Message, int]:
        """The message that results follow, and how many there are."""
        given = 0
        while self.messages[-1 - given]['role'] == 'tool':
            given += 1
        return self.messages[-1 - given], given

    def record(self) -> dict[str, Any]:
        """The trace in the form `messages`, which trains as it is.

        Turns whose call was malformed, of no tool or with wrong arguments are context only.
        """
        return {'messages': self.messages, **({'tools': self.tools} if self.tools else {})}


@dataclass(frozen=True)
class Agent:
    """Lets a model call tools until it answers.

    What goes wrong is told to the model, which may mend it: a call that cannot be read by a user's
    message, everything else by the tool's. None of it ends the work.

    Args:
        model: Writes answers, spelt by the template: `lambda messages, tools:
            chat.stream(messages, sampling, tools)` of a `Chat`.
        template: The model's.
        toolbox: What it may call.
        max_turns: How often the model is asked.
        max_repairs: How often in a row it may write a call that cannot be read.

    Raises:
        ValueError: If a limit is none, or the template spells no functions.
    """

    model: Model
    template: ChatTemplate
    toolbox: Toolbox = field(default_factory=Toolbox)
    max_turns: int = 10
    max_repairs: int = 2

    def __post_init__(self) -> None:
        for name, least in (('max_turns', 1), ('max_repairs', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: at least {least}')
        if self.toolbox.tools and self.template.tools is None:
            raise ValueError(f'{self.template.name!r} spells no functions; another template does')

    def run(self, messages: Sequence[Mapping[str, Any]]) -> Trace:
        """Work on the last message; as `events`, without looking on."""
        trace = self.begin(messages)
        for _ in self.events(trace):
            pass
        return trace

    def begin(self, messages: Sequence[Mapping[str, Any]]) -> Trace:
        """A trace that begins with these messages; the last is the user's or a tool's.

        Raises:
            ValueError: If they are no conversation, or there is nothing to answer.
        """
        read = read_conversation(messages)
        if read.messages[-1].role not in ('user', 'tool'):
            raise ValueError(
                f'the last message is of {read.messages[-1].role!r}: nothing to answer'
            )
        return Trace([dict(message) for message in messages], self.toolbox.declarations())

    def events(self, trace: Trace) -> Iterator[Event]:
        """Work on a trace until it has an answer, or a limit is reached.

        Args:
            trace: Of `begin`; it grows. Closing the iterator leaves it as it is: a question, or
                results, may be last.

        Returns:
            Iterator over what happens. The last event is 'answer', 'turn_limit' or 'gave_up'.
        """
        for _ in range(self.max_turns):
            answer, written = yield from self._ask(trace)
            yield from self.hear(trace, answer, written)
            if trace.status:
                return
            for call in trace.waiting():
                yield Event('call', call=call)
                result = self.toolbox.call(call.name, call.arguments)
                trace.take(result)
                yield Event('result', result.text, call, result)
        yield _end(trace, Event('turn_limit', f'no answer in {self.max_turns} turns'))

    def hear(self, trace: Trace, answer: Answer, written: str) -> list[Event]:
        """Add an answer to a trace.

        `events` is this and `Trace.take`; those who ask many models at once, or run tools
        elsewhere, do both themselves.

        Args:
            trace: Its last message is the one that is answered.
            answer: What the model wrote, as it was read.
            written: The same as it was spelt.

        Returns:
            What happened. The trace has a status now if that ends it; otherwise the calls that it
            is `waiting` for are to be run, or, without any, the model is to be asked again.
        """
        trace.turns += 1
        if answer.errors:
            trace.repairs += 1
            trace.errors += answer.errors
            told = '\n'.join(error.to_model() for error in answer.errors)
            trace.messages.append({'role': 'assistant', 'content': written, 'loss': False})
            if trace.repairs > self.max_repairs:
                return [Event('malformed', told), _end(trace, Event('gave_up', told))]
            trace.messages.append({'role': 'user', 'content': told})
            return [Event('malformed', told)]
        trace.repairs = 0
        number = sum(len(m.get('tool_calls') or ()) for m in trace.messages)
        trace.messages.append(answer.message(number))
        return [] if answer.calls else [_end(trace, Event('answer', answer.content))]

    def _ask(self, trace: Trace) -> Generator[Event, None, tuple[Answer, str]]:
        """What the model writes, and in the end what it is and how it was spelt."""
        uses_tools = bool(trace.tools) or any(m.get('tool_calls') for m in trace.messages)
        given = self.model(trace.messages, trace.tools)
        stream = AnswerStream(self.template, uses_tools=uses_tools)
        written = ''
        for text in [given] if isinstance(given, str) else given:
            written += text
            for piece in stream.feed(text):
                yield _shown(piece.kind, piece.text)
        pieces, answer = stream.finish()
        for piece in pieces:
            yield _shown(piece.kind, piece.text)
        return answer, written


def _end(trace: Trace, event: Event) -> Event:
    trace.status = event.kind
    trace.answer = event.text if event.kind == 'answer' else ''
    return event


def _shown(kind: Literal['text', 'thought', 'call'], text: str) -> Event:
    return Event('spelling' if kind == 'call' else kind, text)
