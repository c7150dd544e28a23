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
    those of one module, not of a model.

    Args:
        model: Its parameters are on the meta device and no module uses those of another.
        weights: By the model's own names, each read when asked for, as often as its module runs.
    """
    handles = []
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if parameters:
            prefix = f'{path}.' if path else ''
            read = partial(_read, list(parameters), prefix, weights)
            handles.append(module.register_forward_pre_hook(read))
            handles.append(module.register_forward_hook(partial(_give_up, parameters)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def hf_model(folder: Path) -> tuple[nn.Module, HFWeights]:
    """The model that transformers makes of a folder, on the meta device, and its weights.

    What it computes from its configuration, such as rotary frequencies, is there. Code that lies in
    the folder is not run: for formats with modeling files of ours the packaged ones are.

    Raises:
        ValueError: If the names or shapes of the weights are not the model's.
    """
    # Only converting needs transformers, which takes seconds to import.
    from transformers import AutoConfig, AutoModelForCausalLM

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
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(path, type(module)(config))
    weights = HFWeights(folder, {'': ''})
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: weights.shape(name) for name in weights}
    if wanted != found:
        name = next(n for n in (*wanted, *found) if wanted.get(n) != found.get(n))
        raise ValueError(
            f'{folder}: {name!r} has shape {found.get(name)} in the files and {wanted.get(name)} '
            f'in {type(model).__name__}'
        )
    return model, weights


def _read(
    names: list[str], prefix: str, weights: Mapping[str, Tensor], module: nn.Module, _: Any
) -> None:
    for name in names:
        value = weights[prefix + name].to(torch.float32)
        setattr(module, name, nn.Parameter(value, requires_grad=False))


def _give_up(empty: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
    for name, parameter in empty.items():
        setattr(module, name, parameter)
    _return_memory()


def _return_memory() -> None:
    """Give freed memory back to the system.

    The C library keeps what lies between pieces in use, and weights of the next module need not
    fit in there: without this, memory grew with the number of layers.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc has it
    if trim is not None:
        trim(0)
