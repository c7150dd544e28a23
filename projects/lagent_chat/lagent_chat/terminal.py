"""The chat itself: what is typed, what the model and its tools make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm_mm.agents import Event, Trace
from internlm_mm.inference.command_line import CommandLine, stands_alone
from internlm_mm.inference.dialogue import Dialogue
from internlm_mm.inference.settings import change_sampling, show_sampling
from internlm_mm.tokenizers.chat_messages import CODE_TOOL
from lagent_chat.folder import TOLD, SessionFolder, learnable
from lagent_chat.models import Message, Speaker

# What would move the cursor, colour or hide what follows, or turn its direction.
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')


class Loop(Protocol):
    """Lets a model call tools until it answers: `internlm_mm.agents.Agent`, or Lagent's."""

    def begin(self, messages: Sequence[Message]) -> Trace:
        """A trace that begins with these messages."""
        ...

    def events(self, trace: Trace) -> Iterator[Event]:
        """Work on a trace; see `Agent.events`."""
        ...


class AgentTerminal(CommandLine):
    """A chat with tools.

    Args:
        loop: Runs the tools.
        speaker: The model.
        tools: What it may call, in OpenAI's form.
        folder: Where it is kept.
        system: The system prompt; None to leave it to the template.
        read: Gives the next line, as `input` does.

    Attributes:
        dialogue: What was said.
        status: How the last answer ended, as in `Trace`; 'empty' if it says nothing; 'stopped' by
            Ctrl-C.
    """

    def __init__(
        self,
        loop: Loop,
        speaker: Speaker,
        tools: Sequence[dict[str, Any]],
        folder: SessionFolder,
        system: str | None = None,
        read: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__(f'Chat with {shown(speaker.name)}, kept in {folder.path}.', read)
        self.dialogue = Dialogue(system)
        self.status = ''
        self._loop, self._speaker, self._folder = loop, speaker, folder
        self._tools = list(tools)
        self._saved: set[Path] = set()

    def say(self, text: str) -> None:
        """Ask, and write what happens until there is an answer.

        Raises:
            OSError: If nobody answers, ValueError if the model cannot; the question is as if
                never asked.
        """
        before = list(self.dialogue.messages)
        self.dialogue.ask(text)
        screen = Screen(self._folder)
        try:
            trace = self._loop.begin(self.dialogue.whole())
            try:
                for event in self._loop.events(trace):
                    screen.show(event)
                self.status = trace.status
                if self.status == 'answer' and not screen.text.strip():
                    self.status = 'empty'
                    screen.note('an empty answer')
            except KeyboardInterrupt:
                self.status = 'stopped'
                screen.note('stopped')
            settle(trace.messages, screen.text)
            if self.status == 'empty':  # nothing to learn from
                trace.messages[-1]['loss'] = False
        except BaseException as error:
            self.dialogue.messages = before
            screen.end()
            if isinstance(error, RuntimeError):  # PyTorch's, out of memory above all
                raise ValueError(f'the model failed: {error}') from error
            raise
        system = len(self.dialogue.whole()) - len(self.dialogue.messages)
        self.dialogue.messages = trace.messages[system:]
        screen.end()
        self._keep()

    def _keep(self) -> None:
        messages = learnable(self.dialogue.whole(), self._speaker.template)
        self._folder.keep(messages, self._tools)

    def _do_tools(self, rest: str) -> None:
        """/tools: what the model may call."""
        stands_alone(rest, '/tools')
        for tool in self._tools:
            function = tool['function']
            names = ', '.join(function['parameters'].get('properties', {}))
            print(f'{function["name"]}({names}): {shown(function["description"])}')
        if not self._tools:
            print('There are none.')

    def _do_clear(self, rest: str) -> None:
        """/clear: begin a new conversation; variables of the interpreter stay."""
        stands_alone(rest, '/clear')
        self.dialogue.clear()
        self._folder.begin()

    def _do_system(self, rest: str) -> None:
        """/system TEXT: set the system prompt; 'none' for none; alone, show it."""
        if rest:
            self.dialogue.system = None if rest == 'none' else rest
        else:
            print(self.dialogue.system or 'There is no system prompt.')

    def _do_history(self, rest: str) -> None:
        """/history: show the conversation."""
        stands_alone(rest, '/history')
        for message in self.dialogue.whole():
            content = message['content'] or ''
            if not isinstance(content, str):
                content = '\n'.join(part.get('text', '[image]') for part in content)
            print(f'[{message["role"]}] {shown(content)}')
            for call in message.get('tool_calls') or ():
                function = call['function']
                print(f'  {function["name"]}({shown(str(function.get("arguments", "")))})')

    def _do_retry(self, rest: str) -> None:
        """/retry: draw another answer to the last question."""
        stands_alone(rest, '/retry')
        before = list(self.dialogue.messages)
        try:
            self.say(self._undone())
        except (OSError, ValueError):
            self.dialogue.messages = before
            raise

    def _do_undo(self, rest: str) -> None:
        """/undo: forget the last question and all that came of it."""
        stands_alone(rest, '/undo')
        self._undone()
        self._keep()

    def _undone(self) -> str:
        """Forget the last question, and what the model was told about calls that it misspelt."""
        question = self.dialogue.undo()
        while question.startswith(TOLD):
            question = self.dialogue.undo()
        return question

    def _do_save(self, rest: str) -> None:
        """/save FILE: write the conversation as JSON."""
        file = _file(rest, '/save')
        if file.exists() and file.resolve() not in self._saved:
            raise ValueError(f'{file} exists, and not from here; give another name')
        self.dialogue.save(file, self._speaker.template.name)
        self._saved.add(file.resolve())
        print(f'written: {file}')

    def _do_load(self, rest: str) -> None:
        """/load FILE: go on from a conversation in JSON."""
        file = _file(rest, '/load')
        self.dialogue.load(file)
        self._folder.begin()
        print(f'read: {file}')

    def _do_set(self, rest: str) -> None:
        """/set KEY VALUE: change how answers are drawn; alone, show it."""
        if rest:
            key, _, value = rest.partition(' ')
            self._speaker.sampling = change_sampling(self._speaker.sampling, key, value.strip())
        else:
            print(show_sampling(self._speaker.sampling))


class Screen:
    """Writes what happens, as it happens.

    Args:
        folder: Where images go.

    Attributes:
        text: What the model has written for the user since it was asked last.
    """

    def __init__(self, folder: SessionFolder) -> None:
        self.text = ''
        self._folder = folder
        self._kind = ''
        self._at_start = True  # of a line

    def show(self, event: Event) -> None:
        """Write an event."""
        match event.kind:
            case 'text' | 'thought':
                if event.kind != self._kind:
                    self.end()
                self._write(shown(event.text))
                if event.kind == 'text':
                    self.text += event.text
            case 'call':
                assert event.call is not None
                self.text = ''
                arguments = event.call.arguments
                if event.call.name == CODE_TOOL and isinstance(arguments.get('code'), str):
                    self._block(f'[{CODE_TOOL}]', arguments['code'], '    ')
                else:
                    self._block(f'[{event.call.name}]', str(arguments), '    ')
            case 'result':
                assert event.result is not None
                self._block('', event.text, '  | ')
                for file in self._folder.pictures(event.result.images):
                    self._block('', f'[image: {file}]', '  | ')
            case 'malformed':
                self.text = ''
                self.note(event.text)
            case 'turn_limit':
                self.note(event.text)
            case 'gave_up':
                self.note('the model does not mend its call; ask in other words')
        self._kind = event.kind

    def note(self, text: str) -> None:
        """Write something that nobody said."""
        self._block('', text, '! ')

    def end(self) -> None:
        """End the line that was begun."""
        if not self._at_start:
            self._write('\n')

    def _block(self, head: str, text: str, indent: str) -> None:
        self.end()
        lines = [head] if head else []
        lines += [indent + line for line in shown(text).split('\n')]
        self._write('\n'.join(lines) + '\n')

    def _write(self, text: str) -> None:
        print(text, end='', flush=True)
        self._at_start = text.endswith('\n') if text else self._at_start


def settle(messages: list[Message], text: str) -> None:
    """Make a conversation of one that may have been stopped anywhere.

    Args:
        messages: Changed in place: calls without a result go, and so does a question without an
            answer.
        text: What of an answer was there; it counts, but is nothing to learn from.
    """
    last = len(messages) - 1
    while messages[last]['role'] == 'tool':
        last -= 1
    calls = len(messages[last].get('tool_calls') or ())
    if calls > len(messages) - 1 - last:
        del messages[last:]
        text = ''
    if text and messages[-1]['role'] in ('user', 'tool'):
        messages.append({'role': 'assistant', 'content': text, 'loss': False})
    while messages and messages[-1]['role'] == 'user':
        del messages[-1]


def shown(text: str) -> str:
    """A text whose control characters are spelt: models and programs wrote it."""
    return _CONTROL.sub(lambda found: found[0].encode('unicode_escape').decode(), text)


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise ValueError(f'{command} takes the name of a file')
    return Path(rest).expanduser()
