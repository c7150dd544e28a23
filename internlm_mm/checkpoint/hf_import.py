"""Models of Hugging Face folders, of any family and form, and their weights into a model.

What differs between families is told by their `hf_forms`; see `internlm_mm.models.hf_forms`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm_mm.checkpoint.hf_files import HFWeights
from internlm_mm.checkpoint.streaming import shared_parameters
from internlm_mm.registry import MODELS

LOG = logging.getLogger(__name__)

_EMBEDDING, _HEAD = 'embed_tokens.weight', 'lm_head.weight'


def import_hf(folder: str | Path) -> tuple[dict[str, Any], HFWeights]:
    """Read a Hugging Face folder, of any family and form; nothing but config.json and names.

    Args:
        folder: Local folder.

    Returns:
        A config that `MODELS.build` takes, and the weights by our names, each read when asked for.

    Raises:
        FileNotFoundError: If config.json or the weights are missing.
        ValueError: If no registered family is what config.json describes, or files are damaged.
    """
    folder = Path(folder)
    file = folder / 'config.json'
    if not file.is_file():
        raise FileNotFoundError(f'{folder} is no Hugging Face model: config.json is missing')
    try:
        said = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:  # of the text's encoding, too
        raise ValueError(f'{file} is truncated or damaged: {error}') from error
    if not isinstance(said, dict):
        raise ValueError(f'{file} is truncated or damaged: it holds no table')
    form, family, arguments = _find_family(said, file)
    heads = arguments['num_heads']
    weights = HFWeights(folder, form.layout(heads, arguments.get('num_kv_heads', heads)))
    if arguments.get('tie_word_embeddings') and not weights.tie(_HEAD, _EMBEDDING):
        # As transformers does.
        LOG.warning(f'{folder}: {_HEAD} differs from {_EMBEDDING}, so they are not tied')
        arguments['tie_word_embeddings'] = False
    return {'type': family, **arguments}, weights


def fill_model(
    model: nn.Module, state: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Give a model that was built on the meta device its weights, for inference.

    Args:
        model: Changed in place and returned, in evaluation mode and without gradients.
        state: Weights by our names.
        device: Where the model goes.
        dtype: Of its parameters.

    Raises:
        ValueError: If names or shapes do not fit.
    """
    check_names({name: tuple(p.shape) for name, p in model.named_parameters()}, state)
    shared = shared_parameters(model)
    model.to(dtype).to_empty(device=device)
    for alias, name in shared.items():  # `to_empty` has parted them
        module, _, attribute = alias.rpartition('.')
        setattr(model.get_submodule(module), attribute, model.get_parameter(name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = state[name]
            if weight.shape != parameter.shape:
                raise ValueError(
                    f'{name} has shape {list(weight.shape)} in the file, '
                    f'{list(parameter.shape)} in the model'
                )
            parameter.copy_(weight)
    return model.eval().requires_grad_(False)


def check_names(wanted: Mapping[str, object], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming them, if weights are missing from `state` or left over in it."""
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing:
        raise ValueError(f'{len(missing)} weights are missing, the first is {missing[0]!r}')
    if extra:
        raise ValueError(f'{len(extra)} weights belong to no parameter, the first is {extra[0]!r}')


def _find_family(config: Mapping[str, Any], file: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The form of a config.json, the family it describes, and its constructor's arguments."""
    MODELS.import_from_location()
    families = [f for f in dict.fromkeys(MODELS.module_dict.values()) if hasattr(f, 'hf_forms')]
    pairs = [(form, family) for family in families for form in family.hf_forms]
    fitting = [(form, family) for form, family in pairs if form.describes(config)]
    if not fitting:
        known = dict.fromkeys(f'{form.architecture} ({form.model_type})' for form, _ in pairs)
        raise ValueError(
            f'{file} has model_type={config.get("model_type")!r}, '
            f'architectures={config.get("architectures")!r}: no model that is known here. '
            f'Known are {", ".join(known)}'
        )
    found, refusals = [], []
    for form, family in fitting:
        try:
            found.append((form, family, form.arguments(family, config)))
        except ValueError as error:
            refusals.append(str(error))
    if not found:
        raise ValueError(f'{file}: ' + '; '.join(dict.fromkeys(refusals)))
    # Several families have Llama's form: the one whose biases are so by default, and of two such
    # the one that has no other form.
    return min(found, key=lambda one: ('attention_bias' in one[2], len(one[1].hf_forms)))
