"""What an exported tokenizer's folder says of its chat template."""

import json

import pytest
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from internlm_mm.checkpoint.huggingface import write_tokenizer
from internlm_mm.tokenizers import build_template, load_tokenizer
from internlm_mm.tokenizers.chat_export import JINJA_NAME, NAME_KEY, same_template
from internlm_mm.tokenizers.chat_jinja import to_jinja
from tests.conversations import NAMES
from tests.trained import train_tokenizer


@pytest.mark.parametrize('name', NAMES)
def test_special_tokens(name, exported, internlm_vocabulary, byte_vocabulary):
    """By their names, with the ids that they had."""
    template = build_template(name)
    before = internlm_vocabulary if name.startswith('internlm') else byte_vocabulary
    tokenizer = AutoTokenizer.from_pretrained(exported[name])
    present = [mark for mark in template.marks if template.token_id(before, mark) is not None]
    assert present == ([] if name == 'internlm3' else list(template.marks))
    for mark in present:
        index = template.token_id(before, mark)
        assert tokenizer.convert_tokens_to_ids(mark) == index
        assert mark in tokenizer.all_special_tokens and index in tokenizer.all_special_ids
        assert tokenizer.encode(mark, add_special_tokens=False) == [index]
        assert tokenizer.decode([index], skip_special_tokens=True) == ''
        assert load_tokenizer(exported[name]).token_id(mark) == index
    assert len(tokenizer) == before.vocab_size
    config = json.loads((exported[name] / 'tokenizer_config.json').read_text())
    assert set(present) <= set(config['additional_special_tokens'])


@pytest.mark.parametrize('name', NAMES)
def test_the_template_is_there_and_has_its_name(name, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported[name])
    assert same_template(tokenizer.chat_template, name)
    assert (exported[name] / JINJA_NAME).read_text() == to_jinja(build_template(name))
    config = json.loads((exported[name] / 'tokenizer_config.json').read_text())
    assert config[NAME_KEY] == name


def test_the_name_survives_a_second_export(exported, tmp_path):
    write_tokenizer(load_tokenizer(exported['internlm2']), tmp_path)
    for name in ('tokenizer.json', 'tokenizer_config.json', JINJA_NAME):
        assert (tmp_path / name).read_bytes() == (exported['internlm2'] / name).read_bytes()


def test_another_template_may_follow(exported, tmp_path):
    write_tokenizer(
        load_tokenizer(exported['llama3']), tmp_path, chat_template=build_template('chatml')
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert same_template(tokenizer.chat_template, 'chatml')
    marks = {*build_template('llama3').marks, *build_template('chatml').marks}
    assert marks <= set(tokenizer.all_special_tokens)


def test_a_vocabulary_without_marks(tmp_path):
    tokenizer = train_tokenizer(tmp_path / 'model')
    write_tokenizer(tokenizer, tmp_path, chat_template=build_template('internlm2'))
    converted = AutoTokenizer.from_pretrained(tmp_path)
    assert set(converted.all_special_tokens) == {'<s>', '</s>', '<unk>'}
    messages = [{'role': 'user', 'content': 'def f1(x)'}]
    ids = converted.apply_chat_template(messages, return_dict=False)
    assert ids == build_template('internlm2').encode(tokenizer, messages).ids


def of_size(small: bytes, size: int, tail: list[str]) -> bytes:
    """A SentencePiece model with so many pieces, `tail` the last, as InternLM's are laid out."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(small)
    kept = [piece for piece in proto.pieces if piece.type != 4]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    for number in range(size - len(tail) - len(kept)):
        filler = chr(0x20000 + number % 40000) + chr(0x20000 + number // 40000)
        proto.pieces.add(piece=filler, score=-100_000.0 - number, type=1)
    for piece in tail:
        proto.pieces.add(piece=piece, score=0.0, type=4)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ('name', 'size', 'tail', 'ids'),
    [
        (
            'internlm_v1_1',
            103168,
            ['<eoh>', '<eoa>', *(f'<TOKENS_UNUSED_{n}>' for n in range(2, 141))],
            {'<eoh>': 103027, '<eoa>': 103028, '<TOKENS_UNUSED_2>': 103029},
        ),
        (
            'internlm2',
            92544,
            [f'[UNUSED_TOKEN_{n}]' for n in range(147)],
            {
                '<|plugin|>': 92538,
                '<|interpreter|>': 92539,
                '<|action_end|>': 92540,
                '<|action_start|>': 92541,
                '<|im_end|>': 92542,
                '<|im_start|>': 92543,
            },
        ),
    ],
)
def test_the_ids_of_internlms_vocabularies(name, size, tail, ids, tmp_path):
    """The tails of the two as published, over other pieces."""
    small = train_tokenizer(tmp_path / 'small')
    content = of_size((tmp_path / 'small' / 'tokenizer.model').read_bytes(), size, tail)
    (tmp_path / 'big.model').write_bytes(content)
    tokenizer = load_tokenizer(tmp_path / 'big.model')
    template = build_template(name)
    assert {mark: template.token_id(tokenizer, mark) for mark in template.marks} == ids
    messages = [{'role': 'user', 'content': 'def'}, {'role': 'assistant', 'content': 'f1(x)'}]
    encoded = template.encode(tokenizer, messages)
    stop = ids[template.stop[0]]
    assert [i for i, loss in zip(*encoded, strict=True) if loss] == [*small.encode('f1(x)'), stop]
    write_tokenizer(tokenizer, tmp_path, chat_template=template)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    assert converted.convert_tokens_to_ids(list(ids)) == list(ids.values())
    assert set(ids.values()) <= set(converted.all_special_ids)
    assert len(converted) == size
    assert converted.apply_chat_template(messages, return_dict=False) == encoded.ids
