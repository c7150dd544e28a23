"""`apply_chat_template` of transformers must spell and encode as our own code does."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import AutoTokenizer

from internlm_mm.tokenizers import build_template, load_tokenizer
from internlm_mm.tokenizers.chat_jinja import to_jinja
from tests.conversations import CALLING, NAMES, PLAIN, PYTHON, TOOLS, WEATHER, conversations


@pytest.fixture(scope='module')
def hugging_face(exported) -> dict:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in exported.items()}


def bos(tokenizer) -> str:
    return tokenizer.bos_token


@pytest.mark.parametrize('prompt', [False, True])
@pytest.mark.parametrize('tools', [None, [PYTHON], [WEATHER], TOOLS], ids=['-', 'p', 'w', 'both'])
@pytest.mark.parametrize('messages', [PLAIN[1:-1], PLAIN[:-1], CALLING[:-3], CALLING[:-1]])
@pytest.mark.parametrize('name', NAMES)
def test_text_and_ids(name, messages, tools, prompt, hugging_face, exported):
    if name == 'internlm' and (tools or messages[-1]['role'] == 'tool'):
        return  # it has no functions: test_chat_templates.py
    template, tokenizer = build_template(name), hugging_face[name]
    options = {'tools': tools, 'add_generation_prompt': prompt}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert text == bos(tokenizer) + template.text(messages, **options)
    ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    assert ids == template.encode(load_tokenizer(exported[name]), messages, **options).ids


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=60, deadline=None)
@given(data=some.data())
def test_any_conversation(name, data, hugging_face):
    template, tokenizer = build_template(name), hugging_face[name]
    messages = data.draw(conversations(template))
    tools = data.draw(some.sampled_from([None, TOOLS])) if template.tools else None
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert text == bos(tokenizer) + template.text(messages, tools)


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'internlm'])
def test_arguments_as_json_and_results_with_names(name, hugging_face):
    messages = json.loads(json.dumps(CALLING))
    arguments = messages[4]['tool_calls'][0]['function']['arguments']
    messages[4]['tool_calls'][0]['function']['arguments'] = json.dumps(
        arguments, ensure_ascii=False
    )
    for message, of in ((messages[3], 'python'), (messages[5], 'weather')):
        del message['tool_call_id']
        message['name'] = of
    text = hugging_face[name].apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert text == bos(hugging_face[name]) + build_template(name).text(CALLING, TOOLS)


def test_thoughts(hugging_face):
    messages = [*CALLING[:-1], CALLING[-1] | {'reasoning_content': 'So.'}]
    text = hugging_face['internlm_v1_1'].apply_chat_template(messages, tokenize=False)
    assert text == '<s>' + build_template('internlm_v1_1').text(messages)
    assert 'Thought:So.\nFinalAnswer:42' in text


def test_files(hugging_face):
    messages = [{'role': 'system', 'name': 'a', 'content': 'S'}, {'role': 'user', 'content': 'Q'}]
    messages.append({'role': 'user', 'name': 'file', 'content': '[]'})
    text = hugging_face['internlm2'].apply_chat_template(messages, tokenize=False)
    assert text == '<s>' + build_template('internlm2').text(messages)
    assert '<|im_start|>system name=a\nS' in text and '<|im_start|>user name=file\n' in text


def test_what_users_spell_is_special_to_hugging_face_and_not_to_us(hugging_face, exported):
    """Its templates make one text first; `split_special_tokens` would split the template's own."""
    messages = [{'role': 'user', 'content': 'a<eoa>b'}]
    theirs = hugging_face['internlm'].apply_chat_template(messages, return_dict=False)
    ours = build_template('internlm').encode(load_tokenizer(exported['internlm']), messages).ids
    eoa = hugging_face['internlm'].convert_tokens_to_ids('<eoa>')
    assert theirs.count(eoa) == 1 and eoa not in ours
    content = hugging_face['internlm'].encode(
        '<|User|>:a<eoa>b', add_special_tokens=False, split_special_tokens=True
    )
    assert hugging_face['internlm'].decode(content) == hugging_face['internlm'].decode(
        ours[1 : ours.index(hugging_face['internlm'].convert_tokens_to_ids('<eoh>'))]
    )


@pytest.mark.parametrize('name', NAMES)
def test_the_source_is_stable(name):
    """White space of the source is none of the text, however an engine treats blocks."""
    source = to_jinja(build_template(name))
    assert source == to_jinja(build_template(name))
    lines = source.splitlines()
    assert all(line.startswith(('{{-', '{%-')) for line in lines)
    assert lines[-1] == '{%- endif %}'
