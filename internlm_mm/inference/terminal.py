"""Models in a terminal: chat with history and commands, or text that is continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from internlm_mm.inference.chat import Chat
from internlm_mm.inference.command_line import CommandLine, stands_alone
from internlm_mm.inference.dialogue import Dialogue
from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling
from internlm_mm.inference.settings import change_sampling, show_sampling
from internlm_mm.registry import CHAT_TEMPLATES


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


class Terminal(CommandLine):
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
        if self.chat is None:
            greeting = 'The model continues what you type.'
        else:
            greeting = f'Chat with the template {self.chat.template.name}.'
        super().__init__(greeting, read)
        self._prompt: str | None = None  # that was continued last
        self._saved: set[Path] = set()

    def say(self, text: str) -> None:
        """Answer a text, or continue it."""
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

    def _needs_chat(self) -> Chat:
        if self.chat is None:
            raise ValueError('the model continues text here; /template NAME begins a chat')
        return self.chat

    def _do_clear(self, rest: str) -> None:
        """/clear: forget the conversation; the system prompt stays."""
        stands_alone(rest, '/clear')
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
        stands_alone(rest, '/history')
        self._needs_chat()
        for message in self.dialogue.whole():
            print(f'[{message["role"]}] {message["content"] or ""}')
            for call in message.get('tool_calls') or ():
                print(f'  {call["function"]["name"]}({call["function"].get("arguments", "")})')

    def _do_retry(self, rest: str) -> None:
        """/retry: draw another answer to the last question."""
        stands_alone(rest, '/retry')
        if self.chat is not None:
            before = list(self.dialogue.messages)
            try:
                self.say(self.dialogue.undo())
            except ValueError:
                self.dialogue.messages = before
                raise
        elif self._prompt is not None:
            self.say(self._prompt)
        else:
            raise ValueError('nothing has been typed yet')

    def _do_undo(self, rest: str) -> None:
        """/undo: forget the last question and its answer."""
        stands_alone(rest, '/undo')
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

    @staticmethod
    def _file(rest: str, command: str) -> Path:
        if not rest:
            raise ValueError(f'{command} takes the name of a file')
        return Path(rest).expanduser()
