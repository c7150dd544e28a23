"""The chat template of a model on disk."""

from __future__ import annotations

import json
from pathlib import Path

from internlm_mm.checkpoint.peft_files import is_peft_folder
from internlm_mm.checkpoint.pretrained import is_hf_folder, load_tokenizer_of
from internlm_mm.checkpoint.step_folders import TOKENIZER_FOLDER, find_checkpoint, read_config
from internlm_mm.tokenizers.chat_choice import (
    recorded_template,
    suitable_template,
    template_of_jinja,
)


def stored_template(path: str | Path) -> str | None:
    """Name of the chat template that a model was trained with; None for a base model.

    It is in the folder of the tokenizer, by its name or as Hugging Face's chat template, or in the
    config of the run as `chat_template`.

    Args:
        path: A work dir, a checkpoint `iter_N`, a Hugging Face folder, or one of PEFT.

    Raises:
        FileNotFoundError: If there is no model at `path`.
    """
    if is_hf_folder(path) or is_peft_folder(path):
        folder, config = Path(path), None
    else:
        checkpoint = find_checkpoint(path)
        folder, config = checkpoint / TOKENIZER_FOLDER, read_config(checkpoint)
    return recorded_template(folder, config) or template_of_jinja(folder, _family(path))


def template_for(path: str | Path) -> str:
    """Name of the chat template that suits a model best.

    In this order: the one it was trained with, as far as that is written down; the one whose
    special tokens its tokenizer has; that of its family; ChatML. Arguments as in
    `stored_template`.
    """
    return stored_template(path) or suitable_template(load_tokenizer_of(path), _family(path))


def _family(path: str | Path) -> str:
    """What a model calls itself, in small letters."""
    if is_hf_folder(path) or is_peft_folder(path):
        file = Path(path) / 'config.json'
        config = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
        return f'{config.get("model_type")} {config.get("architectures")}'.lower()
    model = read_config(find_checkpoint(path)).get('model') or {}
    return str(model.get('type')).rpartition('.')[2].lower()
