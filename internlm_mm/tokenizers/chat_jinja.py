"""The chat template of Hugging Face's tokenizers: the same spelling, said in Jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping

from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_messages import CODE_TOOL, IMAGE
from internlm_mm.tokenizers.chat_spelling import ToolFormat, split_fields

_CODE = json.dumps(CODE_TOOL)
# Of each listing: an entry, what is between two, and what is around all.
_LISTINGS = {
    'functions': ('f | tojson', ', ', ('[', ']')),
    'lines': ('tool | tojson', '\n', ('', '')),
    'indented': ('tool | tojson(indent=4)', '\n\n', ('', '')),
    'described': (
        "title + ': ' + (f.description or '')"
        " + (' ' + (f.parameters | tojson) if f.parameters else '')",
        '\n',
        ('', ''),
    ),
}
# The text of a content, whatever it is made of.
_TEXT_OF = (
    '{%- macro text_of(content) %}',
    '{%- if content is string %}',
    '{{- content }}',
    '{%- else %}',
    '{%- for part in content or [] %}',
    "{%- if part.type == 'image_url' %}",
    f"{{{{- ('' if loop.first else '\\n') + {json.dumps(IMAGE)} }}}}",
    '{%- else %}',
    '{{- part.text }}',
    '{%- endif %}',
    '{%- endfor %}',
    '{%- endif %}',
    '{%- endmacro %}',
)
_ARGUMENTS = '(f.arguments if f.arguments is string else f.arguments | tojson)'


def to_jinja(template: ChatTemplate) -> str:
    """What `apply_chat_template` needs to spell a conversation as `template` does.

    Contents are texts, or lists of texts and images; `arguments` of a call that are a string are
    taken as they are, and a program for an interpreter must come in a dict. Nothing is looked
    over: servers do that.
    """
    content = 'text_of(message.content)' + (' | trim' if template.strip else '')
    lines = [
        *_TEXT_OF,
        '{{- bos_token }}',
        '{%- set ns = namespace(system="", name="", listed="", names="", uses=false, tool="") %}',
        "{%- if messages[0].role == 'system' %}",
        '{%- set message = messages[0] %}',
        f'{{%- set ns.system = {content} %}}',
        "{%- set ns.name = message.name or '' %}",
        '{%- endif %}',
        *(_declaration(template.tools) if template.tools else ()),
        '{%- if ns.system %}',
        _put(
            ''.join((template.system[0], '{arguments}', template.system[1])),
            {'arguments': 'ns.system', 'as_name': _as_name('ns.name')},
        ),
        '{%- endif %}',
        *(_turns_of_tools(template.tools) if template.tools else ()),
        '{%- for message in messages %}',
        f'{{%- set content = {content} %}}',
        "{%- if message.role == 'user' %}",
        _put(
            ''.join((template.user[0], '{arguments}', template.user[1])),
            {'arguments': 'content', 'as_name': _as_name('message.name')},
        ),
        "{%- elif message.role == 'assistant' %}",
        _put(template.assistant[0]),
        *(_answer(template.tools) if template.tools else ('{{- content }}',)),
        _put(template.assistant[1] + template.assistant[2]),
        *(_result(template.tools) if template.tools else ()),
        '{%- endif %}',
        '{%- endfor %}',
        '{%- if add_generation_prompt %}',
        _put(template.assistant[0]),
        '{%- endif %}',
    ]
    return '\n'.join(line for line in lines if line) + '\n'


def _declaration(form: ToolFormat) -> list[str]:
    """Lists the functions, and puts the list into the system's text unless it has its own turn."""
    entry, between, around = _LISTINGS[form.listing]
    listed = f'{_text(around[0])} + ns.listed + {_text(around[1])}'
    values = {'tools': listed, 'names': 'ns.names'}
    parts = ['declared', 'ns.system'] if form.first else ['ns.system', 'declared']
    joins = [
        '{%- if ns.names %}',
        f'{{%- set declared = {_expression(form.declaration, values)} %}}',
        '{%- if ns.system %}',
        f'{{%- set ns.system = {parts[0]} + "\\n\\n" + {parts[1]} %}}',
        '{%- else %}',
        '{%- set ns.system = declared %}',
        '{%- endif %}',
        '{%- endif %}',
    ]
    apart = form.code_turn is not None
    return [
        '{%- for tool in tools or [] %}',
        '{%- set f = tool.function %}',
        '{%- set ns.uses = true %}',
        f'{{%- if f.name != {_CODE} %}}' if apart else '',
        f'{{%- set title = {_text(form.code_name)} if f.name == {_CODE} else f.name %}}',
        f'{{%- set ns.listed = ns.listed + ({_text(between)} if ns.names else "") + ({entry}) %}}',
        '{%- set ns.names = ns.names + (", " if ns.names else "") + title %}',
        '{%- endif %}' if apart else '',
        '{%- endfor %}',
        *(() if form.turn else joins),
        '{%- for message in messages %}',
        '{%- if message.tool_calls %}{%- set ns.uses = true %}{%- endif %}',
        '{%- endfor %}',
    ]


