"""The converted tokenizer must give SentencePiece's own ids."""

import ast
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from internlm_mm.tokenizers.convert import write_hf_tokenizer

SOURCES = [inspect.getsource(module) for module in (ast, inspect, json, textwrap)]
PHRASES = [
    '',
    ' ',
    '   ',
    '  leading and trailing  ',
    'tabs\t\tand\n\n\n    indents\r\n',
    'def f(x):\n    return {"a": [1, 2.5e-3]}  # note\n',
    'Ünïcödé naïve façade',
    '你好，世界！書生·浦語',
    '😀🤖👩‍👩‍👧',
    'مرحبا \u200b\u00a0x',
    '1234567890 3.14159',
    'aaaaaaaaaaaaaaaaa' + ' ' * 37 + 'b',
    '<|User|>: hi<eoh>\n<|Bot|>: ho<eoa>\n',
    '<TOKENS_UNUSED_2><eoa> <eoh>x',
]


def train(folder: Path, **options) -> Path:
    prefix = folder / 'sp'
    settings = dict(
        vocab_size=1200,
        model_type='bpe',
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        user_defined_symbols=['<eoh>', '<eoa>', '<TOKENS_UNUSED_2>'],
        minloglevel=2,
    )
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in SOURCES for line in text.splitlines()),
        model_prefix=str(prefix),
        **(settings | options),
    )
    return prefix.with_suffix('.model')


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    model = train(folder)
    write_hf_tokenizer(model, folder)
    return spm.SentencePieceProcessor(model_file=str(model)), AutoTokenizer.from_pretrained(folder)


def same(pair, text: str) -> None:
    sentencepiece, converted = pair
    ids = sentencepiece.encode(text)
    assert converted.encode(text, add_special_tokens=False) == ids
    assert converted.decode(ids) == sentencepiece.decode(ids)


@pytest.mark.parametrize('text', PHRASES)
def test_phrases(pair, text):
    same(pair, text)


@pytest.mark.parametrize('source', SOURCES, ids=['ast', 'inspect', 'json', 'textwrap'])
def test_whole_source_files(pair, source):
    same(pair, source)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [*PHRASES, *(source[i : i + 40] for source in SOURCES for i in (9, 500))]
            ),
            st.text(
                st.characters(blacklist_characters='\u2581\0', blacklist_categories=['Cs']),
                max_size=12,
            ),
            st.builds(lambda c, n: c * n, st.sampled_from(' \n\t-=#.aeé'), st.integers(1, 70)),
        ),
        max_size=8,
    ).map(''.join)
)
def test_any_text(pair, text):
    same(pair, text)


def test_special_tokens(pair):
    sentencepiece, converted = pair
    assert converted.bos_token_id == sentencepiece.bos_id() == 1
    assert converted.eos_token_id == converted.pad_token_id == sentencepiece.eos_id() == 2
    assert converted.encode('x') == [1, *sentencepiece.encode('x')]
    assert len(converted) == sentencepiece.vocab_size()
    ids = converted.encode('a</s>b', add_special_tokens=False, split_special_tokens=True)
    assert ids == sentencepiece.encode('a</s>b')


def test_without_bos(tmp_path):
    model = train(tmp_path)
    write_hf_tokenizer(model, tmp_path, add_bos=False)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    assert converted.encode('x') == converted.encode('x', add_special_tokens=False)
    assert converted.bos_token_id == 1


def test_defaults_of_sentencepiece(tmp_path):
    """Dummy prefix, NFKC and squeezed spaces: what its trainer does unless told otherwise."""
    model = train(
        tmp_path,
        normalization_rule_name='nmt_nfkc',
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
    )
    write_hf_tokenizer(model, tmp_path)
    sentencepiece = spm.SentencePieceProcessor(model_file=str(model))
    converted = AutoTokenizer.from_pretrained(tmp_path)
    for text in ['hello world', '  a   b  ', 'ﬁne ① Ａ', 'x = [1,  2]', '你好']:
        assert converted.encode(text, add_special_tokens=False) == sentencepiece.encode(text), text


def test_only_bpe_converts(tmp_path):
    model = train(tmp_path, model_type='unigram', vocab_size=600)
    with pytest.raises(ValueError, match='not a BPE model'):
        write_hf_tokenizer(model, tmp_path)
