"""The chat templates that come with internlm_mm, as data."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_spelling import EOS, ToolFormat
from internlm_mm.utils.suggest import did_you_mean

# What InternLM's own tool puts after the last answer: the byte, not the piece that "\n" encodes to.
_ENDING = (('\n', '<0x0A>'), ('', EOS))

_REACT = """\
你可以调用外部工具。可以使用的工具：
{tools}
需要使用工具时，请按以下格式回复：
```
Thought:当前步骤要解决什么问题，是否需要使用工具
Action:工具名称，必须是 [{names}] 之一
ActionInput:工具的输入参数
```
工具按以下格式返回结果：
```
Response:调用工具的结果
```
如果已经知道答案，或者不需要工具，请按以下格式回复：
```
Thought:得出最终答案的思考过程
FinalAnswer:最终答案
```
开始！"""

_LLAMA = """\
Environment: ipython

You have access to the following functions. To call a function, respond with JSON in the format \
{"name": function name, "parameters": dictionary of argument name and its value}. \
Do not use variables.

{tools}"""

_QWEN = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


@CHAT_TEMPLATES.register_module()
def internlm(default_system: str = '') -> ChatTemplate:
    """InternLM-Chat 7B, 8k and 20B of 2023; a system's text stands as later versions put it."""
    return ChatTemplate(
        name='internlm',
        marks=('<eoh>', '<eoa>'),
        stop=('<eoa>',),
        system=('<|System|>:', '\n'),
        user=('<|User|>:', '<eoh>\n'),
        assistant=('<|Bot|>:', '<eoa>', '\n'),
        default_system=default_system,
        ending=_ENDING,
    )


@CHAT_TEMPLATES.register_module()
def internlm_v1_1(default_system: str = '', declaration: str = _REACT) -> ChatTemplate:
    """InternLM-Chat 7B v1.1: a system turn, and functions in the text protocol of ReAct.

    Args:
        default_system: Text of the system where a chat is given none.
        declaration: What tells the model of its functions, '{tools}' and '{names}'.
    """
    return ChatTemplate(
        name='internlm_v1_1',
        marks=('<eoh>', '<eoa>', '<TOKENS_UNUSED_2>'),
        stop=('<eoa>',),
        system=('<|System|>:', '<TOKENS_UNUSED_2>\n'),
        user=('<|User|>:', '<eoh>\n'),
        assistant=('<|Bot|>:', '<eoa>', '\n'),
        default_system=default_system,
        ending=_ENDING,
        tools=ToolFormat(
            declaration=declaration,
            listing='described',
            call='Action:{name}\nActionInput:{arguments}',
            parallel=False,
            code='Action:PythonInterpreter\nActionInput:```python\n{code}\n```',
            code_name='PythonInterpreter',
            thought=('Thought:', '\n'),
            answer='FinalAnswer:',
            result=('<|System|>:Response:', '\n<TOKENS_UNUSED_2>\n'),
        ),
    )


@CHAT_TEMPLATES.register_module()
def internlm2(default_system: str = '') -> ChatTemplate:
    """InternLM2 and 2.5: ChatML with functions and an interpreter of their own."""
    marks = (
        '<|plugin|>',
        '<|interpreter|>',
        '<|action_end|>',
        '<|action_start|>',
        '<|im_end|>',
        '<|im_start|>',
    )
    return ChatTemplate(
        name='internlm2',
        marks=marks,
        stop=('<|im_end|>',),
        system=('<|im_start|>system{as_name}\n', '<|im_end|>\n'),
        user=('<|im_start|>user{as_name}\n', '<|im_end|>\n'),
        assistant=('<|im_start|>assistant\n', '<|im_end|>', '\n'),
        # In SentencePiece's own file these six have no names yet.
        aliases={mark: f'[UNUSED_TOKEN_{141 + number}]' for number, mark in enumerate(marks)},
        default_system=default_system,
        tools=ToolFormat(
            declaration='{tools}',
            listing='functions',
            turn=('<|im_start|>system name=<|plugin|>\n', '<|im_end|>\n'),
            call='<|action_start|><|plugin|>\n'
            '{"name": "{name}", "parameters": {arguments}}<|action_end|>',
            code='<|action_start|><|interpreter|>\n```python\n{code}\n```<|action_end|>',
            code_turn=('<|im_start|>system name=<|interpreter|>\n', '<|im_end|>\n'),
            result=('<|im_start|>environment name=<|plugin|>\n', '<|im_end|>\n'),
            code_result=('<|im_start|>environment name=<|interpreter|>\n', '<|im_end|>\n'),
        ),
    )


