"""The tokenizer of a Hugging Face folder as a GGUF file holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_mm.tokenizers.hf_tokenizer import JSON_NAME, read_hf_tokenizer
from internlm_mm.tokenizers.sentencepiece_tokenizer import MODEL_NAME

# Types of pieces. GGUF numbers them as SentencePiece's ModelProto does, bytes (6) among them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

_SPACE_MARK = '\u2581'
_PADDING_SCORE = -10_000.0  # below every piece, so that nothing is ever merged into padding
_BPE = 2  # of TrainerSpec.ModelType


@dataclass
class Vocabulary:
    """What llama.cpp needs to encode and decode as the exported tokenizer does.

    Attributes:
        pieces: Text of every id, U+2581 for a space except in user-defined ones.
        scores: SentencePiece's; the pair whose piece has the highest one is merged first.
        types: See the constants of this module.
        add_space_prefix: Whether a text gets a space in front.
        add_bos: Whether a text begins with bos, by default.
        bos_id: None where there is none, as for the two below.
        unk_id: What stands for what has no piece.
        pad_id: Fills up.
        stop_ids: End an answer; the first is the tokenizer's eos.
        chat_template: Jinja, or None.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool
    add_bos: bool
    bos_id: int | None
    unk_id: int | None
    pad_id: int | None
    stop_ids: list[int] = field(default_factory=list)
    chat_template: str | None = None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read the tokenizer of an exported folder.

    Args:
        folder: Holds `tokenizer.model` and, beside it, the same tokenizer for transformers.
        size: Rows of the model's embedding; ids that the tokenizer lacks become unused ones.

    Raises:
        FileNotFoundError: If there is no SentencePiece model.
        ValueError: If llama.cpp would encode otherwise than the tokenizer: a model that is not
            byte-pair encoding or normalises texts; or the sizes do not fit.
    """
    # protobuf takes a while to read, and only converting needs it.
    from sentencepiece import sentencepiece_model_pb2

    file = folder / MODEL_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f'{folder} has no {MODEL_NAME}: only SentencePiece tokenizers are written here; '
            "llama.cpp's own convert_hf_to_gguf.py knows more of them"
        )
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(file.read_bytes())
    _check_model(proto, file)
    vocabulary = Vocabulary(
        pieces=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        types=[piece.type for piece in proto.pieces],
        add_space_prefix=proto.normalizer_spec.add_dummy_prefix,
        add_bos=False,
        bos_id=None,
        unk_id=proto.trainer_spec.unk_id,
        pad_id=None,
    )
    _pad(vocabulary, size, file)
    tokenizer = read_hf_tokenizer(folder)
    _take_added_tokens(vocabulary, folder, size)
    vocabulary.bos_id, vocabulary.pad_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    begun = tokenizer.encode('a')
    vocabulary.add_bos = vocabulary.bos_id is not None and begun[0] == vocabulary.bos_id
    vocabulary.stop_ids = _stop_ids(folder, tokenizer.eos_token_id)
    template = tokenizer.chat_template
    vocabulary.chat_template = template.get('default') if isinstance(template, dict) else template
    for index, kind in enumerate(vocabulary.types):
        if kind == USER_DEFINED:  # llama.cpp looks for these in the text as it was typed
            vocabulary.pieces[index] = vocabulary.pieces[index].replace(_SPACE_MARK, ' ')
    return vocabulary


def _check_model(proto: Any, file: Path) -> None:
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f'{file} is not a BPE model; llama.cpp encodes only those as they should')
    spec = proto.normalizer_spec
    for name in ('precompiled_charsmap', 'remove_extra_whitespaces'):
        if getattr(spec, name):
            raise ValueError(f"{file} changes texts ({name}), which llama.cpp's tokenizer does not")


def _pad(vocabulary: Vocabulary, size: int, file: Path) -> None:
    held = len(vocabulary.pieces)
    if held > size:
        raise ValueError(f'{file} has {held} pieces, the model vocab_size={size}')
    vocabulary.pieces += [f'<pad_{index}>' for index in range(held, size)]
    vocabulary.scores += [_PADDING_SCORE] * (size - held)
    vocabulary.types += [UNUSED] * (size - held)


def _take_added_tokens(vocabulary: Vocabulary, folder: Path, size: int) -> None:
    """Tokens that were added to the SentencePiece model, or put in the place of unused pieces."""
    file = folder / JSON_NAME
    if not file.is_file():
        return
    for token in json.loads(file.read_text(encoding='utf-8')).get('added_tokens', []):
        index, text = token['id'], token['content']
        if index >= size:
            raise ValueError(f'{file} has {text!r} as id {index}, the model vocab_size={size}')
        if vocabulary.pieces[index] != text:
            vocabulary.pieces[index] = text
            vocabulary.types[index] = CONTROL if token['special'] else USER_DEFINED


def _stop_ids(folder: Path, eos_id: int | None) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, then others of generation_config.json."""
    file = folder / 'generation_config.json'
    said = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    ids = said.get('eos_token_id') or []
    ids = [ids] if isinstance(ids, int) else list(ids)
    if eos_id is not None:
        ids = [eos_id, *(index for index in ids if index != eos_id)]
    if len(ids) > 3:
        raise ValueError(f'{file} ends answers at {ids}; GGUF holds no more than three such ids')
    return ids
