"""Rows of questions for agents -> what is asked, what is right, whether that takes a tool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from internlm_mm.datasets.conversation_formats import FORMATS
from internlm_mm.evaluation.fields import as_object, need, need_text, subject_of, text_of
from internlm_mm.tokenizers.chat_messages import read_conversation
from internlm_mm.utils.suggest import kind


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCase:
    """A question for an agent.

    Attributes:
        messages: In OpenAI's form; the last is the user's.
        answer: What is right.
        needs_tool: Whether it takes a tool to find it.
        tools: Names of the tools that are offered; None for all of the task.
        subject: What it is about; '' where nothing says.
        place: `file:line` of its row.
    """

    messages: list[dict[str, Any]]
    answer: str
    needs_tool: bool
    tools: tuple[str, ...] | None = None
    subject: str = ''
    place: str = ''


def read_agent_case(row: Any) -> Iterator[AgentCase]:
    """`question` or `messages`, and `answer`; `needs_tool`, `tools`, `subject` where there are.

    Of `messages` all up to the user's last are the question. What follows, as records to train on
    have it, only tells whether a tool is needed, where `needs_tool` does not.

    Raises:
        ValueError: With the field.
    """
    row = as_object(row)
    answer = need(row, 'answer')
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    needs_tool = row.get('needs_tool')
    if needs_tool is not None and not isinstance(needs_tool, bool):
        raise ValueError(f'needs_tool: true or false, not {needs_tool!r}')
    if 'messages' in row:
        messages, _ = FORMATS['messages']({'messages': row['messages']})
        said = read_conversation(messages).messages
        places = [index for index, message in enumerate(said) if message.role == 'user']
        if not places:
            raise ValueError('messages: none of the user, nothing is asked')
        after = [message for message in said[places[-1] + 1 :] if message.role == 'assistant']
        if needs_tool is None and after:
            needs_tool = any(message.calls for message in after)
        messages = messages[: places[-1] + 1]
    else:
        messages = [{'role': 'user', 'content': need_text(row, 'question')}]
    yield AgentCase(
        messages=messages,
        answer=text_of(answer, 'answer'),
        needs_tool=True if needs_tool is None else needs_tool,
        tools=_names(row.get('tools')),
        subject=subject_of(row, 'subject'),
    )


def _names(tools: Any) -> tuple[str, ...] | None:
    """Names of tools: as they are, or of functions in OpenAI's form."""
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise ValueError(f'tools: a list of names, not {kind(tools)}')
    names = []
    for index, tool in enumerate(tools):
        name = tool
        if isinstance(tool, dict) and isinstance(tool.get('function'), dict):
            name = tool['function'].get('name')
        names.append(text_of(name, f'tools[{index}]'))
    return tuple(names)
