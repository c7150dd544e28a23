from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from internlm_mm.registry import TOKENIZERS
from internlm_mm.tokenizers import SentencePieceTokenizer

# Every character there is, but halves of characters, which are no text.
TEXT = st.text(st.characters(exclude_categories=['Cs']))


@given(TEXT)
@example('')
@example(' leading and trailing  ')
@example('\ttab\n\n    four\r\nspaces\x00nul')
@example('\u2581 a literal \u2581\u2581 mark')
@example('</s><s><unk> are text')
@example('e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A, \U0001f600, \ufeff')
def test_decode_gives_back_the_text(trained: SentencePieceTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(3 <= index < trained.vocab_size for index in ids)


def test_ids_are_sentencepieces_own(trained: SentencePieceTokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    text = 'def fox(x):\n\treturn  x + 12345\n'
    assert trained.encode(text) == reference.encode(text)


def test_special_ids_are_internlms(trained: SentencePieceTokenizer) -> None:
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (1, 2, None)
    assert trained.vocab_size == 400
    assert trained.decode([1, *trained.encode('fox'), 2]) == 'fox'


def test_saved_tokenizer_is_the_same(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / 'new' / 'copy')
    copy = SentencePieceTokenizer(tmp_path / 'new' / 'copy')
    assert copy.hash == trained.hash
    assert copy.encode('lazy dog') == trained.encode('lazy dog')


def test_the_name_of_the_file_does_not_count(
    trained: SentencePieceTokenizer, tmp_path: Path
) -> None:
    (tmp_path / 'my.model').write_bytes(trained.path.read_bytes())
    assert SentencePieceTokenizer(tmp_path / 'my.model').hash == trained.hash


def test_is_registered(trained: SentencePieceTokenizer) -> None:
    built = TOKENIZERS.build(dict(type='SentencePieceTokenizer', path=str(trained.path)))
    assert built.hash == trained.hash


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no SentencePiece model at .*tokenizer\.model'):
        SentencePieceTokenizer(tmp_path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / 'x.model').write_text('not a model')
    with pytest.raises(ValueError, match='is not a SentencePiece model'):
        SentencePieceTokenizer(tmp_path / 'x.model')
