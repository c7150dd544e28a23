"""Which runs `tools/bare_loop.py` has the step of, and what they have beyond it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper
from internlm_mm.parallel.kernels import Kernels
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.reducing import wide_add_kernel
from internlm_mm.parallel.strategy import HybridParallelStrategy
from internlm_mm.registry import (
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from internlm_mm.utils.resolve import resolve_type


def check_bare(config: Config, strategy: HybridParallelStrategy) -> None:
    """Refuse a run whose step the bare loop does not take: their ratio would mean nothing.

    Args:
        config: Of the run, checked.
        strategy: Of the run; it need not have prepared anything.

    Raises:
        ValueError: With every key and value that the bare loop does not know.
    """
    unknown = [*_of_model(config.model), *_of_optimizer(config.optim_wrapper)]
    unknown += _of_strategy(strategy)
    if unknown:
        raise ValueError(f'--against bare: the bare loop knows no {", no ".join(unknown)}')


def _of_model(model: Any) -> Iterator[str]:
    named = resolve_type(model.type, MODELS, 'model.type')
    if not named.__module__.startswith('internlm_mm.models.'):
        yield f'model.type={named.__name__}'
    if model.get('adapter') is not None:
        yield 'model.adapter'


def _of_optimizer(wrapper: Any) -> Iterator[str]:
    places = (
        ('type', wrapper, OPTIM_WRAPPERS, HybridZeroOptimWrapper),
        ('constructor', wrapper, OPTIM_WRAPPER_CONSTRUCTORS, DecayGroupsConstructor),
        ('optimizer.type', wrapper.get('optimizer') or {}, OPTIMIZERS, AdamW),
    )
    for key, where, registry, known in places:
        key = f'optim_wrapper.{key}'
        named = resolve_type(where.get(key.rpartition('.')[2], known), registry, key)
        if named is not known:
            yield f'{key}={named.__name__}'
    if not wrapper.get('clip_grad'):
        yield f'optim_wrapper.clip_grad={wrapper.get("clip_grad")!r}'
    if wrapper.get('loss_scale') is not None:
        yield 'optim_wrapper.loss_scale'


def _of_strategy(strategy: HybridParallelStrategy) -> Iterator[str]:
    techniques, known = strategy.techniques, Techniques()
    if techniques.param_dtype not in (torch.float32, torch.bfloat16):
        yield f'strategy.precision.param={str(techniques.param_dtype).removeprefix("torch.")!r}'
    for key in ('reshard', 'recompute', 'offload'):
        value = getattr(techniques, key)
        if value != getattr(known, key):
            yield f'strategy.{key}={value!r}'
    if techniques.float8 is not None:
        yield 'strategy.float8'
    for key, value in asdict(techniques.kernels).items():
        if key != 'fuse_accumulation' and value != getattr(Kernels(), key):
            yield f'strategy.kernels.{key}={value!r}'
    for axis, degree in strategy.layout.as_dict().items():
        if axis != 'data_shard' and degree > 1:
            yield f'strategy.parallel.{axis}={degree}'


def attention_of(model: nn.Module) -> Callable[..., Tensor] | None:
    """The function that a model's layers attend by, which one placed model has one of."""
    return next((m.attend for m in model.modules() if hasattr(m, 'attend')), None)  # type: ignore[return-value]


def beyond_bare(model: nn.Module, device: torch.device) -> list[str]:
    """What makes the step of a placed model another than the bare loop's, for the report."""
    found = []
    if hasattr(model, 'gradient_sums'):
        found.append('gradients of weights that add up in their products (fuse_accumulation)')
    if device.type == 'cuda' and isinstance(model, FSDPModule) and wide_add_kernel() is not None:
        found.append('a kernel that adds the gradients of micro-batches to those that wait')
    return found
