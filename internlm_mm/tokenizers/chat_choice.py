"""Which chat template a model was trained with, or else suits it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.chat_export import JINJA_NAME, NAME_KEY, same_template

# Tokens that tell templates apart, in the order in which they are looked for.
_SIGNS = (
    ('internlm2', ('<|action_start|>', '[UNUSED_TOKEN_146]')),
    ('llama3', ('<|start_header_id|>',)),
    ('chatml', ('<|im_start|>',)),
    ('internlm_v1_1', ('<TOKENS_UNUSED_2>',)),
    ('internlm', ('<eoh>', '<|User|>:')),
)
_FAMILIES = (
    ('internlm2', ('internlm2',)),
    ('internlm3', ('internlm3',)),
    ('internlm', ('internlm',)),
    ('chatml', ('qwen',)),
)
_FALLBACK = 'chatml'


def recorded_template(folder: str | Path, config: Mapping[str, Any] | None = None) -> str | None:
    """Name of the chat template that is written down with a model.

    Args:
        folder: Of its tokenizer, where an export of ours has left the name.
        config: Of the run that trained it: `chat_template`, at any depth, is a name or a dict
            with `type`.

    Returns:
        The name, or None where no template that is registered is named.

    Raises:
        ValueError: If the folder names one that is not registered.
    """
    name = _read_json(Path(folder) / 'tokenizer_config.json').get(NAME_KEY)
    # By names alone: `get` would import what a folder from anywhere calls 'module.function'.
    CHAT_TEMPLATES.import_from_location()
    known = CHAT_TEMPLATES.module_dict
    if name is not None:
        if str(name) not in known:
            raise ValueError(
                f'{folder} was written with the chat template {name!r}, which is not registered '
                "here; name a template, one of a package of your own as 'module:function'"
            )
        return str(name)
    return next((n for n in _named_in(config) if n in known), None)


def template_of_jinja(folder: str | Path, family: str) -> str | None:
    """Which of our templates the chat template in a Hugging Face folder resembles, if there is one.

    Args:
        folder: Of the tokenizer.
        family: What the model calls itself, in small letters.
    """
    file = Path(folder) / JINJA_NAME
    said = _read_json(Path(folder) / 'tokenizer_config.json').get('chat_template')
    source = file.read_text(encoding='utf-8') if file.is_file() else said
    if isinstance(source, list):  # several, each with a name
        source = next((t.get('template') for t in source if t.get('name') == 'default'), None)
    if not isinstance(source, str) or not source:
        return None
    for name in sorted(CHAT_TEMPLATES.module_dict):
        if same_template(source, name):
            return name
    if '<|im_start|>' in source:
        tells = '<|plugin|>' in source or '<|action_start|>' in source or 'internlm' in family
        return _by_family(family, 'internlm2') if tells else 'chatml'
    found = (name for name, marks in _SIGNS if any(mark in source for mark in marks))
    return next(found, _FALLBACK)


def suitable_template(tokenizer: Tokenizer | None, family: str) -> str:
    """The template whose tokens a vocabulary has, else the family's, else ChatML.

    Args:
        tokenizer: Of the model; None where there is none.
        family: What the model calls itself, in small letters.
    """
    for name, marks in _SIGNS:
        if tokenizer and any(tokenizer.token_id(mark) is not None for mark in marks):
            # The chats of 2023 share one vocabulary; the first is the one without functions.
            return 'internlm' if name == 'internlm_v1_1' else name
    return _by_family(family, _FALLBACK)


def _by_family(family: str, fallback: str) -> str:
    found = (name for name, words in _FAMILIES if any(word in family for word in words))
    return next(found, fallback)


def _named_in(config: object) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == 'chat_template':
                name = value.get('type') if isinstance(value, Mapping) else value
                if isinstance(name, str):
                    yield name.rpartition('.')[2]  # configs are stored with dotted names
            yield from _named_in(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _named_in(value)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
