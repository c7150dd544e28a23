"""Chat templates in Hugging Face's tokenizer folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_jinja import to_jinja
from internlm_mm.tokenizers.chat_templates import build_template

NAME_KEY = 'chat_template_name'
"""Key of tokenizer_config.json: our name of the template."""
JINJA_NAME = 'chat_template.jinja'


def write_chat_template(folder: str | Path, template: ChatTemplate) -> None:
    """Put a chat template into the folder of a tokenizer.

    It is written as Jinja, and the template's marks are declared special tokens, under the
    template's name for them, so that they are found in a text and are left out of decoded ones.
    Marks that the vocabulary does not have stay plain text. No id changes.

    Args:
        folder: With tokenizer.json and tokenizer_config.json.
        template: Of the conversations that the model was trained on.
    """
    folder = Path(folder)
    file = folder / 'tokenizer.json'
    content = json.loads(file.read_text(encoding='utf-8'))
    special = [mark for mark in template.marks if _declare(content, template, mark)]
    content['added_tokens'].sort(key=lambda token: token['id'])
    _write(file, content)
    file = folder / 'tokenizer_config.json'
    config = json.loads(file.read_text(encoding='utf-8'))
    config[NAME_KEY] = template.name
    config.pop('chat_template', None)  # it may lie here or in a file of its own
    # transformers 5 reads this name, too; under its own, `extra_special_tokens`, 4 takes no list.
    known = list(config.get('additional_special_tokens') or ())
    if isinstance(config.get('extra_special_tokens'), list):
        known += config.pop('extra_special_tokens')
    config['additional_special_tokens'] = [*known, *(m for m in special if m not in known)]
    _write(file, config)
    (folder / JINJA_NAME).write_text(to_jinja(template), encoding='utf-8')


def same_template(source: str, name: str) -> bool:
    """Whether a chat template in Jinja is what `write_chat_template` writes for `name`."""
    return source.strip() == to_jinja(build_template(name)).strip()


def _declare(content: dict[str, Any], template: ChatTemplate, mark: str) -> bool:
    """Make a mark a special token of tokenizer.json; False if the vocabulary lacks it."""
    vocab = content['model']['vocab']
    added = content['added_tokens']
    entry = None
    for name in (mark, template.aliases.get(mark)):
        entry = next((token for token in added if token['content'] == name), None)
        if entry is None and name in vocab:
            entry = {'id': vocab[name]}
            added.append(entry)
        if entry is not None:
            if name in vocab:
                vocab[mark] = vocab.pop(name)
            break
    if entry is None:
        return False
    plain = {'single_word': False, 'lstrip': False, 'rstrip': False}
    entry.update(content=mark, normalized=False, special=True, **plain)
    return True


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
