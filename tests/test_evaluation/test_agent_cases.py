"""Rows of questions for agents, and those that are none."""

import pytest

from internlm_mm.evaluation.agent_cases import read_agent_case
from tests.conversations import CALLING, PLAIN


def test_questions_and_records() -> None:
    (case,) = read_agent_case({'question': ' 1 + 1? ', 'answer': 2, 'subject': 'sums'})
    assert case.messages == [{'role': 'user', 'content': '1 + 1?'}]
    assert (case.answer, case.needs_tool, case.tools, case.subject) == ('2', True, None, 'sums')
    (case,) = read_agent_case({'messages': CALLING, 'answer': '42'})
    assert case.messages == CALLING[:2] and case.needs_tool
    (case,) = read_agent_case({'messages': PLAIN, 'answer': '好', 'tools': ['f']})
    assert case.messages == PLAIN[:4] and not case.needs_tool and case.tools == ('f',)
    (case,) = read_agent_case({'messages': PLAIN, 'answer': '好', 'needs_tool': True})
    assert case.needs_tool
    (case,) = read_agent_case({'messages': PLAIN[:2], 'answer': 'x'})
    assert case.needs_tool  # nothing says that it takes none
    tools = [{'type': 'function', 'function': {'name': 'g'}}]
    (case,) = read_agent_case({'question': 'x', 'answer': 'y', 'tools': tools})
    assert case.tools == ('g',)


@pytest.mark.parametrize(
    ('row', 'words'),
    [
        ([], 'an object with named fields'),
        ({'question': 'x'}, "'answer' is missing"),
        ({'question': 'x', 'answer': ['1']}, 'answer: a text'),
        ({'qustion': 'x', 'answer': '1'}, "'question' is missing. Did you mean 'qustion'?"),
        ({'messages': PLAIN[:1], 'answer': '1'}, 'nothing is asked'),
        ({'question': 'x', 'answer': '1', 'needs_tool': 'no'}, 'needs_tool: true or false'),
        ({'question': 'x', 'answer': '1', 'tools': 'f'}, 'tools: a list of names'),
        ({'question': 'x', 'answer': '1', 'tools': [3]}, 'tools[0]: a text'),
    ],
)
def test_what_is_none(row, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        list(read_agent_case(row))
    assert words in str(refused.value)
