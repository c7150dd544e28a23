"""Text that comes in tokens, against the text as a whole."""

import pickle
import random

import pytest
import sentencepiece as spm

from internlm_mm.checkpoint.huggingface import write_tokenizer
from internlm_mm.inference.text_stream import TextStream, Written
from internlm_mm.tokenizers import HFTokenizer, load_tokenizer

TEXTS = [
    'def f(x):\n    return x  # done\n\n\n',
    ' leading and trailing space ',
    '書生·浦語 is a 语言模型 🙂👩‍👩‍👧 ﷽ Ünïcödé\t\ttabs',
    '   ' * 20 + 'x',
    'ends in a mark \ufffd',
    '\ufffd\ufffd begins with two',
]


@pytest.fixture(scope='module', params=['space in front', 'no space', 'Hugging Face'])
def tokenizer(request, tmp_path_factory):
    prefix = tmp_path_factory.mktemp('sp') / 'sp'
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text.isascii()] * 9),
        model_prefix=str(prefix),
        vocab_size=330,
        model_type='bpe',
        byte_fallback=True,
        normalization_rule_name='identity',
        add_dummy_prefix=request.param == 'space in front',
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(prefix.with_suffix('.model'))
    if request.param != 'Hugging Face':
        return tokenizer
    write_tokenizer(tokenizer, prefix.parent / 'hf')
    return HFTokenizer(prefix.parent / 'hf')


def pieces_of(stream, ids):
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def test_pieces_join_to_the_whole_text(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = pieces_of(TextStream(tokenizer.decode), ids)
        assert ''.join(pieces) == tokenizer.decode(ids) == text
        assert sum(map(bool, pieces)) > 1


def test_any_tokens_in_any_order_join_to_the_whole_text(tokenizer):
    rng = random.Random(0)
    # Of a run of bytes that is no text as a whole, Hugging Face's decoder gives none, not even
    # characters that were whole: what a stream has given out, it cannot take back.
    first = 259 if isinstance(tokenizer, HFTokenizer) else 0
    for _ in range(300):
        ids = [rng.randrange(first, tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        assert ''.join(pieces_of(TextStream(tokenizer.decode), ids)) == tokenizer.decode(ids)


def test_characters_are_whole(tokenizer):
    ids = tokenizer.encode('a書🙂b')
    pieces = [piece for piece in pieces_of(TextStream(tokenizer.decode), ids) if piece]
    assert pieces == ['a', '書', '🙂', 'b']


def test_a_token_costs_few(tokenizer):
    decoded = []
    stream = TextStream(lambda ids: decoded.append(len(ids)) or tokenizer.decode(ids))
    for token in tokenizer.encode(TEXTS[0] * 50):
        stream.push(token)
    assert max(decoded) < 20


def degenerate(tokenizer):
    """Runs that give no text for long: one byte, half a character, spaces, tokens without text."""
    byte = {value: tokenizer.token_id(f'<0x{value:02X}>') for value in (0x80, 0xE6, 0x9B, 0xB8)}
    space = tokenizer.encode('x ' + '  ' * 40)[-1]
    half = [byte[0xE6], byte[0x9B]]
    return {
        'bytes': [byte[0x80]] * 200,
        'halves': half * 100,
        'spaces': [space] * 200,
        'spaces in front of a word': [space] * 200 + tokenizer.encode('def'),
        'words, then spaces': tokenizer.encode('def f(x)') + [space] * 200,
        'nothing': [2] * 200,
        'after a word': tokenizer.encode('done') + half * 100 + tokenizer.encode(' done'),
        'and a character': half * 50 + [*half, byte[0xB8]] + tokenizer.encode('done'),
        'replacements': tokenizer.encode('\ufffd' * 70 + ' x'),
    }


@pytest.mark.parametrize(
    'kind',
    [
        'bytes', 'halves', 'spaces', 'spaces in front of a word', 'words, then spaces', 'nothing',
        'after a word', 'and a character', 'replacements',
    ],
)  # fmt: skip
def test_runs_without_text_cost_no_more(tokenizer, kind):
    ids = degenerate(tokenizer)[kind]
    decoded = []
    stream = TextStream(lambda ids: decoded.append(len(ids)) or tokenizer.decode(ids))
    pieces = [stream.push(token) for token in ids]
    assert sum(decoded) < 60 * len(ids) and max(decoded) < 60
    assert ''.join([*pieces, stream.finish()]) == tokenizer.decode(ids)


def test_runs_of_any_tokens_join_to_the_whole_text(tokenizer):
    rng = random.Random(1)
    first = 259 if isinstance(tokenizer, HFTokenizer) else 0
    for _ in range(60):
        runs = rng.randrange(1, 6)
        some = [rng.randrange(first, tokenizer.vocab_size) for _ in range(3)]
        ids = [token for _ in range(runs) for token in [rng.choice(some)] * rng.randrange(1, 50)]
        decoded = []
        stream = TextStream(lambda ids, seen=decoded: seen.append(ids) or tokenizer.decode(ids))
        assert ''.join(pieces_of(stream, ids)) == tokenizer.decode(ids)
        assert max(map(len, decoded)) < 60


def first_stop(text, stops):
    """Where the stop string that is complete first begins, by looking at every beginning."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@pytest.mark.parametrize('seed', range(4))
def test_stop_strings_against_brute_force(seed):
    rng = random.Random(seed)
    stopped = 0
    for _ in range(2000):
        text = ''.join(rng.choices('ab', k=rng.randrange(12)))
        stops = [''.join(rng.choices('ab', k=rng.randrange(1, 6))) for _ in range(rng.randrange(3))]
        parts = []
        at = 0
        while at < len(text):
            size = rng.randrange(1, 5)
            parts.append(text[at : at + size])
            at += size
        stream = TextStream(lambda ids, parts=parts: ''.join(parts[i] for i in ids), stops)
        pieces = pieces_of(stream, range(len(parts)))
        end = first_stop(text, stops)
        assert ''.join(pieces) == text[:end]
        assert stream.stopped == (end is not None)
        stopped += stream.stopped
    assert 500 < stopped < 1900


def test_nothing_of_a_possible_stop_string_is_given_out_early():
    parts = ['so', ' <', 'eo', 'h', ' x <e', 'oa> more']
    stream = TextStream(lambda ids: ''.join(parts[i] for i in ids), ['<eoa>'])
    pieces = [stream.push(i) for i in range(len(parts))]
    assert pieces == ['so', ' ', '', '<eoh', ' x ', '']
    assert stream.stopped
    assert stream.push(0) == stream.finish() == ''


def test_what_was_held_is_given_out_at_the_end():
    parts = ['a <', 'eo']
    stream = TextStream(lambda ids: ''.join(parts[i] for i in ids), ['<eoa>'])
    assert [stream.push(0), stream.push(1), stream.finish()] == ['a ', '', '<eo']
    assert not stream.stopped


def test_written_texts_are_texts_that_remember():
    text = Written('so', whole=False)
    assert text == 'so' and f'{text}!' == 'so!' and not text.whole and Written('so').whole
    copy = pickle.loads(pickle.dumps(text))  # as processes send it to each other
    assert copy == 'so' and copy.whole is False
