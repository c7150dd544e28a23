"""Which chat template a model was trained with, or else suits it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internlm_mm.checkpoint.checkpointer import TOKENIZER_FOLDER, find_checkpoint, read_config
from internlm_mm.checkpoint.pretrained import is_hf_folder
from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers import Tokenizer, load_tokenizer
from internlm_mm.tokenizers.chat_export import JINJA_NAME, NAME_KEY, same_template

# Marks that only one template has, in the order in which they are looked for.
_SIGNS = (
    ('internlm2', ('<|action_start|>', '[UNUSED_TOKEN_146]')),
    ('llama3', ('<|start_header_id|>',)),
    ('chatml', ('<|im_start|>',)),
    ('internlm_v1_1', ('<TOKENS_UNUSED_2>',)),
    ('internlm', ('<eoh>', '<|User|>:')),
)
_FAMILIES = (
    ('internlm2', ('internlm2', 'internlm3')),
    ('internlm', ('internlm',)),
    ('chatml', ('qwen',)),
)
_FALLBACK = 'chatml'


def template_for(path: str | Path) -> str:
    """Name of the chat template that suits a model best.

    In this order: the one it was trained with, as far as that is written down; the one whose
    special tokens its tokenizer has; that of its family; ChatML.

    Args:
        path: A work dir, a checkpoint `iter_N`, or a Hugging Face folder.

    Raises:
        FileNotFoundError: If there is no model at `path`.
    """
    name = stored_template(path)
    if name is not None:
        return name
    folder = _tokenizer_folder(Path(path))
    family = _family(Path(path))
    if any((folder / file).is_file() for file in ('tokenizer.json', 'tokenizer.model')):
        name = _by_tokens(load_tokenizer(folder), family)
    return name or next(
        (name for name, words in _FAMILIES if any(word in family for word in words)), _FALLBACK
    )


def stored_template(path: str | Path) -> str | None:
    """Name of the chat template that a model was trained with; None for a base model.

    It is in the folder of the tokenizer, by its name or as Hugging Face's chat template, or in the
    config of the run, as `chat_template`. Arguments as in `template_for`.
    """
    folder = _tokenizer_folder(Path(path))
    said = _read_json(folder / 'tokenizer_config.json')
    name = said.get(NAME_KEY)
    if isinstance(name, str) and CHAT_TEMPLATES.get(name) is not None:
        return name
    if not is_hf_folder(path):
        for name in _named_in(read_config(find_checkpoint(path))):
            if CHAT_TEMPLATES.get(name) is not None:
                return name
    file = folder / JINJA_NAME
    source = file.read_text(encoding='utf-8') if file.is_file() else said.get('chat_template')
    if isinstance(source, list):  # several, each with a name
        source = next((t.get('template') for t in source if t.get('name') == 'default'), None)
    return _by_jinja(source, _family(Path(path))) if isinstance(source, str) and source else None


def _by_jinja(source: str, family: str) -> str:
    for name in sorted(CHAT_TEMPLATES.module_dict):
        if same_template(source, name):
            return name
    if '<|im_start|>' in source:
        tells = '<|plugin|>' in source or '<|action_start|>' in source or 'internlm' in family
        return 'internlm2' if tells else 'chatml'
    return next(
        (name for name, marks in _SIGNS if any(mark in source for mark in marks)), _FALLBACK
    )


def _by_tokens(tokenizer: Tokenizer, family: str) -> str | None:
    for name, marks in _SIGNS:
        if any(tokenizer.token_id(mark) is not None for mark in marks):
            # Both InternLM chats of 2023 have one vocabulary; the first is the one without tools.
            return 'internlm' if name == 'internlm_v1_1' and 'internlm' in family else name
    return None


def _tokenizer_folder(path: Path) -> Path:
    return path if is_hf_folder(path) else find_checkpoint(path) / TOKENIZER_FOLDER


def _family(path: Path) -> str:
    """What the model calls itself, in small letters."""
    if is_hf_folder(path):
        config = _read_json(path / 'config.json')
        return f'{config.get("model_type")} {config.get("architectures")}'.lower()
    model = read_config(find_checkpoint(path)).get('model') or {}
    return str(model.get('type')).rpartition('.')[2].lower()


def _named_in(config: object) -> Iterator[str]:
    """Every `chat_template` of a config, whether a name or a dict with `type`."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == 'chat_template':
                name = value.get('type') if isinstance(value, Mapping) else value
                if isinstance(name, str):
                    yield name.rpartition('.')[2]
            yield from _named_in(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _named_in(value)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
