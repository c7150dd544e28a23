"""Whether token ids mean to weights what they mean to the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm_mm.tokenizers import Tokenizer, load_tokenizer

_FILES = ('tokenizer.json', 'tokenizer.model')

_TEXTS = (
    'The quick brown fox jumps over the lazy dog, and then it sleeps for 3,141 hours.',
    'def main(path: str) -> None:\n    for line in open(path):\n        print(line)\n',
    'In the beginning there was nothing; people have written about it ever since.',
)


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None where there is none.

    Raises:
        ValueError: If its files cannot be read.
    """
    stored = any((Path(folder) / name).is_file() for name in _FILES)
    return load_tokenizer(folder) if stored else None


def compare_vocabularies(
    ours: Tokenizer | None, data: Mapping[str, Any], theirs: Tokenizer, folder: str | Path
) -> list[str]:
    """Compare what made a run's ids with the tokenizer that weights were trained with.

    Args:
        ours: The run's; None where its config names none.
        data: The run's datasets by config key. Those of token files say what made them.
        theirs: The tokenizer beside the weights.
        folder: Where that is, for messages.

    Returns:
        What differs a little, such as a few tokens that were added, or cannot be told.

    Raises:
        ValueError: If the same words have other ids.
    """
    if ours is None:
        return [
            difference
            for key, dataset in data.items()
            if (difference := _compare_data(key, dataset, theirs, folder))
        ]
    if ours.hash == theirs.hash:
        return []
    sizes = f'{ours.vocab_size} and {theirs.vocab_size} tokens'
    pairs = [(text, ours.encode(text), theirs.encode(text)) for text in _TEXTS]
    first = next(((text, a, b) for text, a, b in pairs if a != b), None)
    if first is None:
        if ours.vocab_size == theirs.vocab_size:
            return []
        return [f"the config's tokenizer and the one in {folder} have {sizes}"]
    text, a, b = first
    example = f'{text[:19]!r} begins with ids {a[:4]} by the one and {b[:4]} by the other'
    common = sum((Counter(a) & Counter(b)).total() for _, a, b in pairs)
    if 2 * common < sum(max(len(a), len(b)) for _, a, b in pairs):
        raise ValueError(
            f'tokenizer: the one of the config and the one in {folder}, with which the weights '
            f'were trained, are different ({sizes}; {example}): tokenise the data with '
            f'--tokenizer {folder}, and name that in the config'
        )
    return [f"the config's tokenizer and the one in {folder} differ ({sizes}; {example})"]


def _compare_data(key: str, dataset: Any, theirs: Tokenizer, folder: str | Path) -> str | None:
    made_by = (getattr(dataset, 'tokenizer', None) or {}).get('hash')
    if made_by is None or made_by == theirs.hash:
        return None
    return (
        f'{key}.dataset was tokenised by another tokenizer ({dataset.vocab_size} tokens) than the '
        f'one in {folder} ({theirs.vocab_size} tokens); name it in the config (tokenizer) to have '
        'the two compared'
    )
