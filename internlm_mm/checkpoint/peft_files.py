"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

In it names are those of a Hugging Face Llama, which ours are but for the beginning. A model that
packs its projections, as InternLM2's own format does, has no place for them: such a base is
exported as `llama` first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm_mm.checkpoint.adapters import Merged, build_adapter, read_frozen
from internlm_mm.checkpoint.base import recorded_base
from internlm_mm.checkpoint.foreign import is_foreign, open_source
from internlm_mm.checkpoint.hf_files import is_hf_folder, publish_folder, write_json
from internlm_mm.checkpoint.huggingface import find_form, write_tokenizer
from internlm_mm.checkpoint.peft_config import CONFIG_NAME, read_peft_config
from internlm_mm.checkpoint.pickled import open_tensors
from internlm_mm.checkpoint.reward import scored_config, scored_layout
from internlm_mm.checkpoint.step_folders import (
    TOKENIZER_FOLDER,
    check_whole,
    find_checkpoint,
    read_config,
    read_model_state,
)
from internlm_mm.checkpoint.tensor_file import Entry, write_tensor_file
from internlm_mm.checkpoint.vocabulary import find_tokenizer
from internlm_mm.registry import MODELS
from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.chat_choice import recorded_template
from internlm_mm.utils.adapters import is_adapter, is_score, layer_of

LOG = logging.getLogger(__name__)

WEIGHTS_NAME = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder holds adapters in PEFT's format."""
    return (Path(path) / CONFIG_NAME).is_file()


