"""Puts the kernels that a config names on the seams of a model: norms, cross-entropy, products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from internlm_mm.ops.needs import Needs, obstacles
from internlm_mm.parallel.fuse import fuse_linears
from internlm_mm.registry import CROSS_ENTROPIES, NORMS
from internlm_mm.utils.suggest import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The options of `strategy.kernels`.

    Attributes:
        norm: A name in NORMS.
        cross_entropy: A name in CROSS_ENTROPIES.
        fuse: Whether layers that read the same input are one matrix product.
        fuse_accumulation: Whether the products of weights' gradients add to those of a step's
            earlier micro-batches themselves, in the dtype of the reduction; 'auto' where it pays.
    """

    norm: str = 'torch'
    cross_entropy: str = 'torch'
    fuse: bool = False
    fuse_accumulation: bool | str = False


def check_kernels(options: Mapping[str, Any] | None) -> Kernels:
    """The options that a strategy was given.

    Raises:
        ValueError: With the key, the value and the nearest choice.
    """
    known = [field.name for field in fields(Kernels)]
    for key, value in (options or {}).items():
        if key not in known:
            hint = did_you_mean(key, known)
            raise ValueError(f'strategy.kernels.{key}={value!r} is unknown.{hint}')
    found = Kernels(**(options or {}))
    for key, registry in (('norm', NORMS), ('cross_entropy', CROSS_ENTROPIES)):
        name = getattr(found, key)
        if not isinstance(name, str) or registry.get(name) is None:
            raise ValueError(
                f'strategy.kernels.{key}={name!r}.{did_you_mean(name, registry.module_dict)}'
            )
    if not isinstance(found.fuse, bool):
        raise ValueError(f'strategy.kernels.fuse={found.fuse!r}: expected True or False')
    if not isinstance(found.fuse_accumulation, bool) and found.fuse_accumulation != 'auto':
        raise ValueError(
            f'strategy.kernels.fuse_accumulation={found.fuse_accumulation!r}: expected True, False '
            "or 'auto'"
        )
    if found.fuse and found.fuse_accumulation is True:
        raise ValueError(
            'strategy.kernels.fuse_accumulation=True does not go with strategy.kernels.fuse=True'
        )
    return found


def check_whole_matrices(kernels: Kernels, tensor_degree: int) -> None:
    """Refuse kernels that take whole matrices where ranks share them, on whatever machine.

    Args:
        kernels: Which.
        tensor_degree: Ranks that share the model's matrices.

    Raises:
        ValueError: Naming the key.
    """
    for key in ('norm', 'cross_entropy'):
        name = getattr(kernels, key)
        if tensor_degree > 1 and name != 'torch':
            raise ValueError(f'strategy.kernels.{key}={name!r} {_no_tensor(tensor_degree)}')


def _no_tensor(degree: int) -> str:
    return f'does not go with strategy.parallel.tensor={degree}'


def apply_kernels(
    model: nn.Module,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    tensor_degree: int = 1,
) -> None:
    """Set the seams of a model; what is 'torch' is left as it is.

    Args:
        model: Changed in place.
        kernels: Which.
        device: Where the model will run.
        dtype: What it computes in.
        tensor_degree: Ranks that share its matrices.

    Raises:
        ValueError: If a kernel cannot run here, or the model has no seam for it.
        ImportError: If apex is missing, or another package of that name is installed.
    """
    if kernels.norm != 'torch':
        norm = _kernel('norm', kernels.norm, NORMS, device, dtype, tensor_degree)
        _set_seam(model, 'norm', norm, f'strategy.kernels.norm={kernels.norm!r}')
    # Of a pipeline, only the last stage has a head, or an objective that takes its place.
    replaced = getattr(getattr(model, 'objective', None), 'replaces_head', False)
    has_end = replaced or getattr(model, 'lm_head', model) is not None
    if kernels.cross_entropy != 'torch' and has_end:
        name = kernels.cross_entropy
        loss = _kernel('cross_entropy', name, CROSS_ENTROPIES, device, dtype, tensor_degree)
        _set_seam(model, 'cross_entropy', loss, f'strategy.kernels.cross_entropy={name!r}')
    if kernels.fuse:
        fuse_linears(model)


def _kernel(
    key: str, name: str, registry: Any, device: torch.device, dtype: torch.dtype, degree: int
) -> Any:
    kernel = registry.get(name)
    found = obstacles(getattr(kernel, 'needs', Needs()), device, dtype)
    if degree > 1:
        found.append(_no_tensor(degree))
    missing: list[str] = getattr(kernel, 'missing', list)()
    if found or missing:
        error = ValueError if found else ImportError
        raise error(f'strategy.kernels.{key}={name!r} {"; ".join([*found, *missing])}')
    return kernel


def _set_seam(model: nn.Module, seam: str, kernel: Any, wanted: str) -> None:
    """On every module that has a function of this name; a module of this name is none."""
    count = 0
    for module in model.modules():
        current = getattr(module, seam, None)
        if callable(current) and not isinstance(current, nn.Module):
            setattr(module, seam, kernel)
            count += 1
    if not count:
        raise ValueError(f'{wanted}: {type(model).__name__} has no seam `{seam}`')
