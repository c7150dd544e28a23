"""Running a model whose weights never are in memory together: each module's come when it runs."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm_mm.checkpoint.hf_files import HFWeights
from internlm_mm.checkpoint.remote import FORMATS, model_class


@contextmanager
def streamed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside the block, a model on the meta device can run, in float32 on the CPU.

    A module's own weights are read before its forward and given up after it, so that memory holds
    those of one module, not of a model. A module without any that uses another's, as a tied head
    does, names that one as its `lender`.

    Args:
        model: Its parameters are on the meta device. One that several modules use is read for each.
        weights: By the model's own names, each read when asked for, as often as its module runs.
    """
    shared = shared_parameters(model)
    paths = {module: path for path, module in model.named_modules()}
    handles = []
    for module in paths:
        owner = getattr(module, 'lender', module)
        parameters = dict(owner.named_parameters(recurse=False))
        if parameters:
            full = {name: f'{paths[owner]}.{name}'.removeprefix('.') for name in parameters}
            names = {name: shared.get(path, path) for name, path in full.items()}
            read = partial(_read, owner, names, weights)
            handles.append(module.register_forward_pre_hook(read))
            handles.append(module.register_forward_hook(partial(_give_up, owner, parameters)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several, and the first of each."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    return aliases


def hf_model(folder: Path) -> tuple[nn.Module, HFWeights]:
    """The model that transformers makes of a folder, on the meta device, and its weights.

    What it computes from its configuration, such as rotary frequencies, is there. Code that lies in
    the folder is not run: for formats with modeling files of ours the packaged ones are.

    Raises:
        ValueError: If the names or shapes of the weights are not the model's.
    """
    # Only converting needs transformers, which takes seconds to import.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    said = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    with torch.device('meta'):
        if said.get('model_type') in FORMATS:
            config_class, model_type = model_class(said)
            config = config_class.from_pretrained(folder, local_files_only=True)
            model = model_type(config).eval()
        else:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            classifies = str(said.get('architectures')).endswith("ForSequenceClassification']")
            kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
            model = kind.from_config(config, dtype=torch.float32).eval()
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(path, type(module)(config))
    weights = HFWeights(folder)
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: weights.shape(name) for name in weights}
    if wanted != found:
        name = next(n for n in (*wanted, *found) if wanted.get(n) != found.get(n))
        raise ValueError(
            f'{folder}: {name!r} has shape {found.get(name)} in the files and {wanted.get(name)} '
            f'in {type(model).__name__}'
        )
    return model, weights


def _read(owner: nn.Module, names: dict[str, str], weights: Mapping[str, Tensor], *_: Any) -> None:
    for name, stored in names.items():
        value = weights[stored].to(torch.float32)
        setattr(owner, name, nn.Parameter(value, requires_grad=False))


def _give_up(owner: nn.Module, empty: dict[str, nn.Parameter], *_: Any) -> None:
    for name, parameter in empty.items():
        setattr(owner, name, parameter)
    _return_memory()


def _return_memory() -> None:
    """Give freed memory back to the system.

    The C library keeps what lies between pieces in use, and weights of the next module need not
    fit in there: without this, memory grew with the number of layers.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc has it
    if trim is not None:
        trim(0)