def _turns_of_tools(form: ToolFormat) -> list[str]:
    lines = []
    if form.code_turn is not None:
        lines += [
            '{%- for tool in tools or [] %}',
            f'{{%- if tool.function.name == {_CODE} %}}',
            _put(
                ''.join((form.code_turn[0], '{arguments}', form.code_turn[1])),
                {'arguments': "(tool.function.description or '')"},
            ),
            '{%- endif %}',
            '{%- endfor %}',
        ]
    if form.turn is not None:
        around = _LISTINGS[form.listing][2]
        listed = f'{_text(around[0])} + ns.listed + {_text(around[1])}'
        lines += [
            '{%- if ns.names %}',
            _put(
                ''.join((form.turn[0], form.declaration, form.turn[1])),
                {'tools': listed, 'names': 'ns.names'},
            ),
            '{%- endif %}',
        ]
    return lines


def _answer(form: ToolFormat) -> list[str]:
    before, after = form.thought or ('', '')
    thought = _put(before + '{arguments}' + after, {'arguments': 'content'})
    reasoning = _put(before + '{arguments}' + after, {'arguments': 'message.reasoning_content'})
    call = _put(form.call, {'name': 'f.name', 'arguments': _ARGUMENTS})
    if form.code is not None:
        code = _put(form.code, {'code': 'f.arguments.code'})
        call = f'{{%- if f.name == {_CODE} %}}\n{code}\n{{%- else %}}\n{call}\n{{%- endif %}}'
    return [
        *(
            ('{%- if message.reasoning_content %}', reasoning, '{%- endif %}')
            if form.thought
            else ()
        ),
        '{%- if message.tool_calls %}',
        '{%- if content %}',
        thought,
        _put(form.before_call),
        '{%- endif %}',
        '{%- for item in message.tool_calls %}',
        '{%- set f = item.function %}',
        '{%- set ns.tool = f.name %}',
        *(
            ('{%- if not loop.first %}', _put(form.between_calls), '{%- endif %}')
            if form.between_calls
            else ()
        ),
        call,
        '{%- endfor %}',
        '{%- else %}',
        *(('{%- if ns.uses %}', _put(form.answer), '{%- endif %}') if form.answer else ()),
        '{{- content }}',
        '{%- endif %}',
    ]


def _result(form: ToolFormat) -> list[str]:
    values = {'arguments': 'content'}
    result = _put(''.join((form.result[0], '{arguments}', form.result[1])), values)
    lines = ["{%- elif message.role == 'tool' %}"]
    if form.code_result is not None:
        code = _put(''.join((form.code_result[0], '{arguments}', form.code_result[1])), values)
        lines += [
            '{%- if message.name %}',
            '{%- set ns.tool = message.name %}',
            '{%- elif message.tool_call_id %}',
            '{%- for other in messages %}',
            '{%- for item in other.tool_calls or [] %}',
            '{%- if item.id == message.tool_call_id %}',
            '{%- set ns.tool = item.function.name %}',
            '{%- endif %}',
            '{%- endfor %}',
            '{%- endfor %}',
            '{%- endif %}',
        ]
        result = f'{{%- if ns.tool == {_CODE} %}}\n{code}\n{{%- else %}}\n{result}\n{{%- endif %}}'
    if form.results[0]:
        first = "{%- if messages[loop.index0 - 1].role != 'tool' %}"
        lines += [first, _put(form.results[0]), '{%- endif %}']
    lines.append(result)
    if form.results[1]:
        last = "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
        lines += [last, _put(form.results[1]), '{%- endif %}']
    return lines


def _put(spelling: str, values: Mapping[str, str] | None = None) -> str:
    """Writes a string of the template, its fields as expressions; nothing for an empty one."""
    return f'{{{{- {_expression(spelling, values or {})} }}}}' if spelling else ''


def _expression(spelling: str, values: Mapping[str, str]) -> str:
    parts = [values[key] if key else _text(text) for text, key in split_fields(spelling)]
    return ' + '.join(parts)


def _as_name(name: str) -> str:
    return f"(' name=' + {name} if {name} else '')"


def _text(text: str) -> str:
    """A string as Jinja's grammar spells it."""
    return json.dumps(text, ensure_ascii=False)
