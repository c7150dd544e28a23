"""Each template against what its models are documented to have been trained on."""

import re

import pytest

from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.chat_spelling import BOS
from tests.conversations import CALLING, NAMES, PLAIN, PYTHON, TOOLS, WEATHER, call
from tests.runs import REPOSITORY

FUNCTION = (
    '{"name": "weather", "description": "The \\"weather\\" of a city", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}'
)
SPELT = {
    'internlm': (
        '<|System|>:Be brief.\n<|User|>:Hi<eoh>\n<|Bot|>:Hello\nyou<eoa>\n'
        '<|User|>:你好?<eoh>\n<|Bot|>:好<eoa>\n'
    ),
    'internlm_v1_1': (
        '<|System|>:Be brief.<TOKENS_UNUSED_2>\n<|User|>:Hi<eoh>\n<|Bot|>:Hello\nyou<eoa>\n'
        '<|User|>:你好?<eoh>\n<|Bot|>:好<eoa>\n'
    ),
    'internlm2': (
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
        '<|im_start|>assistant\nHello\nyou<|im_end|>\n<|im_start|>user\n你好?<|im_end|>\n'
        '<|im_start|>assistant\n好<|im_end|>\n'
    ),
    'llama3': (
        '<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\nHello\nyou<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\n你好?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n好<|eot_id|>'
    ),
}
SPELT['chatml'] = SPELT['internlm3'] = SPELT['internlm2']


@pytest.mark.parametrize('name', NAMES)
def test_turns(name):
    assert build_template(name).text(PLAIN) == SPELT[name]


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_is_on_answers_and_what_ends_them(name):
    template = build_template(name)
    segments = template.segments(PLAIN)
    trained = ''.join(segment.text for segment in segments if segment.trained)
    assert trained == f'Hello\nyou{template.stop[0]}好{template.stop[0]}'
    assert segments[0].token == BOS
    silent = [*PLAIN[:2], PLAIN[2] | {'loss': False}, *PLAIN[3:]]
    trained = ''.join(segment.text for segment in template.segments(silent) if segment.trained)
    assert trained == f'好{template.stop[0]}'
    assert template.text(silent) == template.text(PLAIN)


@pytest.mark.parametrize('name', ['internlm2', 'internlm3'])
def test_internlm2_calls(name):
    assert build_template(name).text(CALLING, TOOLS) == (
        '<|im_start|>system\nBe brief.<|im_end|>\n'
        '<|im_start|>system name=<|interpreter|>\nRuns Python.<|im_end|>\n'
        f'<|im_start|>system name=<|plugin|>\n[{FUNCTION}]<|im_end|>\n'
        '<|im_start|>user\n6 * 7? And the weather?<|im_end|>\n'
        '<|im_start|>assistant\nI compute.<|action_start|><|interpreter|>\n'
        '```python\nprint(6 * 7)\n```<|action_end|><|im_end|>\n'
        '<|im_start|>environment name=<|interpreter|>\n42<|im_end|>\n'
        '<|im_start|>assistant\n<|action_start|><|plugin|>\n'
        '{"name": "weather", "parameters": {"city": "上海", "days": [1, null]}}'
        '<|action_end|><|im_end|>\n'
        '<|im_start|>environment name=<|plugin|>\n{"sky": "blue"}<|im_end|>\n'
        '<|im_start|>assistant\n42 and blue<|im_end|>\n'
    )


def test_internlm2_files():
    file = {'role': 'user', 'name': 'file', 'content': '[{"path": "a.csv", "size": "1K"}]'}
    text = build_template('internlm2').text([{'role': 'user', 'content': 'Look'}, file])
    assert text == (
        '<|im_start|>user\nLook<|im_end|>\n'
        '<|im_start|>user name=file\n[{"path": "a.csv", "size": "1K"}]<|im_end|>\n'
    )


def test_v1_1_calls():
    template = CHAT_TEMPLATES.build(
        {'type': 'internlm_v1_1', 'declaration': 'Tools:\n{tools}\nUse [{names}].'}
    )
    last = CALLING[-1] | {'reasoning_content': 'I know both.'}
    assert template.text([*CALLING[:-1], last], TOOLS) == (
        '<|System|>:Be brief.\n\nTools:\nPythonInterpreter: Runs Python.\n'
        'weather: The "weather" of a city '
        '{"type": "object", "properties": {"city": {"type": "string"}}}\n'
        'Use [PythonInterpreter, weather].<TOKENS_UNUSED_2>\n'
        '<|User|>:6 * 7? And the weather?<eoh>\n'
        '<|Bot|>:Thought:I compute.\nAction:PythonInterpreter\n'
        'ActionInput:```python\nprint(6 * 7)\n```<eoa>\n'
        '<|System|>:Response:42\n<TOKENS_UNUSED_2>\n'
        '<|Bot|>:Action:weather\nActionInput:{"city": "上海", "days": [1, null]}<eoa>\n'
        '<|System|>:Response:{"sky": "blue"}\n<TOKENS_UNUSED_2>\n'
        '<|Bot|>:Thought:I know both.\nFinalAnswer:42 and blue<eoa>\n'
    )
    trained = [s.text for s in template.segments(CALLING, TOOLS) if s.trained]
    assert ''.join(trained) == (
        'Thought:I compute.\nAction:PythonInterpreter\n'
        'ActionInput:```python\nprint(6 * 7)\n```<eoa>'
        'Action:weather\nActionInput:{"city": "上海", "days": [1, null]}<eoa>'
        'FinalAnswer:42 and blue<eoa>'
    )


