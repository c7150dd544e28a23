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

from internlm_mm.tokenizers import HFTokenizer
from internlm_mm.tokenizers.convert import write_hf_tokenizer
from internlm_mm.tokenizers.training import train_tokenizer

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


SCRIPTS = {
    'latin': 'Ünïcödé naïve façade, Œuvre straße: the quick brown fox.',
    'chinese': '你好，世界！書生·浦語 简体與繁體',
    'japanese': 'こんにちは、カタカナと漢字。ｶﾅ',
    'korean': '안녕하세요 세계, 한국어',
    'arabic': 'مرحبا بالعالم ١٢٣ \u200fx',
    'hebrew': 'שָׁלוֹם עולם',
    'hindi': 'नमस्ते दुनिया क्षत्रिय',
    'thai': 'สวัสดีชาวโลก',
    'greek': 'Καλημέρα κόσμε, ἀρχή',
    'cyrillic': 'Привет, мир! Ёжик',
    'emoji': '😀🤖👩‍👩‍👧🏳️‍🌈👍🏽🇨🇳',
    'combining': 'e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 \u0301',
    'code': 'def f(x):\n\treturn {"a": [1, 2.5e-3]}  # 0x1F\n\n    pass\n',
    'white space': '  a   b\t\t\n\n\r\n \u00a0\u2003\u3000 \u200b\u2028x' + ' ' * 40,
    'control': ''.join(map(chr, [*range(1, 32), *range(127, 160)])),
    'nul': 'a\0b\0\0c',
    'odd': '\ue000\uf8ff\ufeff\ufffd\ufdd0\U0010ffff',
    'pieces': '<|User|>:hi<eoh>\n<|Bot|>:ho<eoa>\n<TOKENS_UNUSED_2><eo<eoh>',
    'controls spelt out': 'a</s>b<s><unk><0x0A>',
}


@pytest.fixture(scope='module', params=['scripts', 'code'])
def internlm(request, tmp_path_factory):
    """Trained as InternLM's: on the scripts, or on code, so that the scripts come out in bytes."""
    folder = tmp_path_factory.mktemp('internlm')
    ours = train_tokenizer(
        list(SCRIPTS.values()) * 8 if request.param == 'scripts' else SOURCES[-2:],
        folder,
        vocab_size=900,
        user_defined_symbols=['<eoh>', '<eoa>', *(f'<TOKENS_UNUSED_{n}>' for n in range(2, 8))],
        character_coverage=0.99,
    )
    write_hf_tokenizer(folder / 'tokenizer.model', folder)
    model = spm.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    return model, AutoTokenizer.from_pretrained(folder), ours, HFTokenizer(folder)


def equal_in_all_four(internlm, text: str) -> None:
    """SentencePiece, transformers, and our two, which keep U+2581 where the others lose it."""
    model, converted, ours, ours_converted = internlm
    ids = model.encode(text)
    split = converted.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert split == ids
    assert converted.decode(ids) == model.decode(ids)
    assert ours_converted.encode(text) == ours.encode(text)
    assert ours_converted.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    if '\u2581' not in text:
        assert ours.encode(text) == ids


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts(internlm, script):
    equal_in_all_four(internlm, SCRIPTS[script])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*SCRIPTS.values(), '\u2581', '</s>', '<eoh>', ' ', '\n']),
            st.text(st.characters(exclude_categories=['Cs']), max_size=8),
            st.sampled_from(list(SCRIPTS.values())).flatmap(
                lambda text: st.integers(0, len(text)).map(lambda cut: text[cut:])
            ),
        ),
        max_size=6,
    ).map(''.join)
)
def test_any_text_of_any_script(internlm, text):
    equal_in_all_four(internlm, text)


def test_the_tail_pieces_keep_their_ids(internlm):
    model, converted, ours, ours_converted = internlm
    for piece in ('<eoh>', '<eoa>', *(f'<TOKENS_UNUSED_{n}>' for n in range(2, 8))):
        (index,) = model.encode(piece)
        assert converted.convert_tokens_to_ids(piece) == index
        assert ours.token_id(piece) == ours_converted.token_id(piece) == index
    assert ours.hash == ours_converted.hash
