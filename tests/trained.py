"""A work dir as training leaves it, without training."""

import json
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from torch import nn

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.models import InternLM
from internlm_mm.tokenizers import SentencePieceTokenizer

SIZES = dict(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_seq_len=64)


def train_tokenizer(folder: Path, **options) -> SentencePieceTokenizer:
    """A byte-fallback BPE of about 400 pieces, at `folder/tokenizer.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        vocab_size=400,
        model_type='bpe',
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([f'def f{i}(x): return x + {i}' for i in range(200)]),
        model_prefix=str(folder / 'tokenizer'),
        **(settings | options),
    )
    return SentencePieceTokenizer(folder)


def trained_run(
    folder: Path, family: type[nn.Module] = InternLM, **options: Any
) -> tuple[Path, Any, SentencePieceTokenizer]:
    """A work dir with the checkpoint iter_3, the model that is in it, and its tokenizer."""
    tokenizer = train_tokenizer(folder / 'tokenizer')
    sizes = SIZES | {'vocab_size': tokenizer.vocab_size} | options
    model: Any = family(**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    config = {'model': {'type': f'{family.__module__}.{family.__name__}', **sizes}}
    tokenizer.save(folder / 'copy')
    Checkpointer(async_save=False).save(
        folder / 'work' / 'iter_3',
        {f'model.{name}': p.detach() for name, p in model.named_parameters()},
        {'iter': 3},
        {'config.json': json.dumps(config)},
        {'tokenizer': folder / 'copy'},
    )
    return folder / 'work', model, tokenizer
