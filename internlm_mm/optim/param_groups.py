"""Which parameters decay."""

from typing import Any

import torch.distributed as dist
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.optim import Optimizer

from internlm_mm.optim.numbers import check_numbers
from internlm_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from internlm_mm.utils.resolve import resolve_type


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DecayGroupsConstructor(DefaultOptimWrapperConstructor):
    """Two parameter groups: tensors of two or more dimensions decay, norms and biases do not.

    Two groups, not one a parameter as in MMEngine's default with `paramwise_cfg`, so that fused and
    foreach optimizers stay whole. An optimizer that treats parameters by what they are, as
    MuonAdamW does, has a static method `parameter_groups(model)` that makes its groups instead.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with the optimizer's inside.
        paramwise_cfg: Refused: groups follow the rule above.

    Raises:
        ValueError: If there is `paramwise_cfg`, or no config of an optimizer.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg:
            raise ValueError(
                'optim_wrapper.paramwise_cfg is not supported by DecayGroupsConstructor: register '
                'a constructor of your own for other groups (docs/en/plugins.md)'
            )
        optimizer = optim_wrapper_cfg.get('optimizer')
        if not isinstance(optimizer, dict):
            raise ValueError(
                f'optim_wrapper.optimizer={optimizer!r}: expected dict(type=AdamW, lr=...)'
            )
        super().__init__(optim_wrapper_cfg)

    def __call__(self, model: nn.Module) -> Any:
        """Build the optimizer over `model`'s trainable parameters, and its wrapper.

        Raises:
            ValueError: If the optimizer refuses its options.
        """
        optimizer_cfg = dict(self.optimizer_cfg)
        named = resolve_type(optimizer_cfg.get('type'), OPTIMIZERS, 'optim_wrapper.optimizer.type')
        make_groups = getattr(named, 'parameter_groups', _decay_groups)
        optimizer_cfg['params'] = make_groups(model)
        wrapper_cfg = dict(self.optim_wrapper_cfg)
        wrapper_cfg.setdefault('type', 'HybridZeroOptimWrapper')
        check_numbers(optimizer_cfg)
        try:
            optimizer = OPTIMIZERS.build(optimizer_cfg)
        except (ValueError, RuntimeError) as error:  # torch's messages name no key
            if str(error).startswith('optim_wrapper.'):
                raise
            raise ValueError(f'optim_wrapper.optimizer: {error}') from error
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args={'optimizer': optimizer})


def _decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {'params': [p for p in parameters if p.ndim >= 2]},
        {'params': [p for p in parameters if p.ndim < 2], 'weight_decay': 0.0},
    ]
    return [group for group in groups if group['params']]


def check_same_groups(optimizer: Optimizer) -> None:
    """Refuse groups that differ from rank to rank, as stages of a pipeline might have them.

    A checkpoint has the options of groups once, by their number: a resumed run would go on with
    those of another group. Collective.

    Raises:
        ValueError: On all ranks; says what to do.
    """
    groups = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, groups)
    for rank, others in enumerate(found):
        if others != found[0]:
            raise ValueError(
                f'the parameter groups of rank {rank} ({len(others)}) are not those of rank 0 '
                f'({len(found[0])}): under strategy.parallel.pipeline, optim_wrapper.constructor '
                'must make the same groups for every stage, also those that are empty there'
            )
