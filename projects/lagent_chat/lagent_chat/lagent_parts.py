"""Parts of Lagent made of ours: its model, its parser, its memory as messages, its actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lagent.actions import ActionExecutor, BaseAction
from lagent.agents.aggregator import DefaultAggregator
from lagent.hooks import Hook
from lagent.llms import BaseLLM
from lagent.memory import Memory
from lagent.prompts.parsers import StrParser, ToolStatusCode
from lagent.schema import ActionReturn, ActionStatusCode, AgentMessage, ModelStatusCode

from internlm_mm.agents import Result, Toolbox
from internlm_mm.inference import Sampling
from internlm_mm.tokenizers import ChatTemplate, read_answer
from internlm_mm.tokenizers.chat_messages import CODE_TOOL
from lagent_chat.folder import SessionFolder
from lagent_chat.models import Message, Speaker

UNKNOWN = 'unknown_tool'
"""The action that answers for tools that there are not."""

_STATES = {
    'ok': ActionStatusCode.SUCCESS,
    'arguments': ActionStatusCode.ARGS_ERROR,
}


class SpeakerLLM(BaseLLM):
    """Our generator, or a server, as a model of Lagent's.

    Args:
        speaker: It.
        tools: The functions that it is told of, in OpenAI's form.
    """

    def __init__(self, speaker: Speaker, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(path=speaker.name)
        self.speaker = speaker
        self.tools = list(tools)

    def stream_chat(
        self, inputs: list[Message], session_id: int = 0, **gen_params: Any
    ) -> Iterator[tuple[ModelStatusCode, str, None]]:
        """Answer messages of OpenAI's form: states, each with all of the text so far.

        Args:
            inputs: The messages.
            session_id: Lagent's; there is nothing to keep for one here.
            gen_params: Lagent's names: `max_new_tokens`, `temperature`, `top_p`, `top_k`,
                `repetition_penalty`, `stop_words`; what is not given is as the speaker has it.
        """
        text = ''
        for piece in self._ask(inputs, gen_params):
            text += piece
            yield ModelStatusCode.STREAM_ING, text, None
        yield ModelStatusCode.END, text, None

    def chat(
        self, inputs: Any, session_ids: int | list[int] | None = None, **gen_params: Any
    ) -> Any:
        """The whole answer to a conversation, or those to several."""
        if isinstance(inputs[0], list):
            return [''.join(self._ask(messages, gen_params)) for messages in inputs]
        return ''.join(self._ask(inputs, gen_params))

    def generate(self, inputs: Any, session_ids: Any = None, **gen_params: Any) -> Any:
        """The answer to a text, or to several, each a user's question."""
        texts = [inputs] if isinstance(inputs, str) else inputs
        asked = [[{'role': 'user', 'content': text}] for text in texts]
        answers = self.chat(asked, **gen_params)
        return answers[0] if isinstance(inputs, str) else answers

    def _ask(self, messages: Sequence[Message], params: Mapping[str, Any]) -> Iterator[str]:
        before = self.speaker.sampling
        self.speaker.sampling = _sampling(before, params)
        try:
            yield from self.speaker(messages, self.tools)
        finally:
            self.speaker.sampling = before


def _sampling(sampling: Sampling, params: Mapping[str, Any]) -> Sampling:
    changes = dict(params)
    stop = changes.pop('stop_words', None)
    if stop:
        changes['stop'] = (stop,) if isinstance(stop, str) else tuple(stop)
    return dataclasses.replace(sampling, **changes)


class CallParser(StrParser):
    """Reads answers as a chat template spells them.

    Args:
        chat_template: It.
        uses_tools: Whether there are functions to call.
    """

    tool_type = None

    def __init__(self, chat_template: ChatTemplate, uses_tools: bool) -> None:
        super().__init__()
        self.chat_template = chat_template
        self.uses_tools = uses_tools

    def parse_response(self, data: str) -> dict[str, Any]:
        """What Lagent calls `formatted`: the thought, the action, and how it went.

        `calls` are all of them; `action` is the first, in Lagent's own form.
        """
        answer = read_answer(self.chat_template, data, uses_tools=self.uses_tools)
        calls = [{'name': call.name, 'parameters': call.arguments} for call in answer.calls]
        parsed = {
            'tool_type': None,
            'thought': answer.content,
            'action': None,
            'status': ToolStatusCode.NO_TOOL,
            'reasoning': answer.thought,
            'calls': calls,
        }
        if answer.errors:
            parsed['status'] = ToolStatusCode.PARSING_ERROR
        elif calls:
            code = calls[0]['name'] == CODE_TOOL
            parsed['tool_type'] = 'interpreter' if code else 'plugin'
            parsed['action'] = calls[0]['parameters']['code'] if code else calls[0]
            parsed['status'] = ToolStatusCode.VALID_TOOL
        return parsed

    def format_response(self, parsed: dict[str, Any]) -> str:
        """What was parsed, spelt again."""
        asked: Message = {'role': 'user', 'content': ''}
        message = assistant_message(parsed, 0)
        spelt = self.chat_template.segments([asked, message], _declared(parsed['calls']))
        return ''.join(segment.text for segment in spelt if segment.answer)


