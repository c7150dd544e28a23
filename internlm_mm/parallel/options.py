"""Options of a strategy that can be judged before there is a process group."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internlm_mm.parallel.data import RESHARD
from internlm_mm.utils.device import dtype_of
from internlm_mm.utils.suggest import did_you_mean


def check_dist_cfg(dist_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that the process group has no use for."""
    for key in dist_cfg:
        if key not in ('backend', 'timeout'):
            hint = did_you_mean(key, ('backend', 'timeout'))
            raise ValueError(f'env_cfg.dist_cfg.{key}={dist_cfg[key]!r} is unknown.{hint}')


def check_loss_scale(param_dtype: torch.dtype, optim_wrapper: Any) -> None:
    """Raise ValueError if fp16 would train without a loss scale: small gradients would vanish."""
    if param_dtype == torch.float16 and getattr(optim_wrapper, 'loss_scale', None) is None:
        raise ValueError(
            "strategy.precision.param='float16' needs optim_wrapper.loss_scale=dict(), "
            "on a command line optim_wrapper.loss_scale.initial=65536.0; 'bfloat16' needs none"
        )


def by_iteration(scheduler: Any) -> list[Any]:
    """Configs of schedulers that count iterations, where MMEngine's default counts epochs.

    Raises:
        ValueError: If one asks for epochs.
    """
    filled = []
    for index, config in enumerate(scheduler if isinstance(scheduler, Sequence) else [scheduler]):
        if isinstance(config, dict):
            config = {'by_epoch': False, **config}
            if config['by_epoch']:
                raise ValueError(
                    f'param_scheduler.{index}.by_epoch=True: training has no epochs, '
                    'only iterations'
                )
        filled.append(config)
    return filled


def check_options(
    precision: Mapping[str, str] | None, reshard: str
) -> tuple[torch.dtype, torch.dtype]:
    """Precision and reshard.

    Returns:
        What layers compute in, and what gradients are summed in.

    Raises:
        ValueError: With the key, the value and the nearest choice.
    """
    if reshard not in RESHARD:
        raise ValueError(f'strategy.reshard={reshard!r}.{did_you_mean(reshard, RESHARD)}')
    names = {'param': 'float32', 'reduce': 'float32'}
    for key, name in (precision or {}).items():
        if key not in names:
            raise ValueError(
                f'strategy.precision.{key}={name!r} is unknown.{did_you_mean(key, names)}'
            )
        names[key] = name
    param, reduce = (dtype_of(names[key], f'strategy.precision.{key}') for key in names)
    return param, reduce