def export_peft(checkpoint: str | Path, out: str | Path, overwrite: bool = False) -> int:
    """Write the adapters of a checkpoint, and its tokenizer, so that `peft` loads them.

    Those of a reward model go with its score, over transformers' `...ForSequenceClassification` of
    the frozen weights with `num_labels=1`.

    Args:
        checkpoint: A work dir or a checkpoint `iter_N`. Frozen weights need not be there.
        out: The folder to make.
        overwrite: Whether an existing `out` is replaced.

    Returns:
        Bytes of the weights.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False.
        ValueError: If the checkpoint has no adapters, or its family no form with Llama's names.
    """
    checkpoint = find_checkpoint(checkpoint)
    check_whole(checkpoint)
    said = dict(read_config(checkpoint)['model'])
    said.pop('objective', None)
    adapter = said.pop('adapter', None)
    if adapter is None:
        raise ValueError(f'{checkpoint} has no adapters: model.adapter is not in its config')
    with torch.device('meta'):
        model: Any = MODELS.build(said)
    form = find_form(model, None)
    layout = form.layout(model.num_heads, model.num_kv_heads)
    state = read_model_state(checkpoint)
    scores = sorted(filter(is_score, state))
    if scores:
        scored_config(form, form.config_of(model))  # or an error, where transformers has no class
        layout = scored_layout(layout)
    names = {
        name: _PREFIX + layout.stored(name).name
        for name in [*sorted(filter(is_adapter, state)), *scores]
    }
    layers = {
        layer_of(name): layer_of(stored) for name, stored in names.items() if is_adapter(name)
    }
    with publish_folder(Path(out), overwrite) as folder:
        tensors = {stored: state[name] for name, stored in names.items()}
        entries = [Entry(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        size, _ = write_tensor_file(folder / WEIGHTS_NAME, entries, iter(tensors.values()))
        content = _config_of(build_adapter(adapter), model, layers)
        if scores:
            content |= {'task_type': 'SEQ_CLS', 'modules_to_save': ['score']}
        content['base_model_name_or_path'] = _base_of(checkpoint, layers)
        write_json(folder / CONFIG_NAME, content)
        tokenizer = find_tokenizer(checkpoint / TOKENIZER_FOLDER)
        if tokenizer is not None:
            template = recorded_template(checkpoint / TOKENIZER_FOLDER, read_config(checkpoint))
            chat_template = None if template is None else build_template(template)
            write_tokenizer(tokenizer, folder, chat_template=chat_template)
    return size


def _config_of(adapter: Any, model: nn.Module, layers: Mapping[str, str]) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        adapter: What `model.adapter` builds.
        model: The model without adapters.
        layers: Adapted layers, our names to those of the format.
    """
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    ends = {name.rpartition('.')[2] for name in layers}
    everywhere = all(name in layers for name in linear if name.rpartition('.')[2] in ends)
    whole = sorted(name.removeprefix(_PREFIX) for name in layers.values())
    return {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'r': adapter.rank,
        'lora_alpha': adapter.alpha,
        'lora_dropout': adapter.dropout,
        'use_rslora': adapter.rslora,
        'use_dora': adapter.dora,
        'target_modules': sorted(ends) if everywhere else whole,
        'bias': 'none',
        'fan_in_fan_out': False,
        'init_lora_weights': True,
        'inference_mode': True,
        'modules_to_save': None,
    }


def _base_of(checkpoint: Path, layers: Mapping[str, str]) -> str | None:
    """The folder that `peft` finds the frozen weights in, if there is one of Llama's names."""
    base = recorded_base(checkpoint)
    if base is None or not is_foreign(base.path) or not is_hf_folder(base.path):
        LOG.warning(
            f'{checkpoint}: its frozen weights are in no Hugging Face folder: peft is to be given '
            'an export of them, and base_model_name_or_path stays empty'
        )
        return None
    weights = open_source(base.path, **base.options).weights
    for ours, theirs in layers.items():
        if _PREFIX + weights.stored_name(f'{ours}.weight') != f'{theirs}.weight':
            LOG.warning(
                f'{base.path} packs its weights in a way that adapters do not fit: export it with '
                'tools/convert2hf.py --format llama, and give that to peft'
            )
            return None
    return str(base.path)


def adapter_of_peft(folder: str | Path, num_layers: int | None = None) -> dict[str, Any]:
    """`model.adapter` of a config, for the adapters in a folder.

    Args:
        folder: Has the two files.
        num_layers: Of the model that they are of. Where it is known, and all of its layers are
            adapted alike, targets are few names instead of those of all layers.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If they are damaged, or ask for what is not known here.
    """
    said = read_peft_config(folder)
    layers = sorted({layer_of(name) for name in _names(folder)})
    ends = sorted({name.rpartition('.')[2] for name in layers})
    everywhere = num_layers is not None and len(layers) == len(ends) * num_layers
    return {
        'type': 'LoRA',
        'rank': said['r'],
        'alpha': float(said['lora_alpha']),
        'targets': ends if everywhere else layers,
        'dropout': float(said.get('lora_dropout') or 0.0),
        'rslora': bool(said.get('use_rslora')),
        'dora': bool(said.get('use_dora')),
    }


def check_peft(folder: str | Path, model: nn.Module, adapter: Mapping[str, Any] | None) -> None:
    """Compare a folder of PEFT with a model that is to take its adapters.

    Args:
        folder: Has the two files.
        model: With adapters; may be on the meta device.
        adapter: `model.adapter` of the run's config.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: Naming the setting or the tensor that does not fit.
    """
    said = adapter_of_peft(folder, _depth(model))
    theirs = build_adapter(said)
    wanted = {name: list(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    if not wanted or adapter is None:
        raise ValueError(
            f'{folder} holds adapters, and the model has none: set model.adapter={said}'
        )
    ours = build_adapter(adapter)
    for key in ('rank', 'alpha', 'rslora', 'dora'):
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(
                f'model.adapter.{key}={getattr(ours, key)!r}, but {folder} has adapters of '
                f'{key}={getattr(theirs, key)!r}'
            )
    found = _names(folder)
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f'{folder}: {name!r} has shape {found.get(name)} there and {wanted.get(name)} in '
                f'this {type(model).__name__}'
            )


def read_peft(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder's adapters, by our names."""
    with open_tensors(_weights(folder)) as file:
        return {_ours(name, folder): file.get_tensor(name) for name in file.keys()}


def peft_base(folder: str | Path, base: str | Path | None = None) -> Path:
    """Where the frozen weights under a folder's adapters are.

    Raises:
        FileNotFoundError: If they are nowhere; nothing is downloaded.
    """
    said = base or read_peft_config(folder).get('base_model_name_or_path')
    if not said:
        raise FileNotFoundError(
            f'{folder} holds adapters, and does not say of which weights: say with base where '
            'they are'
        )
    if not Path(said).is_dir():
        raise FileNotFoundError(
            f'{folder} holds adapters of the weights in {said!r}, which is no folder: say with '
            'base where they are'
        )
    return Path(said)


def open_peft(
    folder: str | Path, base: str | Path | None = None
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A model of frozen weights and a folder's adapters.

    Args:
        folder: Has the two files.
        base: Where the frozen weights are, if not where the folder says: a Hugging Face folder, one
            of InternLM's shards, a work dir or a checkpoint.

    Returns:
        A config that `MODELS.build` takes, and the merged weights by our names.

    Raises:
        FileNotFoundError: If something is missing.
        ValueError: If the two do not belong together.
    """
    path = peft_base(folder, base)
    said, tensors = adapter_of_peft(folder), read_peft(folder)
    adapter = build_adapter(said)
    if is_foreign(path):
        source = open_source(path)
        config, weights = source.config, source.weights
    else:
        path = find_checkpoint(path)
        config = {k: v for k, v in read_config(path)['model'].items() if k != 'objective'}
        weights = read_frozen(path)
    with torch.device('meta'):
        model = MODELS.build(dict(config))
    try:
        adapter.apply(model)
    except ValueError as error:
        raise ValueError(f'{folder} does not fit the weights in {path}: {error}') from error
    check_peft(folder, model, said)
    return config, Merged(weights, tensors, adapter)


def _depth(model: Any) -> int | None:
    layers = getattr(model, 'layers', None)
    return None if layers is None else len(layers)


def _names(folder: str | Path) -> dict[str, list[int]]:
    with open_tensors(_weights(folder)) as file:
        return {_ours(name, folder): file.get_slice(name).get_shape() for name in file.keys()}


def _weights(folder: str | Path) -> Path:
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f'{folder} holds no {WEIGHTS_NAME}; adapters in pickled files are not read'
        )
    return path


def _ours(name: str, folder: str | Path) -> str:
    ours = name.removeprefix(f'{_PREFIX}model.')
    if ours == name or not ours.startswith('layers.') or not is_adapter(ours):
        raise ValueError(
            f"{folder}: {name!r} is no adapter of a linear layer of Llama's names, as "
            f"'{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight'"
        )
    # Before the format had a module of its own for it, it ended without `.weight`.
    return f'{ours}.weight' if ours.endswith('lora_magnitude_vector') else ours
