"""A work dir as training leaves it, without training."""

import json
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from torch import nn

from internlm_mm.checkpoint.base import describe_base
from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.models import InternLM
from internlm_mm.registry import MODELS
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


def adapted_run(
    folder: Path, family: type[nn.Module] = InternLM, hf: str | None = None, **adapter: Any
) -> tuple[Path, Path, Any]:
    """A Hugging Face folder, a work dir with adapters of it at iter_3, and the model of both.

    Args:
        folder: Gets `hf`, `work` and `lora`.
        family: Of the model.
        hf: Form of the Hugging Face folder.
        adapter: Of `model.adapter`.
    """
    work_dir, base, _ = trained_run(folder, family)
    convert_to_hf(work_dir, folder / 'hf', format=hf, dtype='float32')
    said = json.loads((work_dir / 'iter_3' / 'config.json').read_text())['model']
    said['adapter'] = {'type': 'LoRA', 'rank': 4, 'alpha': 6.0, **adapter}
    model: Any = MODELS.build(dict(said))
    model.load_state_dict(base.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if '.lora_' in name:
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    Checkpointer(async_save=False).save(
        folder / 'lora' / 'iter_3',
        {f'model.{n}': p.detach() for n, p in model.named_parameters() if '.lora_' in n},
        {'iter': 3, 'base': describe_base(folder / 'hf').as_json()},
        {'config.json': json.dumps({'model': said, 'chat_template': 'internlm'})},
        {'tokenizer': folder / 'copy'},
    )
    return folder / 'hf', folder / 'lora', model.eval()
