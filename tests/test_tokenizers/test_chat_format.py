"""From conversations to tokens: where the loss is, what is special, and what follows what."""

import pytest
import tokenizers as tokenizers_library
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken
from transformers import AutoTokenizer

from internlm_mm.tokenizers import Tokenizer, build_template, load_tokenizer, read_answer_ids
from internlm_mm.tokenizers.chat_export import write_chat_template
from tests.conversations import (
    CALLING,
    NAMES,
    PLAIN,
    TOOLS,
    UNUSED,
    byte_level,
    conversations,
)
from tests.trained import train_tokenizer

WITH_TOOLS = [name for name in NAMES if name != 'internlm']


@pytest.fixture(scope='module')
def tokenizers(exported, internlm_vocabulary, byte_vocabulary) -> dict[str, list[Tokenizer]]:
    """For each template the tokenizers that have its marks."""
    own = {'internlm': internlm_vocabulary, 'internlm_v1_1': internlm_vocabulary}
    own |= {'internlm2': internlm_vocabulary, 'chatml': byte_vocabulary, 'llama3': byte_vocabulary}
    return {
        name: [load_tokenizer(exported[name]), *([own[name]] if name in own else [])]
        for name in NAMES
    }


@pytest.mark.parametrize('name', NAMES)
def test_marks_are_single_tokens(name, tokenizers):
    template = build_template(name)
    for tokenizer in tokenizers[name]:
        ids = [template.token_id(tokenizer, mark) for mark in template.marks]
        if name == 'internlm3':  # the vocabulary of the test has InternLM2's names only
            continue
        assert None not in ids and len(set(ids)) == len(ids)
        encoded = template.encode(tokenizer, PLAIN)
        assert encoded.ids[0] == tokenizer.bos_id
        expected = sum(
            segment.token in template.marks and segment.token is not None
            for segment in template.segments(PLAIN)
        )
        assert sum(index in ids for index in encoded.ids) == expected > 3


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'internlm3'])
@settings(max_examples=25, deadline=None)
@given(data=some.data())
def test_nothing_that_is_written_becomes_special(name, data, tokenizers):
    """Users, functions and answers may spell what they like; only the template makes marks."""
    template = build_template(name)
    messages = data.draw(conversations(template))
    segments = template.segments(messages)
    for tokenizer in tokenizers[name]:
        special = {template.token_id(tokenizer, mark) for mark in template.marks}
        special |= {template.token_id(tokenizer, word) for word in template.words} - {None}
        special |= {tokenizer.bos_id, tokenizer.eos_id}
        encoded = template.encode_segments(tokenizer, segments)
        made = [index for index in encoded.ids if index in special]
        meant = [
            tokenizer.bos_id if segment.text == '' else template.token_id(tokenizer, segment.token)
            for segment in segments
            if segment.token is not None and segment.token not in template.words
        ]
        assert made == meant


@pytest.fixture(scope='module')
def qwen(tmp_path_factory) -> Tokenizer:
    """A vocabulary that has the words of calls as tokens that are none of the special ones."""
    folder = tmp_path_factory.mktemp('qwen')
    file = str(byte_level(folder).path / 'tokenizer.json')
    content = tokenizers_library.Tokenizer.from_file(file)
    content.add_tokens([AddedToken(word, special=False) for word in build_template('chatml').words])
    content.save(file)
    return load_tokenizer(folder)


@settings(max_examples=25, deadline=None)
@given(data=some.data())
def test_words_of_calls_are_tokens_where_the_template_has_them_alone(data, qwen):
    template = build_template('chatml')
    messages = data.draw(conversations(template))
    messages[-1]['content'] += ''.join(template.words)
    assert None not in [qwen.token_id(word) for word in template.words]
    segments = template.segments(messages, TOOLS)
    special = {template.token_id(qwen, one) for one in (*template.marks, *template.words)}
    made = [i for i in template.encode_segments(qwen, segments).ids if i in special]
    assert made == [template.token_id(qwen, s.token) for s in segments[1:] if s.token is not None]
    assert any(segment.token == '<tool_call>' for segment in segments)  # of the declaration


def test_words_of_calls_as_hugging_face_encodes_them(qwen):
    write_chat_template(qwen.path, build_template('chatml'))
    theirs = AutoTokenizer.from_pretrained(qwen.path)
    ids = theirs.apply_chat_template(CALLING, tools=TOOLS, return_dict=False)
    assert ids == build_template('chatml').encode(qwen, CALLING, TOOLS).ids
    assert (
        ids.count(theirs.convert_tokens_to_ids('<tool_call>')) == 4
    )  # two calls, and of the prompt
    kept = theirs.decode(ids, skip_special_tokens=True)
    assert '<tool_call>' in kept and '<|im_start|>' not in kept


