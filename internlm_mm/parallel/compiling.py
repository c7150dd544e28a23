"""Compiles the layers of a model, each by itself, and tells the compiler what it would not find."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as partition
from torch._inductor.custom_graph_pass import CustomGraphPass

from internlm_mm.parallel.apart_turns import ApartTurns
from internlm_mm.parallel.data import layers_of
from internlm_mm.parallel.kept_scales import KeptScales
from internlm_mm.parallel.late_turns import LateTurns
from internlm_mm.parallel.recompute import SELECTIVE
from internlm_mm.parallel.whole_regions import WholeRegions
from internlm_mm.utils.inductor import known_options

_ELEMENTWISE_AGAIN: dict[str, Any] = {
    'ban_recompute_used_far_apart': False,
    'ban_recompute_long_fusible_chains': False,
    'ban_recompute_materialized_backward': False,
}
"""What torch's partitioner is told, beside to keep least: that elementwise operations may be
computed again although a matrix product of backward reads their result, as norms' and gates'. By
default it lets those be kept. Products, attention and sums are never computed again."""

_JOINT = 'joint_custom_pre_pass'
"""What inductor calls before it parts forward from backward."""


class _InTurn(CustomGraphPass):
    """Passes of which inductor takes only one."""

    def __init__(self, *passes: CustomGraphPass) -> None:
        self._passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for one in self._passes:
            one(graph)

    def uuid(self) -> bytes:
        return b''.join(str(one.uuid()).encode() for one in self._passes)


_IN_BYTES = {
    'triton.mix_order_reduction': False,
    'post_grad_custom_pre_pass': _InTurn(KeptScales(), ApartTurns()),
}
"""What inductor is told where matrices are rounded and turned. Left alone it fuses sums over rows
and over columns into one kernel, one of a norm's backward pass, and with them the writing of a
turned matrix that reads the same rows: a byte here and a byte there, which for Llama-3-8B in 8 bits
took a tenth of a step on an H200 (docs/en/performance.md).
What the passes are for is said in their modules, as of those below."""


def compile_layers(
    model: nn.Module, recompute: Any, backend: str = 'inductor', turns: bool = False
) -> None:
    """Compile each layer by itself, so that they share what is compiled.

    Args:
        model: Its layers are changed in place; names of parameters stay.
        recompute: As `recompute_layers` was told.
        backend: The compiler, by its name in torch.
        turns: Whether layers round operands of products and turn them, as `apply_float8` lets them.
    """
    selective, inductor = recompute == SELECTIVE, backend == 'inductor'
    shares = bool(recompute) and not selective
    chosen = _compiler(backend, selective, shares and inductor, turns and inductor)
    for layer in layers_of(model):
        layer.compile(backend=chosen)


@cache  # one for all layers: for each compiler torch compiles anew
def _compiler(
    backend: str, selective: bool, shares: bool, turns: bool
) -> str | Callable[[fx.GraphModule, Any], Any]:
    told = known_options(_IN_BYTES) if turns else {}
    passes = [*([WholeRegions()] if shares else []), *([LateTurns()] if turns else [])]
    if passes:
        told[_JOINT] = _InTurn(*passes)
    if not (selective or told):
        return backend
    options = {'config_patches': told} if told else {}

    def compile_as_told(graph: fx.GraphModule, inputs: Any) -> Any:
        with partition.patch(_ELEMENTWISE_AGAIN if selective else {}):
            return torch._dynamo.lookup_backend(backend)(graph, inputs, **options)

    return compile_as_told
