"""What is typed: texts, and commands that begin with a slash."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

from internlm_mm.utils.suggest import did_you_mean

BLOCK = '"""'
"""A line of this alone begins and ends a text of several lines."""


class CommandLine(ABC):
    """Reads texts and commands until somebody leaves.

    A subclass says what becomes of a text in `say`. Its methods `_do_NAME` are commands `/NAME`,
    which are given what stands behind the name; docstrings are what `/help` lists.

    Args:
        greeting: What is said first.
        read: Gives the next line, as `input` does.
    """

    def __init__(self, greeting: str, read: Callable[[str], str] | None = None) -> None:
        self.greeting = greeting
        self._read = read or input
        self._open = True

    @abstractmethod
    def say(self, text: str) -> None:
        """Take a text.

        Raises:
            OSError: With what is wrong, as does ValueError.
        """

    def run(self) -> None:
        """Until `/exit`, the end of the input, or Ctrl-C twice."""
        print(
            f'{self.greeting} /help lists commands, {BLOCK} begins and ends several lines.\n'
            'Ctrl-C stops an answer, Ctrl-D leaves.'
        )
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
                self.say(text[1:] if text.startswith('//') else text)
        except (OSError, ValueError) as error:
            print(f'error: {error}', file=sys.stderr)

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

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(' ')
        commands = self._commands()
        if name not in commands:
            raise ValueError(
                f'there is no command /{name}.{did_you_mean(name, commands)} '
                'A text that begins with / is typed with two.'
            )
        commands[name](rest.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        """By name, in the order in which they are written; those of this class last."""
        names = [name for kind in type(self).__mro__ for name in vars(kind)]
        found = dict.fromkeys(name for name in names if name.startswith('_do_'))
        return {name.removeprefix('_do_'): getattr(self, name) for name in found}

    def _do_help(self, rest: str) -> None:
        """/help: this list."""
        stands_alone(rest, '/help')
        for command in self._commands().values():
            print(inspect.getdoc(command) or '')
        print(f'{BLOCK} alone in a line begins and ends a text of several; \\ at the end goes on.')

    def _do_exit(self, rest: str) -> None:
        """/exit: leave."""
        stands_alone(rest, '/exit')
        self._open = False


def stands_alone(rest: str, command: str) -> None:
    """Refuse what is typed behind a command that takes nothing.

    Raises:
        ValueError: Naming the command.
    """
    if rest:
        raise ValueError(f'{command} stands alone')