def test_an_answer_that_speaks_of_calls_is_told_from_one(qwen):
    template = build_template('chatml')
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    message = {'role': 'assistant', 'content': text, 'tool_calls': CALLING[2]['tool_calls']}
    encoded = template.encode(qwen, [CALLING[1], message])
    ids = [index for index, loss in zip(*encoded, strict=True) if loss]
    answer = read_answer_ids(template, qwen, ids)
    assert answer.content == text and [one.name for one in answer.calls] == ['python']


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=25, deadline=None)
@given(data=some.data())
def test_tokens_decode_to_the_text(name, data, tokenizers):
    template = build_template(name)
    messages = data.draw(conversations(template))
    tokenizer = tokenizers[name][0]
    encoded = template.encode(tokenizer, messages, add_bos=False)
    assert tokenizer.decode(encoded.ids) == template.text(messages)
    assert len(encoded.ids) == len(encoded.loss_mask)


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=25, deadline=None)
@given(data=some.data())
def test_answers_follow_in_training_what_they_follow_in_use(name, data, tokenizers):
    """The prompt of each answer is a prefix of the training row, and the loss begins behind it."""
    template = build_template(name)
    messages = data.draw(conversations(template))
    tools = None if template.tools is None else TOOLS
    for tokenizer in tokenizers[name]:
        row = template.encode(tokenizer, messages, tools)
        trained = [False] * len(row.ids)
        for index, message in enumerate(messages):
            if message['role'] != 'assistant':
                continue
            history = messages[:index]
            before = template.encode(tokenizer, history, tools, add_generation_prompt=True).ids
            assert row.ids[: len(before)] == before
            assert not row.loss_mask[len(before) - 1]
            stop = [*row.loss_mask, False].index(False, len(before))
            assert stop > len(before)
            trained[len(before) : stop] = [True] * (stop - len(before))
            end = template.token_id(tokenizer, template.stop[0])
            assert end is None or row.ids[stop - 1] == end
        assert row.loss_mask == trained


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_calls_are_trained_and_results_are_not(name, tokenizers):
    template = build_template(name)
    tokenizer = tokenizers[name][0]
    encoded = template.encode(tokenizer, CALLING, TOOLS)
    pairs = list(zip(*encoded, strict=True))
    trained = tokenizer.decode([index for index, loss in pairs if loss])
    rest = tokenizer.decode([index for index, loss in pairs if not loss])
    for word in ('I compute.', 'print(6 * 7)', '上海', '42 and blue'):
        assert word in trained and word not in rest
    for word in ('6 * 7? And', '{"sky": "blue"}', 'Runs Python.'):
        assert word in rest and word not in trained


def test_the_end_of_a_sample_of_internlm(internlm_vocabulary):
    """`<eoa>`, the byte of a line end and eos, all learned; a prompt's line ends are pieces."""
    template = build_template('internlm')
    plain = template.encode(internlm_vocabulary, PLAIN)
    ended = template.encode(internlm_vocabulary, PLAIN, add_ending=True)
    byte = internlm_vocabulary.token_id('<0x0A>')  # 13 where bytes come before added pieces
    assert internlm_vocabulary.decode([byte]) == '\n'
    eoa = internlm_vocabulary.token_id('<eoa>')
    assert ended.ids[-3:] == [eoa, byte, 2] and ended.loss_mask[-3:] == [True, True, True]
    line = internlm_vocabulary.encode('\n')
    assert plain.ids[-len(line) :] == line and not plain.loss_mask[-1]
    assert ended.ids[:-2] == plain.ids[: -len(line)]
    untrained = [*PLAIN[:-1], PLAIN[-1] | {'loss': False}]
    assert (
        template.encode(internlm_vocabulary, untrained, add_ending=True).loss_mask[-3:]
        == [False] * 3
    )
    for name in NAMES:
        if not name.startswith('internlm_') and name != 'internlm':
            template = build_template(name)
            assert template.segments(PLAIN, add_ending=True) == template.segments(PLAIN)


def test_ids_are_looked_up_and_never_assumed(internlm_vocabulary):
    """InternLM's own tool had the last two ids of the vocabulary written in it."""
    ids = [internlm_vocabulary.token_id(piece) for piece in ('<eoh>', '<eoa>')]
    assert [internlm_vocabulary.decode([index]) for index in ids] == ['<eoh>', '<eoa>']
    encoded = build_template('internlm').encode(internlm_vocabulary, PLAIN)
    assert [index for index in encoded.ids if index in ids] == ids * 2


def test_names_of_before_in_sentencepiece(internlm_vocabulary):
    """InternLM2's marks have no names in its .model file."""
    template = build_template('internlm2')
    assert internlm_vocabulary.token_id('<|im_start|>') is None
    start = internlm_vocabulary.token_id('[UNUSED_TOKEN_146]')
    end = internlm_vocabulary.token_id('[UNUSED_TOKEN_145]')
    assert template.encode(internlm_vocabulary, PLAIN).ids[1] == start
    assert template.stops(internlm_vocabulary) == ((end,), ())
    typed = [{'role': 'user', 'content': ' '.join(UNUSED)}]
    ids = template.encode(internlm_vocabulary, typed).ids
    assert ids.count(start) == ids.count(end) == 1


def test_without_marks_it_is_all_text(tmp_path):
    tokenizer = train_tokenizer(tmp_path)
    for name in NAMES:
        template = build_template(name)
        assert template.stops(tokenizer) == ((), template.stop)
        encoded = template.encode(tokenizer, PLAIN)
        assert tokenizer.decode(encoded.ids) == template.text(PLAIN)
        trained = [i for i, loss in zip(*encoded, strict=True) if loss]
        stop = template.stop[0]
        assert tokenizer.decode(trained) == f'Hello\nyou{stop}好{stop}'


def test_bos_may_be_left_out(internlm_vocabulary):
    template = build_template('internlm')
    with_bos = template.encode(internlm_vocabulary, PLAIN)
    without = template.encode(internlm_vocabulary, PLAIN, add_bos=False)
    assert with_bos.ids == [1, *without.ids] and with_bos.loss_mask == [False, *without.loss_mask]


def test_nothing_to_answer():
    with pytest.raises(ValueError, match="row 3, the last message is of 'assistant'"):
        build_template('chatml').segments(PLAIN, add_generation_prompt=True, where='row 3')
