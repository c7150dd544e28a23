"""The one folder that a chat writes to: conversations as training records, and images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm_mm.tokenizers import ChatTemplate, read_answer

TOLD = 'The call could not be read: '
"""What the model is told of a misspelt call begins with this: see `CallError.to_model`."""


class SessionFolder:
    """Keeps what was said.

    Nothing is written before there is something to keep.

    Args:
        path: The folder; it may not exist yet.

    Raises:
        ValueError: If it has a trace of an earlier chat, or is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.trace = self.path / 'trace.jsonl'
        self._records: list[dict[str, Any]] = [{}]
        there = next(one for one in (self.path, *self.path.parents) if one.exists())
        if not there.is_dir():
            raise ValueError(f'--folder {path}: {there} is a file')
        if self.trace.exists():
            raise ValueError(f'{self.trace} is of an earlier chat; name another --folder')

    def keep(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> None:
        """Write the conversation as it is now, in the place of what it was.

        Args:
            messages: In OpenAI's form.
            tools: Functions that could be called, in OpenAI's form.

        Raises:
            OSError: If it cannot be written.
        """
        answered = any(message['role'] == 'assistant' for message in messages)
        record = {'messages': list(messages), **({'tools': list(tools)} if tools else {})}
        if answered:
            self._records[-1] = record
        elif self._records[-1]:
            self._records[-1] = {}
        else:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(one, ensure_ascii=False) + '\n' for one in self._records if one]
        part = self.path / '.trace.jsonl.part'
        part.write_text(''.join(lines), encoding='utf-8')
        os.replace(part, self.trace)

    def begin(self) -> None:
        """A new conversation follows; the one before it stays as it is."""
        if self._records[-1]:
            self._records.append({})

    def pictures(self, images: Iterable[bytes]) -> list[Path]:
        """Write images; the same image is one file.

        Raises:
            OSError: If one cannot be written.
        """
        files = []
        for image in images:
            file = self.path / 'images' / f'{hashlib.sha256(image).hexdigest()[:12]}.png'
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(image)
            files.append(file)
        return files


def learnable(
    messages: Sequence[Mapping[str, Any]], template: ChatTemplate
) -> list[Mapping[str, Any]]:
    """A conversation without calls that cannot be read, which no template can spell as text.

    Where the model mended one, only what it wrote in the end is left; where it did not, the
    question goes, too.

    Args:
        messages: In OpenAI's form.
        template: The model's.
    """
    kept: list[Mapping[str, Any]] = []
    misspelt = False
    for message in messages:
        told = message['role'] == 'user' and str(message['content']).startswith(TOLD)
        if misspelt and not told:
            _drop_question(kept)
        elif misspelt:
            misspelt = False
            continue
        misspelt = _is_misspelt(message, template)
        if not misspelt:
            kept.append(message)
    if misspelt:
        _drop_question(kept)
    return kept


def _is_misspelt(message: Mapping[str, Any], template: ChatTemplate) -> bool:
    if message.get('loss', True) or message['role'] != 'assistant' or message.get('tool_calls'):
        return False
    return bool(read_answer(template, message['content']).errors)


def _drop_question(messages: list[Mapping[str, Any]]) -> None:
    while messages and messages.pop()['role'] != 'user':
        pass
