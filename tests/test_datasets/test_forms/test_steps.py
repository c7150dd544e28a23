import time

import pytest

from internlm_mm.datasets.forms.steps import Step, read_step, step_message, write_step


@pytest.mark.parametrize(
    ('text', 'step'),
    [
        ('Thought: a\nAction: f\nAction Input: {}', Step('a', 'f', '{}')),
        ('\nThought: a\nb\nAction: f\nAction Input: {\n}\n', Step('a\nb', 'f', '{\n}')),
        ('Thought:\nAction:f\nAction Input:', Step('', 'f', '')),
        ('Action: f\nAction Input: x', Step('', 'f', 'x')),
        ('Thought: a\nAction: \nAction Input: x', None),
        ('Thought: a\nFinal Answer: x', None),
        ('An Action: f\nAction Input: x', None),
    ],
)
def test_steps(text, step):
    assert read_step(text) == step


@pytest.mark.parametrize(
    'text',
    [
        'Thought: ' + '\n' * 50_000,
        'Thought: ' + 'Action: f\n \n' * 20_000,
        'a b\n' * 50_000 + 'Action:',
    ],
)
def test_long_texts_take_no_time(text):
    start = time.monotonic()
    assert read_step(text) is None
    assert time.monotonic() - start < 5  # some hundredths; patterns took hours


def test_messages():
    message = step_message(Step('why', 'f', "{'x': True}"), 'here')
    assert message['tool_calls'][0]['function'] == {'name': 'f', 'arguments': {'x': True}}
    assert write_step(message, 0) == 'Thought: why\nAction: f\nAction Input: {"x": true}'
    with pytest.raises(ValueError, match='here, Action Input: neither JSON'):
        step_message(Step('', 'f', 'x'), 'here')
