from pathlib import Path

import pytest
import sentencepiece

from internlm_mm.tokenizers import SentencePieceTokenizer
from internlm_mm.tokenizers.training import train_tokenizer

TEXTS = ['def add(first, second):\n\treturn first + 1234\n\n        deep\n' * 3] * 8


def pieces_of(tokenizer: SentencePieceTokenizer) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return [model.id_to_piece(index) for index in range(model.vocab_size())]


def test_layout_of_ids_is_internlms(tmp_path: Path) -> None:
    pieces = pieces_of(train_tokenizer(TEXTS, tmp_path, vocab_size=330))
    assert pieces[:3] == ['<unk>', '<s>', '</s>']
    assert pieces[3:259] == [f'<0x{byte:02X}>' for byte in range(256)]


def test_lines_tabs_and_runs_of_spaces_are_learned(tmp_path: Path) -> None:
    pieces = pieces_of(train_tokenizer(TEXTS, tmp_path, vocab_size=330))
    assert any(piece.startswith('\n\t') for piece in pieces)
    assert '\u2581' * 8 in pieces


def test_digits_stand_alone(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=330)
    learned = pieces_of(tokenizer)[259:]
    assert not [piece for piece in learned if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert len(tokenizer.encode('1234')) == 4


def test_long_lines_and_reserved_characters_are_trained_on(tmp_path: Path) -> None:
    texts = ['zebra ' * 10_000, 'before\0after \u2581mark ' * 10]
    tokenizer = train_tokenizer(texts, tmp_path, vocab_size=285)
    assert len(tokenizer.encode(' zebra')) <= 2


def test_user_defined_symbols_are_one_id(tmp_path: Path) -> None:
    symbols = ['<|im_start|>', '<|im_end|>']
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=330, user_defined_symbols=symbols)
    assert len(tokenizer.encode('<|im_start|>add<|im_end|>')) == 3


def test_same_text_same_file(tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, tmp_path / 'a.model', vocab_size=320, num_threads=1)
    second = train_tokenizer(iter(TEXTS), tmp_path / 'b', vocab_size=320, num_threads=2)
    assert pieces_of(first) == pieces_of(second)
    assert second.path == tmp_path / 'b' / 'tokenizer.model'


def test_existing_file_is_kept(tmp_path: Path) -> None:
    old = train_tokenizer(TEXTS, tmp_path, vocab_size=320)
    with pytest.raises(FileExistsError, match='overwrite'):
        train_tokenizer(TEXTS, tmp_path, vocab_size=330)
    with pytest.raises(ValueError):
        train_tokenizer(TEXTS, tmp_path, vocab_size=10**6, overwrite=True)
    assert SentencePieceTokenizer(tmp_path).hash == old.hash
    assert train_tokenizer(TEXTS, tmp_path, vocab_size=330, overwrite=True).hash != old.hash
    assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.model']


@pytest.mark.parametrize(
    ('texts', 'vocab_size', 'message'),
    [
        (TEXTS, 100_000, r'vocab_size=100000 is more than this text can fill; at most \d+'),
        (TEXTS, 100, r'vocab_size=100 does not hold .* at least \d+'),
        ([], 300, 'no text'),
    ],
)
def test_vocabulary_that_does_not_fit(
    texts: list[str], vocab_size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, tmp_path / 'x', vocab_size=vocab_size)
    assert not (tmp_path / 'x').exists()


def test_error_in_the_texts_comes_through(tmp_path: Path) -> None:
    def texts():
        yield 'fine'
        raise ValueError('file:7: broken')

    with pytest.raises(ValueError, match='file:7: broken'):
        train_tokenizer(texts(), tmp_path, vocab_size=300)
