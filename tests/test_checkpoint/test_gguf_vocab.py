"""Vocabularies of GGUF files: encoded after llama.cpp's source, and by llama.cpp itself."""

import itertools
import json
import re

import pytest
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from internlm_mm.checkpoint.gguf import write_gguf
from internlm_mm.checkpoint.gguf_vocab import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from internlm_mm.checkpoint.huggingface import write_tokenizer
from internlm_mm.tokenizers import load_tokenizer
from tests.gguf_reference import llama_folder

BYTE = 6
TEXTS = [
    'def fill(text, width=70, **kwargs):\n    return "\\n".join(wrap(text))\n\n\n\tx = 1\r\n',
    '  two  spaces   three    and at the end  ',
    '1234567890 0x1F 3.14e-10',
    '书生·浦语大模型，上下文。「日本語」 한국어 Ελληνικά кириллица עברית عربى हिन्दी ไทย',
    '🙂👩‍👩‍👧🏳️‍🌈 naïve café e\u0301 \u00a0\u200b\u3000 \x00\x07\x7f \ufeff',
    '<|User|>:hello<eoh>\n<|Bot|>:hi<eoa>\n',
    '<eoh><eoa> <eoh>x<eoa>',
    'a',
    ' ',
    '\n',
    '',
]


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokens of a text as llama.cpp makes them: tokenizer_st_partition and llm_tokenizer_spm."""
    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    special = sorted(
        (p for p, t in zip(vocabulary.pieces, vocabulary.types, strict=True) if t == USER_DEFINED),
        key=len,
        reverse=True,
    )
    parts = re.split('(' + '|'.join(map(re.escape, special)) + ')', text) if special else [text]
    tokens: list[int] = []
    for index, part in enumerate(parts):
        if index % 2:
            tokens.append(ids[part])
        elif part:
            tokens += encode_part(vocabulary, ids, part, index == 0)
    return tokens


def encode_part(vocabulary, ids, text, first):
    if vocabulary.add_space_prefix and first:
        text = ' ' + text
    symbols = list(text.replace(' ', '\u2581'))
    while True:
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(-vocabulary.scores[ids[p]], i) for i, p in enumerate(pairs) if p in ids]
        if not known:
            break
        at = min(known)[1]
        symbols[at : at + 2] = [pairs[at]]
    tokens = []
    for symbol in symbols:
        spelt = [ids[f'<0x{byte:02X}>'] for byte in symbol.encode()]
        tokens += [ids[symbol]] if symbol in ids else spelt
    return tokens


@pytest.fixture
def folder(sentencepiece_model, tmp_path):
    write_tokenizer(load_tokenizer(sentencepiece_model), tmp_path)
    return tmp_path


def test_encodes_as_the_tokenizer(folder):
    vocabulary, tokenizer = read_vocabulary(folder, 512), load_tokenizer(folder)
    for text in TEXTS:
        assert encode(vocabulary, text) == tokenizer.encode(text)


def test_pieces_are_those_of_the_model(folder, sentencepiece_model):
    vocabulary = read_vocabulary(folder, 512)
    model = spm.SentencePieceProcessor(model_file=str(sentencepiece_model))
    held = model.vocab_size()
    assert vocabulary.pieces[:held] == [model.id_to_piece(i) for i in range(held)]
    assert vocabulary.scores[:held] == [model.get_score(i) for i in range(held)]
    for index in range(held):
        assert (vocabulary.types[index] == CONTROL) == model.is_control(index)
        assert (vocabulary.types[index] == BYTE) == model.is_byte(index)
    assert vocabulary.types[model.piece_to_id('<eoa>')] == USER_DEFINED
    assert (vocabulary.bos_id, vocabulary.unk_id) == (1, 0)
    assert not vocabulary.add_space_prefix


def test_rows_that_the_tokenizer_lacks_are_unused(folder):
    vocabulary = read_vocabulary(folder, 512)
    assert len(vocabulary.pieces) == len(set(vocabulary.pieces)) == 512
    assert vocabulary.types[-12:] == [UNUSED] * 12
    assert max(vocabulary.scores[-12:]) < min(vocabulary.scores[:-12])


def test_bos_as_the_exported_tokenizer_has_it(sentencepiece_model, tmp_path):
    for add_bos in (True, False):
        folder = tmp_path / str(add_bos)
        write_tokenizer(load_tokenizer(sentencepiece_model), folder, add_bos=add_bos)
        assert read_vocabulary(folder, 512).add_bos is add_bos


def test_added_tokens_and_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    tokenizer.chat_template = '{{ messages[0].content }}'
    tokenizer.save_pretrained(folder)
    vocabulary = read_vocabulary(folder, 512)
    index = tokenizer.convert_tokens_to_ids('<|im_end|>')
    assert vocabulary.pieces[index] == '<|im_end|>'
    assert vocabulary.types[index] == CONTROL
    assert vocabulary.chat_template == '{{ messages[0].content }}'
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' as id 501, the model vocab_size=501"):
        read_vocabulary(folder, 501)


@pytest.mark.parametrize(
    ('said', 'expected'), [(None, [2]), (2, [2]), ([7, 2], [2, 7]), ([7, 8], [2, 7, 8])]
)
def test_stop_ids(folder, said, expected):
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': said}))
    assert read_vocabulary(folder, 512).stop_ids == expected


def test_more_stop_ids_than_the_file_holds(folder):
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [5, 6, 7]}))
    with pytest.raises(ValueError, match=r'\[2, 5, 6, 7\]; GGUF holds no more than three'):
        read_vocabulary(folder, 512)


def test_too_many_pieces(folder):
    with pytest.raises(ValueError, match='500 pieces, the model vocab_size=400'):
        read_vocabulary(folder, 400)


def test_no_sentencepiece_model(folder):
    (folder / 'tokenizer.model').unlink()
    with pytest.raises(FileNotFoundError, match='only SentencePiece tokenizers'):
        read_vocabulary(folder, 512)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda proto: setattr(proto.trainer_spec, 'model_type', 1), 'is not a BPE model'),
        (
            lambda proto: setattr(proto.normalizer_spec, 'remove_extra_whitespaces', True),
            'changes texts .remove_extra_whitespaces.',
        ),
        (
            lambda proto: setattr(proto.normalizer_spec, 'precompiled_charsmap', b'nfkc'),
            'changes texts .precompiled_charsmap.',
        ),
    ],
    ids=['unigram', 'spaces', 'normalised'],
)
def test_models_that_llama_cpp_would_encode_otherwise(folder, change, message):
    file = folder / 'tokenizer.model'
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=message):
        read_vocabulary(folder, 512)


@pytest.mark.slow
def test_llama_cpp_gives_the_same_tokens(sentencepiece_model, tmp_path):
    reason = 'llama.cpp is not installed: pip install llama-cpp-python'
    llama_cpp = pytest.importorskip('llama_cpp', reason=reason)
    folder = llama_folder(tmp_path / 'folder', sentencepiece_model)
    write_gguf(folder, tmp_path / 'out.gguf')
    model = llama_cpp.Llama(str(tmp_path / 'out.gguf'), vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(folder)
    exported = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        data = text.encode()
        assert model.tokenize(data, add_bos=False, special=False) == tokenizer.encode(text)
        assert model.tokenize(data, add_bos=True, special=True) == exported.encode(text)
    model.close()
