"""A conversation that grows: what was said, and how it is kept in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internlm_mm.tokenizers.chat_messages import read_conversation

Message = dict[str, Any]


class Dialogue:
    """Messages of OpenAI's form, and the system prompt before them.

    Args:
        system: The system prompt; None to leave it to the template.

    Attributes:
        messages: Without the system's.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.messages: list[Message] = []

    def whole(self) -> list[Message]:
        """All messages, the system's first if there is one."""
        first = [] if self.system is None else [{'role': 'system', 'content': self.system}]
        return [*first, *self.messages]

    def ask(self, question: str) -> None:
        """The user says something."""
        self.messages.append({'role': 'user', 'content': question})

    def reply(self, answer: str) -> None:
        """The model has answered; a question without an answer is as if never asked."""
        if answer:
            self.messages.append({'role': 'assistant', 'content': answer})
        else:
            self.undo()

    def undo(self) -> str:
        """Forget the last question and what came of it.

        Returns:
            The question.

        Raises:
            ValueError: If there is none.
        """
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]['role'] == 'user':
                question = self.messages[index]['content']
                del self.messages[index:]
                return question
        raise ValueError('nothing has been said yet')

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages.clear()

    def save(self, file: str | Path, template: str) -> None:
        """Write a JSON file that `load`, and training on conversations, read.

        Raises:
            OSError: If it cannot be written.
        """
        record = {'template': template, 'messages': self.whole()}
        content = json.dumps(record, ensure_ascii=False, indent=2) + '\n'
        Path(file).write_text(content, encoding='utf-8')

    def load(self, file: str | Path) -> str | None:
        """Go on from a file of `save`, from a page's export, or from a bare list of messages.

        Returns:
            Name of the template that the file was written with, if it says so.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it holds no conversation; nothing is changed then.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f'{file} is no file; expected a conversation as JSON')
        try:
            record = json.loads(Path(file).read_text(encoding='utf-8'))
        except ValueError as error:
            raise ValueError(f'{file} is no JSON: {error}') from None
        messages: Any = record.get('messages') if isinstance(record, dict) else record
        read_conversation(messages, where=str(file))
        system = [m for m in messages[:1] if m['role'] == 'system']
        self.system = system[0]['content'] if system else None
        self.messages = [dict(message) for message in messages[len(system) :]]
        return record.get('template') if isinstance(record, dict) else None
