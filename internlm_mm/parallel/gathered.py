"""What FSDP2 holds on a rank besides its shards; for measuring memory only.

torch has no public way to ask, so this file alone looks inside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True, slots=True)
class Gathered:
    """One parameter as it is while layers compute.

    Attributes:
        name: Dotted name in the model.
        parameter: The whole parameter; its storage is empty between uses.
        gradient: The whole gradient that waits for the step's last micro-batch, or None.
    """

    name: str
    parameter: Tensor
    gradient: Tensor | None


def gathered(model: nn.Module) -> Iterator[Gathered]:
    """Every parameter that FSDP2 has gathered at least once; nothing for other models."""
    names = {module: f'{name}.' if name else '' for name, module in model.named_modules()}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, '_fsdp_param_groups', None)  # since torch 2.12 there may be several
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for entry in (entry for group in groups for entry in group.fsdp_params):
            whole = getattr(entry, '_unsharded_param', None)
            if whole is not None:
                info = entry._module_info
                gradient = entry.unsharded_accumulated_grad
                yield Gathered(
                    names[info.module] + info.param_name,
                    whole,
                    whole.grad if gradient is None else gradient,
                )
