"""A SentencePiece model as a Hugging Face tokenizer that plain `AutoTokenizer` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from internlm_mm.tokenizers.base import SOURCE_HASH, hash_files
from internlm_mm.tokenizers.sentencepiece_tokenizer import MODEL_NAME

_SPACE_MARK = '\u2581'
# Values of ModelProto.SentencePiece.Type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2  # of TrainerSpec.ModelType


def write_hf_tokenizer(model_file: str | Path, folder: str | Path, add_bos: bool = True) -> None:
    """Write tokenizer.json and tokenizer_config.json for a SentencePiece BPE model.

    The result encodes as the model does, with two differences that Hugging Face's design imposes:
    control pieces that are spelt out in a text (`</s>`) are taken for the tokens themselves unless
    the caller passes `split_special_tokens=True`, and a literal U+2581 is taken for a space.

    Args:
        model_file: The `.model` file.
        folder: Where the two files go; it must exist.
        add_bos: Whether texts begin with the model's bos piece, if it has one, when transformers
            is asked for special tokens, as it is by default.

    Raises:
        ValueError: If the model is not byte-pair encoding.
    """
    # protobuf comes with tensorboard; reading it takes a while, and only converting needs it.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(Path(model_file).read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f'{model_file} is not a BPE model; only those convert without loss')
    tokenizer = _build(proto, add_bos)
    folder = Path(folder)
    tokenizer.save(str(folder / 'tokenizer.json'))
    config = _config(proto) | {SOURCE_HASH: hash_files([Path(model_file)], MODEL_NAME)}
    (folder / 'tokenizer_config.json').write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8'
    )


def _build(proto: Any, add_bos: bool) -> Tokenizer:
    pieces = proto.pieces
    special = [p.piece for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    unknown = next(p.piece for p in pieces if p.type == _UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            {p.piece: index for index, p in enumerate(pieces)},
            _merges({p.piece: p.score for p in pieces if p.type == _NORMAL}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace(_SPACE_MARK, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(' ', 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    # SentencePiece looks for these in the normalised text, before it merges anything.
    tokenizer.add_tokens(
        [AddedToken(p.piece, normalized=True) for p in pieces if p.type == _USER_DEFINED]
    )
    bos = proto.trainer_spec.bos_id
    if add_bos and bos >= 0:
        piece = pieces[bos].piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f'{piece} $A', pair=f'{piece} $A {piece}:1 $B:1', special_tokens=[(piece, bos)]
        )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first.

    SentencePiece stores no merges: it joins whichever neighbours make the piece of highest score.
    """
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(' '))
    return normalizers.Sequence([*steps, normalizers.Replace(' ', _SPACE_MARK)])


def _config(proto: Any) -> dict[str, Any]:
    names = {
        f'{name}_token': proto.pieces[index].piece
        for name in ('bos', 'eos', 'unk', 'pad')
        if (index := getattr(proto.trainer_spec, f'{name}_id')) >= 0
    }
    if 'eos_token' in names:
        names.setdefault('pad_token', names['eos_token'])
    return {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        'padding_side': 'left',
        'model_input_names': ['input_ids', 'attention_mask'],
        **names,
    }
