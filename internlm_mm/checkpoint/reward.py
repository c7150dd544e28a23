"""Reward models in Hugging Face's form: `...ForSequenceClassification` with one label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from internlm_mm.utils.adapters import is_score
from internlm_mm.utils.weight_layout import Rule, WeightLayout

_LANGUAGE_MODEL, _CLASSIFIER = 'ForCausalLM', 'ForSequenceClassification'


def has_score(model: nn.Module) -> bool:
    """Whether a model is a reward model, with a score in place of the head."""
    return any(is_score(name) for name, _ in model.named_parameters())


def scored_config(form: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json of a reward model, from that of a language model.

    Args:
        form: One of the family's forms.
        config: As the form gives it.

    Raises:
        ValueError: If transformers has no class for it.
    """
    if not form.architecture.endswith(_LANGUAGE_MODEL) or 'auto_map' in config:
        raise ValueError(
            f'format={form.name!r}: a reward model is written as transformers has it, and there is '
            f"no {_CLASSIFIER} of that form: use format='llama'"
        )
    architecture = form.architecture.removesuffix(_LANGUAGE_MODEL) + _CLASSIFIER
    labels = {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
    return {**config, 'architectures': [architecture], 'tie_word_embeddings': False, **labels}


def scored_layout(layout: WeightLayout) -> WeightLayout:
    """Names of weights with those of a score."""
    return replace(layout, rules=(*layout.rules, Rule(('objective.score.',), 'score.')))


class WithScore(Mapping[str, Tensor]):
    """Weights of a model that has a score and no head, from those of one that may have a head.

    Args:
        state: Weights by our names, adapters merged.
        own: What the checkpoint itself holds.
    """

    def __init__(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._state, self._own = state, own
        scores = [name for name in own if is_score(name)]
        names = [name for name in state if name != 'lm_head.weight' and name not in scores]
        self._names = dict.fromkeys([*names, *scores])

    def __getitem__(self, name: str) -> Tensor:
        return (self._own if is_score(name) else self._state)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
