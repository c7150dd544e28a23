"""`apply_chat_template` of transformers must spell and encode as our own code does."""

import json
import re
from functools import reduce
from itertools import accumulate

import pytest
import sentencepiece as spm
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


def without_marks(conversation: some.SearchStrategy[list]) -> some.SearchStrategy[list]:
    """Texts that spell no special token: those are plain for us, and special to Hugging Face."""
    changes = (('<', '('), ('UNUSED', 'USED'))
    return conversation.map(
        lambda messages: json.loads(
            reduce(lambda text, change: text.replace(*change), changes, json.dumps(messages))
        )
    )


def cut_at_answers(text, prefix_of, messages, stop) -> list[tuple[str, bool]]:
    """A conversation's text in pieces, each with whether the model writes it.

    Args:
        text: The whole.
        prefix_of: Text of the first messages, with or without the beginning of an answer.
        messages: All of them.
        stop: Ends answers.
    """
    pieces, done = [], 0
    for index, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        start = len(prefix_of(messages[:index], True))
        end = prefix_of(messages[: index + 1], False).rindex(stop) + len(stop)
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [*pieces, (text[done:], False)]


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=20, deadline=None)
@given(data=some.data())
def test_ids_are_those_of_prompts_and_answers(name, data, hugging_face, exported):
    """encode(prompt) + encode(answer) + ..., and `apply_chat_template`'s where nothing merges."""
    template, tokenizer = build_template(name), hugging_face[name]
    messages = data.draw(without_marks(conversations(template)))
    tools = TOOLS if template.tools else None

    def spell(messages: list, prompt: bool, tokenize: bool = False):
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=tokenize,
            return_dict=False,
        )  # fmt: skip

    text = spell(messages, False)
    pieces = cut_at_answers(text, spell, messages, template.stop[0])
    assert ''.join(piece for piece, _ in pieces) == text
    coded = [(tokenizer.encode(piece, add_special_tokens=False), own) for piece, own in pieces]
    ours = template.encode(load_tokenizer(exported[name]), messages, tools)
    assert ours.ids == [index for ids, _ in coded for index in ids]
    assert ours.loss_mask == [own for ids, own in coded for _ in ids]
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert whole['input_ids'] == spell(messages, False, True)
    cuts = set(accumulate(len(piece) for piece, _ in pieces)) - {len(text)}
    if cuts <= {start for start, _ in whole['offset_mapping']}:  # no token lies across a cut
        assert ours.ids == whole['input_ids']


@pytest.mark.parametrize('name', ['internlm', 'internlm_v1_1', 'internlm2'])
@settings(max_examples=20, deadline=None)
@given(data=some.data())
def test_ids_of_sentencepiece(name, data, hugging_face, internlm_vocabulary):
    """The same over a .model file, where some marks have another name or none."""
    template = build_template(name)
    messages = data.draw(without_marks(conversations(template)))
    tools = TOOLS if template.tools else None
    pieces = spm.SentencePieceProcessor(model_file=str(internlm_vocabulary.path))

    def spell(messages: list, prompt: bool) -> str:
        text = hugging_face[name].apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        return text.removeprefix('<s>')

    ids, mask = [pieces.bos_id()], [False]
    for piece, own in cut_at_answers(spell(messages, False), spell, messages, template.stop[0]):
        for part in re.split(f'({"|".join(map(re.escape, template.marks))})', piece):
            if part in template.marks:
                new = [pieces.piece_to_id(template.aliases.get(part, part))]
            else:
                new = pieces.encode(part)
            ids += new
            mask += [own] * len(new)
    assert template.encode(internlm_vocabulary, messages, tools) == (ids, mask)
