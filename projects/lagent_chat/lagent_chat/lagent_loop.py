"""Lagent at work: its agent asks the model, its executor runs the tools."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lagent.agents import StreamingAgent
from lagent.schema import AgentMessage

from internlm_mm.agents import Agent, Event, Result, Toolbox, Trace
from internlm_mm.tokenizers import AnswerStream
from internlm_mm.tokenizers.chat_messages import Call
from internlm_mm.tokenizers.chat_parsing import Answer
from lagent_chat.folder import SessionFolder
from lagent_chat.lagent_parts import CallParser, MessageAggregator, SpeakerLLM, executor_of
from lagent_chat.models import Message, Speaker

_SESSION = 0


class LagentLoop:
    """Lets a model call tools until it answers, as `Agent` does, by Lagent.

    Lagent has no streaming agent for tools: this is its `StreamingAgent` and its `ActionExecutor`,
    taking turns. What was said is in the agent's memory; the trace is what `Agent` makes of it.

    Args:
        speaker: The model.
        toolbox: What it may call.
        folder: Where images go.
        max_turns: How often the model is asked.
        max_repairs: How often in a row it may write a call that cannot be read.

    Attributes:
        agent: Lagent's.
        executor: Lagent's.

    Raises:
        ValueError: If a limit is none, or the speaker's template spells no functions.
    """

    def __init__(
        self,
        speaker: Speaker,
        toolbox: Toolbox,
        folder: SessionFolder,
        max_turns: int = 10,
        max_repairs: int = 2,
    ) -> None:
        self._rules = Agent(speaker, speaker.template, toolbox, max_turns, max_repairs)
        self._template = speaker.template
        self.agent = StreamingAgent(
            llm=SpeakerLLM(speaker, toolbox.declarations()),
            output_format=CallParser(speaker.template, bool(toolbox.tools)),
            aggregator=MessageAggregator(),
        )
        self.executor = executor_of(toolbox, folder)

    def begin(self, messages: Sequence[Mapping[str, Any]]) -> Trace:
        """A trace that begins with these messages; see `Agent.begin`."""
        return self._rules.begin(messages)

    def memory(self) -> list[Message]:
        """What Lagent's agent remembers, as the model is shown it."""
        memory = self.agent.memory.get(_SESSION)
        system = self.agent.template
        if memory is None:
            return []
        return self.agent.aggregator.aggregate(memory, self.agent.name, None, system)

    def events(self, trace: Trace) -> Iterator[Event]:
        """Work on a trace; see `Agent.events`."""
        given = self._remember(trace.messages)
        for _ in range(self._rules.max_turns):
            answer, written = yield from self._ask(given, trace)
            yield from self._rules.hear(trace, answer, written)
            if trace.status:
                return
            given = []
            for call in trace.waiting():
                yield Event('call', call=call)
                said, result = self._run(call)
                given.append(said)
                trace.take(result)
                yield Event('result', result.text, call, result)
            if answer.errors:
                given = [AgentMessage(sender='user', content=trace.messages[-1]['content'])]
        self.agent.update_memory(given, session_id=_SESSION)
        trace.status = 'turn_limit'
        yield Event('turn_limit', f'no answer in {self._rules.max_turns} turns')

    def _remember(self, messages: Sequence[Message]) -> list[AgentMessage]:
        """Let the agent remember all but the last message, which is given back to be said."""
        *before, last = messages
        system = before.pop(0) if before and before[0]['role'] == 'system' else None
        self.agent.template = system
        if [m for m in self.memory() if m['role'] != 'system'] != before:
            self.agent.reset(_SESSION)
            self.agent.update_memory([_replayed(m, self.agent.name) for m in before], _SESSION)
        return [_replayed(last, self.agent.name)]

    def _ask(
        self, given: Sequence[AgentMessage], trace: Trace
    ) -> Generator[Event, None, tuple[Answer, str]]:
        """What Lagent's agent says, and in the end what it is and how it was spelt."""
        uses_tools = bool(trace.tools) or any(m.get('tool_calls') for m in trace.messages)
        stream = AnswerStream(self._template, uses_tools=uses_tools)
        written = ''
        for said in self.agent(*given, session_id=_SESSION):
            for piece in stream.feed(said.content[len(written) :]):
                yield Event('spelling' if piece.kind == 'call' else piece.kind, piece.text)
            written = said.content
        pieces, answer = stream.finish()
        for piece in pieces:
            yield Event('spelling' if piece.kind == 'call' else piece.kind, piece.text)
        return answer, written

    def _run(self, call: Call) -> tuple[AgentMessage, Result]:
        """What Lagent's executor says of a call, and the same as a result of ours."""
        content = {'name': call.name, 'parameters': call.arguments}
        said = self.executor(AgentMessage(sender=self.agent.name, content=content), _SESSION)
        info = said.extra_info
        images = tuple(Path(file).read_bytes() for file in info['images'])
        return said, Result(info['status'], said.content, images)


def _replayed(message: Message, name: str) -> AgentMessage:
    """A message of a conversation that Lagent did not lead, for its memory."""
    sender = {'assistant': name, 'tool': 'ActionExecutor'}.get(message['role'], message['role'])
    content = message['content'] if isinstance(message['content'], str) else ''
    return AgentMessage(sender=sender, content=content, extra_info={'message': dict(message)})