@CHAT_TEMPLATES.register_module()
def internlm3(default_system: str = '') -> ChatTemplate:
    """InternLM3: InternLM2's strings, over a vocabulary that has the marks by name."""
    return dataclasses.replace(internlm2(default_system), name='internlm3', aliases={})


@CHAT_TEMPLATES.register_module()
def llama3(default_system: str = '') -> ChatTemplate:
    """Llama 3, with the functions of 3.1 and later."""
    return ChatTemplate(
        name='llama3',
        marks=('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|eom_id|>'),
        stop=('<|eot_id|>', '<|eom_id|>'),
        system=('<|start_header_id|>system<|end_header_id|>\n\n', '<|eot_id|>'),
        user=('<|start_header_id|>user<|end_header_id|>\n\n', '<|eot_id|>'),
        assistant=('<|start_header_id|>assistant<|end_header_id|>\n\n', '<|eot_id|>', ''),
        default_system=default_system,
        strip=True,
        tools=ToolFormat(
            declaration=_LLAMA,
            listing='indented',
            first=True,
            call='{"name": "{name}", "parameters": {arguments}}',
            before_call='\n',
            parallel=False,
            result=('<|start_header_id|>ipython<|end_header_id|>\n\n', '<|eot_id|>'),
        ),
    )


@CHAT_TEMPLATES.register_module()
def chatml(default_system: str = '') -> ChatTemplate:
    """ChatML as Qwen uses it, with functions in Hermes' form."""
    return ChatTemplate(
        name='chatml',
        marks=('<|im_start|>', '<|im_end|>'),
        stop=('<|im_end|>',),
        system=('<|im_start|>system\n', '<|im_end|>\n'),
        user=('<|im_start|>user\n', '<|im_end|>\n'),
        assistant=('<|im_start|>assistant\n', '<|im_end|>', '\n'),
        # Qwen's vocabularies have them, from 2.5 and 3 on.
        words=('<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>'),
        default_system=default_system,
        tools=ToolFormat(
            declaration=_QWEN,
            listing='lines',
            call='<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>',
            before_call='\n',
            between_calls='\n',
            result=('\n<tool_response>\n', '\n</tool_response>'),
            results=('<|im_start|>user', '<|im_end|>\n'),
        ),
    )


def build_template(template: str | Mapping[str, Any] | ChatTemplate) -> ChatTemplate:
    """A chat template from what names it.

    Args:
        template: A name in the registry, or 'module:function' of a package that is not imported
            yet; a dict with `type` and what differs; or the template itself.

    Raises:
        ValueError: If there is no such template.
    """
    if isinstance(template, ChatTemplate):
        return template
    config: dict[str, Any] = dict(type=template) if isinstance(template, str) else dict(template)
    name = config.get('type')
    if isinstance(name, str):
        if ':' in name:
            config['type'] = _imported(*name.split(':', 1))
        elif CHAT_TEMPLATES.get(name) is None:
            hint = did_you_mean(name, sorted(CHAT_TEMPLATES.module_dict))
            raise ValueError(f'there is no chat template {name!r}.{hint}')
    return CHAT_TEMPLATES.build(config)


def _imported(module: str, function: str) -> Callable[..., ChatTemplate]:
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'there is no chat template {module}:{function}: {error}') from error
