"""Models in a terminal: chat with history and commands, or text that is continued."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from internlm_mm.inference.chat import Chat
from internlm_mm.inference.dialogue import Dialogue
from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling
from internlm_mm.inference.settings import change_sampling, show_sampling
from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.utils.suggest import did_you_mean

BLOCK = '"""'
"""A line of this alone begins and ends a text of several lines."""


def complete(
    generator: Generator, prompt: str, sampling: Sampling, out: TextIO | None = None
) -> None:
    """Write a prompt and its continuation, piece by piece as it is generated.

    Args:
        generator: The model.
        prompt: The text to continue.
        sampling: How to draw.
        out: Where to write; standard output if None.
    """
    pieces = generator.stream(prompt, sampling)
    first = next(pieces, '')  # a prompt that cannot be continued fails before it is written
    print(prompt, first, sep='', end='', flush=True, file=out)
    for piece in pieces:
        print(piece, end='', flush=True, file=out)
    print(file=out)


class Terminal:
    """Reads what is typed, and writes what the model makes of it.

    Args:
        generator: The model.
        template: Name of its chat template; None to continue text, as base models do.
        sampling: How to draw.
        system: The system prompt; None to leave it to the template.
        read: Gives the next line, as `input` does.

    Raises:
        ValueError: If there is no such template, or no tokenizer.
    """

    def __init__(
        self,
        generator: Generator,
        template: str | None,
        sampling: Sampling,
        system: str | None = None,
        read: Callable[[str], str] | None = None,
    ) -> None:
        self.generator = generator
        self.sampling = sampling
        self.dialogue = Dialogue(system)
        self.chat = None if template is None else Chat(generator, template)
        self._read = read or input
        self._prompt: str | None = None  # that was continued last
        self._saved: set[Path] = set()
        self._open = True

    def run(self) -> None:
        """Until `/exit`, the end of the input, or Ctrl-C twice."""
        print(self._greeting())
        interrupted = False
        while self._open:
            try:
                text = self._read_text()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if interrupted:
                    print()
                    return
                interrupted = True
                print('\nCtrl-C once more, Ctrl-D or /exit leaves.')
                continue
            interrupted = False
            if text.strip():
                self.take(text)

    def take(self, text: str) -> None:
        """Do what one text asks for; what is wrong becomes a line on standard error."""
        try:
            if text.startswith('/') and not text.startswith('//'):
                self._command(text)
            else:
                self._say(text[1:] if text.startswith('//') else text)
        except (OSError, ValueError) as error:
            print(f'error: {error}', file=sys.stderr)

    def _greeting(self) -> str:
        if self.chat is None:
            first = 'The model continues what you type.'
        else:
            first = f'Chat with the template {self.chat.template.name}.'
        return (
            f'{first} /help lists commands, {BLOCK} begins and ends several lines.\n'
            'Ctrl-C stops an answer, Ctrl-D leaves.'
        )

    def _read_text(self) -> str:
        line = self._read('> ')
        lines = []
        if line.strip() == BLOCK:
            while (line := self._read('. ')).strip() != BLOCK:
                lines.append(line)
            return '\n'.join(lines)
        while line.endswith('\\'):
            lines.append(line[:-1])
            line = self._read('. ')
        return '\n'.join([*lines, line])

    def _say(self, text: str) -> None:
        if self.chat is None:
            self._prompt = text
            try:
                complete(self.generator, text, self.sampling)
            except KeyboardInterrupt:
                print()
            return
        self.dialogue.ask(text)
        self._answer(self.chat)

    def _answer(self, chat: Chat) -> None:
        """Stream the answer to the last question; as far as it comes, it counts."""
        answer = ''
        try:
            for piece in chat.stream(self.dialogue.whole(), self.sampling):
                print(piece, end='', flush=True)
                answer += piece
        except KeyboardInterrupt:
            pass
        except BaseException:
            answer = ''
            raise
        finally:
            self.dialogue.reply(answer)
        print()

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(' ')
        commands = {command.__name__.removeprefix('_do_'): command for command in self._commands()}
        if name not in commands:
            raise ValueError(
                f'there is no command /{name}.{did_you_mean(name, commands)} '
                'A text that begins with / is typed with two.'
            )
        commands[name](rest.strip())

    def _commands(self) -> Iterator[Callable[[str], None]]:
        return (getattr(self, name) for name in vars(type(self)) if name.startswith('_do_'))

    def _needs_chat(self) -> Chat:
        if self.chat is None:
            raise ValueError('the model continues text here; /template NAME begins a chat')
        return self.chat

    def _do_help(self, rest: str) -> None:
        """/help: this list."""
        if rest:
            raise ValueError('/help stands alone')
        print('\n'.join(inspect.getdoc(command) or '' for command in self._commands()))
        print(f'{BLOCK} alone in a line begins and ends a text of several; \\ at the end goes on.')

    def _do_clear(self, rest: str) -> None:
        """/clear: forget the conversation; the system prompt stays."""
        if rest:
            raise ValueError('/clear stands alone')
        self._needs_chat()
        self.dialogue.clear()

    def _do_system(self, rest: str) -> None:
        """/system TEXT: set the system prompt; 'none' for none; alone, show it."""
        chat = self._needs_chat()
        if rest:
            self.dialogue.system = '' if rest == 'none' else rest
            return
        system = self.dialogue.system
        shown = chat.template.default_system if system is None else system
        print(shown or 'There is no system prompt.')

    def _do_history(self, rest: str) -> None:
        """/history: show the conversation."""
        if rest:
            raise ValueError('/history stands alone')
        self._needs_chat()
        for message in self.dialogue.whole():
            print(f'[{message["role"]}] {message["content"] or ""}')
            for call in message.get('tool_calls') or ():
                print(f'  {call["function"]["name"]}({call["function"].get("arguments", "")})')

    def _do_retry(self, rest: str) -> None:
        """/retry: draw another answer to the last question."""
        if rest:
            raise ValueError('/retry stands alone')
        if self.chat is not None:
            before = list(self.dialogue.messages)
            try:
                self._say(self.dialogue.undo())
            except ValueError:
                self.dialogue.messages = before
                raise
        elif self._prompt is not None:
            self._say(self._prompt)
        else:
            raise ValueError('nothing has been typed yet')

    def _do_undo(self, rest: str) -> None:
        """/undo: forget the last question and its answer."""
        if rest:
            raise ValueError('/undo stands alone')
        self._needs_chat()
        self.dialogue.undo()

    def _do_save(self, rest: str) -> None:
        """/save FILE: write the conversation as JSON."""
        chat = self._needs_chat()
        file = self._file(rest, '/save')
        if file.exists() and file.resolve() not in self._saved:
            raise ValueError(f'{file} exists, and not from here; give another name')
        self.dialogue.save(file, chat.template.name)
        self._saved.add(file.resolve())
        print(f'written: {file}')

    def _do_load(self, rest: str) -> None:
        """/load FILE: go on from a conversation in JSON."""
        chat = self._needs_chat()
        file = self._file(rest, '/load')
        template = self.dialogue.load(file)
        print(f'read: {file}')
        if template not in (None, chat.template.name):
            print(f'It was written with the template {template}; this is {chat.template.name}.')

    def _do_template(self, rest: str) -> None:
        """/template NAME: spell conversations in another way; 'none' continues text."""
        if not rest:
            names = ', '.join(sorted(CHAT_TEMPLATES.module_dict))
            now = 'none' if self.chat is None else self.chat.template.name
            print(f'{now} (there are {names})')
        elif rest == 'none':
            self.chat = None
        else:
            self.chat = Chat(self.generator, rest)

    def _do_set(self, rest: str) -> None:
        """/set KEY VALUE: change how answers are drawn; alone, show it."""
        if rest:
            key, _, value = rest.partition(' ')
            self.sampling = change_sampling(self.sampling, key, value.strip())
        else:
            print(show_sampling(self.sampling))

    def _do_exit(self, rest: str) -> None:
        """/exit: leave."""
        if rest:
            raise ValueError('/exit stands alone')
        self._open = False

    @staticmethod
    def _file(rest: str, command: str) -> Path:
        if not rest:
            raise ValueError(f'{command} takes the name of a file')
        return Path(rest).expanduser()
