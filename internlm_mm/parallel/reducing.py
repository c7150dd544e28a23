"""Gradients of a step on a GPU: how they are summed, and where the sharded ones lie."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# The interface is public (`FSDPModule.set_custom_reduce_scatter`), the default behind it is not.
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from internlm_mm.parallel.gathered import add_waiting_with


def add_in_one_pass(model: nn.Module) -> int:
    """Add each micro-batch's gradients to wider sums with a kernel of ours, where Triton is.

    Args:
        model: That FSDP2 has sharded, to run on a GPU.

    Returns:
        For how many parameters; 0 without Triton.
    """
    add = wide_add_kernel()
    return 0 if add is None else add_waiting_with(model, add)


def wide_add_kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The kernel, where Triton is installed, as it is beside every torch for CUDA."""
    try:
        from internlm_mm.ops.wide_add import wide_add_
    except ImportError:
        return None
    return wide_add_


class ReduceIntoComputeMemory(DefaultReduceScatter):
    """FSDP2's reduce-scatter, its results in the memory that layers compute in.

    torch keeps free memory for each stream apart. FSDP2 reduces in a stream of its own, so that
    the sharded gradients, a step's largest tensors after the gathered ones, take memory that is
    idle during the next step's forward passes, just when activations need most: for a 7B model on
    two GPUs 13.6 GiB. In the stream of the backward pass they take what its activations leave.

    For reductions over one mesh axis. A replicated one goes on with the result in a third stream,
    which torch does not tell of.

    Args:
        ranks: That share a parameter.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._computing: tuple[torch.cuda.Stream, int] | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for what is reduced, then, in FSDP2's own stream, for the result.

        The result may overwrite what the backward pass has freed: FSDP2's stream has just waited
        for all that it was told to do. It is not given away while that stream works on it.
        """
        if device.type != 'cuda':
            return torch.empty(size, dtype=dtype, device=device)
        here = torch.cuda.current_stream(device)
        computing, self._computing = self._computing, None
        numel = math.prod(map(int, size))
        if computing is None or computing[0] == here or computing[1] != numel * self._ranks:
            self._computing = here, numel
            return torch.empty(size, dtype=dtype, device=device)
        with torch.cuda.stream(computing[0]):
            result = torch.empty(size, dtype=dtype, device=device)
        result.record_stream(here)
        return result
