"""What FSDP2 holds on a rank besides its shards: whole parameters, and gradients that wait.

torch has no public way to ask, so this file alone looks inside it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
    for _, entry in _entries(model):
        whole = getattr(entry, '_unsharded_param', None)
        if whole is not None:
            info = entry._module_info
            gradient = entry.unsharded_accumulated_grad
            yield Gathered(
                names[info.module] + info.param_name,
                whole,
                whole.grad if gradient is None else gradient,
            )


class WaitingGradient:
    """The whole gradient of one parameter, while a step's micro-batches add to it.

    Where FSDP2 will reduce it in a wider dtype, it waits in that one beside the parameter, and
    whatever backward leaves at the parameter is added to it. A gradient that is reduced at once
    stays at the parameter, in its dtype, so that all gradients of a reduction have the same.

    Args:
        group: FSDP2's, of the parameter and those that are reduced with it.
        entry: FSDP2's, of the parameter.
    """

    def __init__(self, group: Any, entry: Any) -> None:
        self._group, self._entry = group, entry

    @property
    def module(self) -> nn.Module:
        """Whose parameter it is."""
        return self._entry._module_info.module

    @property
    def name(self) -> str:
        """The parameter's, in the module."""
        return self._entry._module_info.param_name

    @property
    def memory(self) -> int | None:
        """What tells the whole parameter's memory from any other; None before it was gathered.

        FSDP2 empties and fills the same memory again and again, so that this stays.
        """
        whole = getattr(self._entry, '_unsharded_param', None)
        return None if whole is None else memory_of(whole)

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum."""
        entry = self._entry
        return entry._unsharded_param.dtype if self._at_parameter() else entry.reduce_dtype

    def get(self) -> Tensor | None:
        """The sum so far."""
        if self._at_parameter():
            return self._entry._unsharded_param.grad
        return self._entry.unsharded_accumulated_grad

    def put(self, total: Tensor) -> None:
        """Begin with a sum, like the parameter and in `dtype`."""
        if self._at_parameter():
            self._entry._unsharded_param.grad = total
        else:
            self._entry.unsharded_accumulated_grad = total

    def _at_parameter(self) -> bool:
        if self._entry.unsharded_accumulated_grad is not None:
            return False
        return self._entry.reduce_dtype is None or self._group.reduce_grads


def waiting_gradients(model: nn.Module) -> list[WaitingGradient] | None:
    """Those of the trained plain parameters that FSDP2 shards.

    Returns:
        None if this torch's FSDP2 is not as this file knows it.
    """
    found = []
    for group, entry in _entries(model):
        known = (
            hasattr(group, 'reduce_grads')
            and hasattr(entry, 'unsharded_accumulated_grad')
            and hasattr(entry, 'accumulate_unsharded_grad_if_needed')
            and hasattr(entry, 'to_accumulated_grad_if_needed')
        )
        if not known:
            return None
        # Shards of a matrix that tensor parallelism has split, and weights that are gathered in
        # another form than they have, have gradients of their own kind.
        plain = not entry.is_dtensor and not hasattr(
            entry._sharded_local_tensor, 'fsdp_post_all_gather'
        )
        if plain and entry.sharded_param.requires_grad:
            found.append(WaitingGradient(group, entry))
    return found


def add_waiting_with(model: nn.Module, add: Callable[[Tensor, Tensor], object]) -> int:
    """Let a function of ours add micro-batches' gradients to those that wait.

    For plain contiguous tensors of one shape; others are added as FSDP2 does. A torch whose FSDP2
    is not as this file knows it keeps its own way.

    Args:
        model: That FSDP2 has sharded.
        add: Told the sum, which it changes, and what to add.

    Returns:
        How many parameters it adds for.
    """
    count = 0
    for _, entry in _entries(model):
        if hasattr(entry, 'accumulate_unsharded_grad_if_needed'):
            entry.accumulate_unsharded_grad_if_needed = _Add(entry, add)
            count += 1
    return count


class _Add:
    """In the place of a method of FSDP2's record of one parameter."""

    def __init__(self, entry: Any, add: Callable[[Tensor, Tensor], object]) -> None:
        self._entry, self._add = entry, add

    def __call__(self) -> None:
        total = self._entry.unsharded_accumulated_grad
        gradient = None if total is None else self._entry.unsharded_param.grad
        if (
            type(total) is Tensor
            and type(gradient) is Tensor
            and total.shape == gradient.shape
            and total.is_contiguous()
            and gradient.is_contiguous()
        ):
            self._add(total, gradient)
            self._entry.unsharded_param.grad = None
        else:
            type(self._entry).accumulate_unsharded_grad_if_needed(self._entry)


def memory_of(tensor: Tensor) -> int:
    """What two tensors over the same memory have in common, whatever is in it."""
    return tensor.untyped_storage()._cdata


def _entries(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """FSDP2's records of parameters, each with that of the group it is reduced with."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, '_fsdp_param_groups', None)  # since torch 2.12 there may be several
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for group in groups:
            for entry in group.fsdp_params:
                yield group, entry
