"""Conversations: what was asked, what came of it, and what of that the model is shown again."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from web_chat.events import Code, Event, Result, Text

INTERPRETER = 'python'
"""The name of the function that code is exported as a call of."""

Message = dict[str, Any]


@dataclass
class Turn:
    """One question and its answer.

    Attributes:
        question: What the user wrote.
        parts: The answer so far; neighbouring texts are one.
        state: Only 'done' and 'stopped' answers are shown to the model again.
        error: Why it failed, in a sentence.
    """

    question: str
    parts: list[Event] = field(default_factory=list)
    state: Literal['waiting', 'writing', 'done', 'stopped', 'failed'] = 'waiting'
    error: str = ''

    def begin(self) -> bool:
        """Claim the writing of the answer, which `finish`, `stop` or `fail` ends for good."""
        if self.state != 'waiting':
            return False
        self.state = 'writing'
        return True

    def add(self, event: Event) -> None:
        """Put an event behind the others."""
        if self.state != 'writing':
            return
        last = self.parts[-1] if self.parts else None
        if isinstance(event, Text) and isinstance(last, Text):
            self.parts[-1] = Text(last.text + event.text)
        elif event != Text(''):
            self.parts.append(event)

    def finish(self) -> None:
        """The answer is whole."""
        self._end('done')

    def stop(self) -> None:
        """The user has read enough; what is there stays."""
        self._end('stopped')

    def fail(self, error: str) -> None:
        """Something went wrong; what is there is shown and not used."""
        if self._end('failed'):
            self.error = error

    def _end(self, state: Literal['done', 'stopped', 'failed']) -> bool:
        if self.state != 'writing':
            return False
        self.state = state
        return True

    @property
    def counts(self) -> bool:
        """Whether the model is shown this turn again."""
        return self.state in ('done', 'stopped') and bool(self.answer())

    def answer(self, number: int = 0, images: bool = False) -> list[Message]:
        """The answer as messages of OpenAI's form: code is a call, a result a message of a tool.

        Code without a result, where an answer was stopped, is left out: a call that nobody answered
        is none that a model should see.

        Args:
            number: Of the turn in its conversation, so that no two calls have one name.
            images: Whether results keep their images, as data URLs.
        """
        messages: list[Message] = []
        text = ''
        for index, part in enumerate(self.parts):
            following = self.parts[index + 1] if index + 1 < len(self.parts) else None
            if isinstance(part, Text):
                text += part.text
            elif isinstance(part, Code) and isinstance(following, Result):
                name = f'call_{number}_{index}'
                messages += [_call(text, part, name), _result(following, name, images)]
                text = ''
        if text:
            messages.append({'role': 'assistant', 'content': text})
        return messages


@dataclass
class Conversation:
    """Questions and answers under one system prompt."""

    system: str = ''
    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The beginning of the first question."""
        if not self.turns:
            return 'New conversation'
        words = ' '.join(self.turns[0].question.split())
        return words if len(words) <= 40 else words[:39] + '…'

    def interrupt(self) -> None:
        """Whoever is writing an answer writes in vain from now on."""
        for turn in self.turns:
            turn.stop()

    def retry(self) -> None:
        """Forget the last answer and wait for another one."""
        self.turns[-1] = Turn(self.turns[-1].question)

    @property
    def waiting(self) -> Turn | None:
        """The turn whose answer is still to be written."""
        return self.turns[-1] if self.turns and self.turns[-1].state == 'waiting' else None

    def ask(self, question: str) -> None:
        """Begin a turn; blank questions are none."""
        if question.strip() and not self.busy:
            self.turns.append(Turn(question))

    @property
    def busy(self) -> bool:
        """Whether an answer is being written, or about to be."""
        return bool(self.turns) and self.turns[-1].state in ('waiting', 'writing')

    def messages(self, images: bool = False) -> list[Message]:
        """What a model is shown: roles take turns, whatever failed in between."""
        messages: list[Message] = []
        if self.system.strip():
            messages.append({'role': 'system', 'content': self.system})
        for number, turn in enumerate(self.turns):
            if turn.counts or turn is self.waiting:
                messages.append({'role': 'user', 'content': turn.question})
                messages += turn.answer(number, images) if turn.counts else []
        return messages

    def export(self, model: str) -> str:
        """The conversation as JSON: its title, the model's name and the messages, with images."""
        record = {'title': self.title, 'model': model, 'messages': self.messages(images=True)}
        return json.dumps(record, ensure_ascii=False, indent=2) + '\n'


def _call(text: str, code: Code, name: str) -> Message:
    arguments = json.dumps({'code': code.source}, ensure_ascii=False)
    function = {'name': INTERPRETER, 'arguments': arguments}
    calls = [{'id': name, 'type': 'function', 'function': function}]
    return {'role': 'assistant', 'content': text, 'tool_calls': calls}


def _result(result: Result, name: str, images: bool) -> Message:
    message: Message = {
        'role': 'tool',
        'tool_call_id': name,
        'name': INTERPRETER,
        'content': result.text,
    }
    if images and result.images:
        urls = [f'data:image/png;base64,{base64.b64encode(i).decode()}' for i in result.images]
        message['images'] = urls
    return message
