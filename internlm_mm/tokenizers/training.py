"""Training of SentencePiece vocabularies in InternLM's manner."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import SentencePieceTrainer

from internlm_mm.tokenizers.sentencepiece_tokenizer import MODEL_NAME, SentencePieceTokenizer

_CHUNK = 1000  # characters after which a text is cut at the next line end
_LONGEST = 4000  # characters of a chunk, at most 4 bytes each
_UNTEACHABLE = re.compile('[\0\u2581]')  # SentencePiece reserves them; they are encoded as bytes


def train_tokenizer(
    texts: Iterable[str],
    output: str | Path,
    *,
    vocab_size: int,
    user_defined_symbols: Sequence[str] = (),
    character_coverage: float = 0.9999,
    num_threads: int = 2,
    overwrite: bool = False,
) -> SentencePieceTokenizer:
    """Train byte-pair encoding that gives back every text it encodes, to the last space.

    As InternLM's: unknown bytes instead of unknown characters, digits one by one, no normalisation,
    no space put before a text, runs of spaces and line ends learned as they are; ids 0, 1, 2 are
    unk, bos, eos and 3 to 258 the bytes.

    Args:
        texts: Documents; all are held in memory while training.
        output: A `.model` file to write, or a folder in which `tokenizer.model` is written.
        vocab_size: Ids, the 259 above included.
        user_defined_symbols: Strings that always become one token.
        character_coverage: Share of the characters' occurrences that get an id of their own; rarer
            characters are spelt in bytes.
        num_threads: Threads; the result does not depend on them.
        overwrite: Replace a file that is there already.

    Returns:
        The tokenizer, read back from the file.

    Raises:
        FileExistsError: If the file exists and `overwrite` is not set.
        ValueError: If there is no text, or `vocab_size` does not suit it; says what would.
    """
    path = Path(output)
    if path.suffix != '.model':
        path = path / MODEL_NAME
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} exists; give another output, or --overwrite')
    sentencepiece.SetMinLogLevel(2)  # else hundreds of lines on stderr
    model = io.BytesIO()
    chunks = list(_chunks(texts))  # an error in a file would lose its message inside the trainer
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type='bpe',
            vocab_size=vocab_size,
            user_defined_symbols=list(user_defined_symbols),
            character_coverage=character_coverage,
            num_threads=num_threads,
            max_sentence_length=4 * _LONGEST,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return SentencePieceTokenizer(path)


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at line ends: SentencePiece skips sentences that are too long."""
    for text in texts:
        for part in _UNTEACHABLE.split(text):
            start = 0
            while start < len(part):
                end = part.find('\n', start + _CHUNK, start + _LONGEST) + 1
                end = end or min(len(part), start + _LONGEST)
                yield part[start:end]
                start = end


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r'Vocabulary size too high .*<= (\d+)', message):
        return f'vocab_size={vocab_size} is more than this text can fill; at most {found[1]}'
    if found := re.search(r'smaller than required_chars. \d+ vs (\d+)', message):
        return (
            f'vocab_size={vocab_size} does not hold the special tokens, 256 bytes and the '
            f'characters of this text; at least {found[1]}, or a lower character_coverage'
        )
    if 'sentences_.empty()' in message:
        return 'there is no text to train a tokenizer on'
    return f'SentencePiece cannot train on this text: {message}'