def test_the_protocol_of_v1_1_is_told_to_the_model():
    text = build_template('internlm_v1_1').text(CALLING[:2], TOOLS)
    for word in ('Thought:', 'Action:', 'ActionInput:', 'Response:', 'FinalAnswer:', '[Python'):
        assert word in text


def test_chatml_calls():
    calls = [call('weather', {'city': 'a'}, '1'), call('python', {'code': 'b'}, '2')]
    messages = [
        {'role': 'user', 'content': 'Q'},
        {'role': 'assistant', 'content': 'T', 'tool_calls': calls},
        {'role': 'tool', 'tool_call_id': '1', 'content': 'r1'},
        {'role': 'tool', 'tool_call_id': '2', 'content': 'r2'},
    ]
    text = build_template('chatml').text(messages, [WEATHER], add_generation_prompt=True)
    head, _, rest = text.partition('<|im_start|>user')
    assert head.startswith('<|im_start|>system\n# Tools\n\n') and head.endswith('<|im_end|>\n')
    assert f'<tools>\n{{"type": "function", "function": {FUNCTION}}}\n</tools>' in head
    assert rest == (
        '\nQ<|im_end|>\n<|im_start|>assistant\nT\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "python", "arguments": {"code": "b"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\nr1\n</tool_response>'
        '\n<tool_response>\nr2\n</tool_response><|im_end|>\n'
        '<|im_start|>assistant\n'
    )


def test_llama3_calls_and_strips():
    messages = [
        {'role': 'system', 'content': 'S'},
        {'role': 'user', 'content': ' Q\n'},
        {'role': 'assistant', 'content': '', 'tool_calls': [call('weather', {'city': 'a'}, '1')]},
        {'role': 'tool', 'content': 'r'},
    ]
    text = build_template('llama3').text(messages, [WEATHER], add_generation_prompt=True)
    head, _, rest = text.partition('<|eot_id|>')
    assert head.startswith('<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython')
    assert head.endswith('}\n\nS') and '    "type": "function",\n' in head
    assert rest == (
        '<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
        '{"name": "weather", "parameters": {"city": "a"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\nr<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
    )


def test_what_a_template_cannot_spell():
    user = {'role': 'user', 'content': 'Q'}
    two = [call('f', {}, '1'), call('f', {}, '2')]
    for name, messages, tools, error in [
        ('internlm', [user], [PYTHON], "x, 'internlm' spells no functions"),
        ('internlm', CALLING, None, "x, message 2: 'internlm' spells no functions"),
        ('llama3', [user, {'role': 'assistant', 'tool_calls': two}], None, 'spells one call a'),
        ('chatml', [user | {'name': 'file'}], None, "x, message 0: 'chatml' has no place for"),
        ('chatml', [{'role': 'system', 'content': '', 'name': 'a'}, user], None, 'no place for'),
        (
            'internlm2',
            [user, {'role': 'assistant', 'content': '', 'reasoning_content': 'r'}],
            None,
            "x, message 1: 'internlm2' has no place for reasoning_content",
        ),
    ]:
        with pytest.raises(ValueError, match=error):
            build_template(name).segments(messages, tools, where='x')


def test_build_template():
    template = build_template({'type': 'internlm2', 'default_system': 'You are a tester.'})
    assert template.default_system == 'You are a tester.'
    assert build_template(template) is template
    with pytest.raises(ValueError, match=r"no chat template 'intern2'.*mean 'internlm2'"):
        build_template('intern2')


def test_a_template_of_ones_own(write, monkeypatch):
    """The one in the documentation."""
    page = (REPOSITORY / 'docs' / 'en' / 'chat.md').read_text(encoding='utf-8')
    (source,) = re.findall(r'```python\n# my_templates.py\n(.*?)```', page, re.S)
    monkeypatch.syspath_prepend(write('my_templates.py', source).parent)
    template = build_template('my_templates:dashes')
    assert template.text(PLAIN[1:]) == 'USER: Hi\nBOT: Hello\nyou\n---\nUSER: 你好?\nBOT: 好\n---\n'
    assert build_template('dashes') == template
    CHAT_TEMPLATES.module_dict.pop('dashes')
    with pytest.raises(ValueError, match='my_templates:dash: module'):
        build_template('my_templates:dash')
    with pytest.raises(ValueError, match='no_templates:dashes: No module'):
        build_template('no_templates:dashes')


def test_what_tools_are_called_does_not_fill_fields():
    """Values that spell a field of the template stay as they are."""
    tool = {'type': 'function', 'function': {'name': 'f', 'description': '{names} {tools}'}}
    messages = [{'role': 'user', 'content': '{arguments}'}]
    text = build_template('internlm_v1_1').text(messages, [tool])
    assert 'f: {names} {tools}' in text and '[f]' in text and '<|User|>:{arguments}<eoh>' in text
