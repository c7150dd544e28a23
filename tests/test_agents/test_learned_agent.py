"""A tiny model learns calls by heart, and the loop takes it from question to answer."""

from pathlib import Path

import pytest
import torch

from internlm_mm import from_pretrained
from internlm_mm.agents import Agent, Toolbox, interpreter
from internlm_mm.inference import Chat, Sampling, template_for
from internlm_mm.sandbox import Sandbox, SandboxError
from tests.chatting import learn_chat
from tests.conversations import call

pytestmark = pytest.mark.slow


def double(n: int) -> int:
    """Double it."""
    return 2 * n


QUESTIONS = {
    'code': ('17 * 23?', ('python', {'code': 'print(17 * 23)'}), '391'),
    'tool': ('Twice 4?', ('double', {'n': 4}), '8'),
    'none': ('hello', None, 'Hi.'),
}


def conversation(kind: str) -> list[dict]:
    question, called, answer = QUESTIONS[kind]
    asked = {'role': 'user', 'content': question}
    if called is None:
        return [asked, {'role': 'assistant', 'content': answer}]
    return [
        asked,
        {'role': 'assistant', 'content': 'I ask.', 'tool_calls': [call(*called, 'a')]},
        {'role': 'tool', 'tool_call_id': 'a', 'content': answer},
        {'role': 'assistant', 'content': f'It is {answer}.'},
    ]


@pytest.mark.parametrize('name', ['internlm_v1_1', 'internlm2'])
def test_from_question_to_answer(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    try:
        sandbox = Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    with sandbox, sandbox.session() as session:
        box = Toolbox([double, interpreter(session.run)])
        learned = [conversation(kind) for kind in QUESTIONS]
        work = learn_chat(tmp_path, name, 200, learned, box.declarations())
        chat = Chat(from_pretrained(work), template_for(work))
        greedy = Sampling(temperature=0, max_new_tokens=80)
        agent = Agent(
            lambda messages, tools: chat.stream(messages, greedy, tools),
            chat.template,
            box,
            max_turns=4,
        )
        for kind, (question, called, answer) in QUESTIONS.items():
            trace = agent.run([{'role': 'user', 'content': question}])
            assert trace.status == 'answer' and not trace.errors
            assert answer in trace.answer
            assert [result.text for result in trace.results] == ([answer] if called else [])
            said = [(m['role'], m['content'] or '') for m in trace.messages]
            assert said == [(m['role'], m['content']) for m in conversation(kind)]