def _declared(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(call['name'] for call in calls)
    return [{'type': 'function', 'function': {'name': name}} for name in names]


def assistant_message(parsed: Mapping[str, Any], number: int) -> Message:
    """A message in OpenAI's form.

    Args:
        parsed: Of `CallParser`.
        number: Of its first call.
    """
    message: Message = {'role': 'assistant', 'content': parsed['thought']}
    if parsed['reasoning']:
        message['reasoning_content'] = parsed['reasoning']
    if parsed['calls']:
        message['tool_calls'] = [
            {
                'id': f'call_{index}',
                'type': 'function',
                'function': {'name': call['name'], 'arguments': call['parameters']},
            }
            for index, call in enumerate(parsed['calls'], number)
        ]
    return message


class MessageAggregator(DefaultAggregator):
    """Lagent's memory as messages of OpenAI's form, which is what the model is shown."""

    def aggregate(
        self,
        messages: Memory,
        name: str,
        parser: StrParser | None = None,
        system_instruction: Any = None,
    ) -> list[Message]:
        """The messages.

        Args:
            messages: The memory.
            name: Of the agent.
            parser: Read the agent's answers when they came; not asked again.
            system_instruction: The system prompt.
        """
        read: list[Message] = []
        if system_instruction:
            read += self.aggregate_system_intruction(system_instruction)
        for said in messages.get_memory():
            number = sum(len(message.get('tool_calls') or ()) for message in read)
            info = said.extra_info or {}
            if 'message' in info:
                read.append(info['message'])
            elif said.sender == name:
                read.append(_answered(said, number))
            elif 'call' in info:
                if info['status'] in ('unknown', 'arguments'):
                    asked = [message for message in read if message.get('tool_calls')]
                    asked[-1]['loss'] = False
                read.append(_resulted(said, read))
            else:
                read.append({'role': 'user', 'content': said.content})
        return read


def _answered(said: AgentMessage, number: int) -> Message:
    parsed = said.formatted
    if parsed['status'] == ToolStatusCode.PARSING_ERROR:
        return {'role': 'assistant', 'content': said.content, 'loss': False}
    return assistant_message(parsed, number)


def _resulted(said: AgentMessage, before: Sequence[Message]) -> Message:
    """A tool's message for the first call that has none yet."""
    given = 0
    while before[-1 - given]['role'] == 'tool':
        given += 1
    call = before[-1 - given]['tool_calls'][given]
    info = said.extra_info
    images = tuple(Path(file).read_bytes() for file in info['images'])
    return {
        'role': 'tool',
        'tool_call_id': call['id'],
        'name': info['call'],
        'content': Result('ok', said.content, images).content(),
    }


class ToolAction(BaseAction):
    """A tool of ours as an action of Lagent's; the interpreter in its sandbox is one.

    Args:
        toolbox: Keeps to schemas, limits of time and of length.
        name: What Lagent calls it: what stands before the dot in a tool's name.
        folder: Where images go.
    """

    def __init__(self, toolbox: Toolbox, name: str, folder: SessionFolder) -> None:
        super().__init__({'name': name, 'description': '', 'parameters': [], 'required': []})
        self._toolbox = toolbox
        self._folder = folder

    def __call__(self, inputs: Any, name: str = 'run') -> ActionReturn:
        """Call it.

        Args:
            inputs: The tool's whole name and its arguments.
            name: Of the method, where one action has several; it is in the tool's name as well.
        """
        result = self._toolbox.call(inputs['name'], inputs['arguments'])
        returned = ActionReturn(args=inputs['arguments'], type=inputs['name'])
        returned.state = _STATES.get(result.status, ActionStatusCode.API_ERROR)
        returned.result = [{'type': 'text', 'content': result.text}]
        for file in self._folder.pictures(result.images):
            returned.result.append({'type': 'image', 'content': str(file)})
        if returned.state != ActionStatusCode.SUCCESS:
            returned.errmsg = result.text
        returned.thought = result.status
        return returned


class CallHook(Hook):
    """Gives calls to actions, and what came of them back as a message."""

    def before_action(self, executor: Any, message: AgentMessage, session_id: int) -> AgentMessage:
        """Find the action of the call in `message.content`."""
        call = message.content
        first, _, rest = call['name'].partition('.')
        known = first in executor.actions and '.' not in rest
        name = call['name'] if known else UNKNOWN
        inputs = {'name': call['name'], 'arguments': call['parameters']}
        return message.model_copy(update={'content': {'name': name, 'parameters': inputs}})

    def after_action(self, executor: Any, message: AgentMessage, session_id: int) -> AgentMessage:
        """Take the `ActionReturn` in `message.content` apart."""
        returned: ActionReturn = message.content
        parts = returned.result or []
        message.content = '\n'.join(part['content'] for part in parts if part['type'] == 'text')
        message.extra_info = {
            'call': returned.type,
            'status': returned.thought,
            'images': [part['content'] for part in parts if part['type'] == 'image'],
        }
        return message


def executor_of(toolbox: Toolbox, folder: SessionFolder) -> ActionExecutor:
    """Lagent's executor over our tools."""
    names = dict.fromkeys([*(name.partition('.')[0] for name in toolbox.tools), UNKNOWN])
    actions = [ToolAction(toolbox, name, folder) for name in names]
    return ActionExecutor(actions, hooks=[CallHook()])
