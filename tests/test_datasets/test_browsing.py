import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from internlm_mm.datasets import ConversationDataset, Row
from internlm_mm.datasets.browsing import (
    LEARNED,
    SPECIAL,
    Sheet,
    read_row,
    show_row,
    special_tokens,
    visible,
)
from internlm_mm.datasets.packing import pack_row
from internlm_mm.structures import IGNORE_INDEX
from tests.conversations import byte_level, internlm_model

Q, A = {'role': 'user', 'content': 'def'}, {'role': 'assistant', 'content': 'return 书'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def tokenizers(tokenizer, tmp_path_factory: pytest.TempPathFactory):
    return [tokenizer, byte_level(tmp_path_factory.mktemp('bytes'))]


def test_a_row_is_shown_with_its_loss(tmp_path: Path, tokenizer) -> None:
    (tmp_path / 'c.jsonl').write_text(json.dumps({'messages': [Q, A]}))
    dataset = ConversationDataset(
        tmp_path / 'c.jsonl',
        seq_len=64,
        chat_template='internlm2',
        tokenizer=tokenizer,
        cache_dir=tmp_path / 'cache',
    )
    shown = show_row(dataset[0], tokenizer, special_tokens(tokenizer, dataset.template))
    text = '<bos><|im_start|>user\ndef<|im_end|>\n<|im_start|>assistant\nreturn 书<|im_end|>\n'
    assert shown.plain.startswith(text)
    learned = int((dataset[0].labels != -100).sum())
    assert f'[{dataset[0].lengths[0]} tokens, {learned} learned]' in shown.plain
    assert shown.plain.endswith(f'[{dataset[0].lengths[1]} tokens of padding]\n')
    by_style: dict[str, str] = {}
    for span in shown.spans:
        style = str(span.style)
        by_style[style] = by_style.get(style, '') + shown.plain[span.start : span.end]
    assert by_style[LEARNED] == 'return 书'
    assert by_style[f'{SPECIAL} underline'] == '<|im_end|>'
    assert by_style[SPECIAL] == '<bos><|im_start|><|im_end|><|im_start|>'


def row_of(*documents: tuple[list[int], list[bool]], seq_len: int, **options) -> Row:
    """A row by the definition: the label of a token is the next one, where that has a loss."""
    ids, labels = [], []
    for tokens, learned in documents:
        ids += tokens
        pairs = zip(tokens[1:], learned[1:], strict=True)
        labels += [*(t if loss else IGNORE_INDEX for t, loss in pairs), IGNORE_INDEX]
    lengths = np.array([len(tokens) for tokens, _ in documents])
    return pack_row(
        np.array(ids), np.array(labels), lengths, seq_len=seq_len, max_docs=8, **options
    )


@given(some.lists(some.tuples(some.text(max_size=12), some.booleans()), min_size=1, max_size=5))
def test_pieces_are_the_text_and_the_tokens(tokenizers, parts: list[tuple[str, bool]]) -> None:
    """However texts are cut into tokens: no character is lost, and no id."""
    for tokenizer in tokenizers:
        coded = [(tokenizer.encode(text), learned) for text, learned in parts]
        ids = [tokenizer.bos_id, *(index for some_ids, _ in coded for index in some_ids)]
        mask = [False, *(learned for some_ids, learned in coded for _ in some_ids)]
        row = row_of((ids, mask), seq_len=len(ids) + 3)
        document, padding = read_row(row, tokenizer, special_tokens(tokenizer))
        assert (padding.is_padding, padding.num_tokens) == (True, 3)
        assert [index for piece in document.pieces for index in piece.ids] == ids
        assert [piece.learned for piece in document.pieces for _ in piece.ids] == mask
        assert document.num_learned == sum(mask)
        assert document.pieces[0] == ((tokenizer.bos_id,), '<bos>', False, True)
        for wanted in (True, False):
            shown = ''.join(p.text for p in document.pieces[1:] if p.learned == wanted)
            assert shown == ''.join(text for text, learned in parts if learned == wanted)


def test_characters_of_several_tokens_stand_together(tokenizers) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode('a🎉b')
        (document,) = read_row(row_of((ids, [True] * len(ids)), seq_len=len(ids)), tokenizer, {})
        # The first token has no loss: nothing comes before it.
        assert [piece.text for piece in document.pieces] == ['a', '🎉', 'b']
        assert len(document.pieces[1].ids) == len(ids) - 2 > 1


def test_rows_without_a_tokenizer_show_numbers() -> None:
    shown = show_row(row_of(([5, 6, 7], [True] * 3), seq_len=5), None, special_tokens(None))
    assert shown.plain == '5 6 7 \n[3 tokens, 2 learned]\n[2 tokens of padding]\n'


def test_what_goes_on_and_what_is_a_pair() -> None:
    row = row_of(([5, 6], [True] * 2), ([7, 8], [True] * 2), seq_len=4)
    row.labels[-1] = 9  # the row ends in the middle of a document
    first, last = read_row(row, None, {})
    assert not first.goes_on and last.goes_on
    assert last.caption == '2 tokens, 1 learned, goes on in another row'
    paired = replace(row_of(*[([5, 6], [False, True])] * 2, seq_len=6), num_pairs=1)
    titles = [document.caption for document in read_row(paired, None, {})]
    assert titles == [
        'chosen: 2 tokens, 1 learned',
        'rejected: 2 tokens, 1 learned',
        '2 tokens of padding',
    ]


def test_a_document_of_zeros_is_no_padding() -> None:
    row = row_of(([0, 0], [False, True]), ([0, 0], [False, False]), seq_len=4)
    assert [document.is_padding for document in read_row(row, None, {})] == [False, True]


def test_control_characters_do_nothing() -> None:
    assert visible('a\x1b[31m\tb\n\x00\x7f') == 'a␛[31m\tb\n␀␡'
    assert Sheet('t', ('a', 'b'), [('x', '1')]).table().row_count == 1
