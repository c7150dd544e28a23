"""Initial weights that do not depend on the layout."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from internlm_mm.parallel.adapters import assign
from internlm_mm.utils.device import available_cores
from internlm_mm.utils.seeds import initializer, name_seed


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Give every parameter its initial value, whatever part of it this rank holds.

    Each full tensor is drawn on the CPU from a generator of its own and then cut, so that one
    process and a thousand start equal.

    Args:
        model: Has `init_parameter(name, tensor, generator)`, which fills one full tensor; where a
            module inside it has one, too, that fills the module's own.
        seed: The run's seed.
    """

    def draw(name: str, parameter: Tensor) -> Tensor:
        full = torch.empty(parameter.shape)  # fp32 in every precision: all runs start equal
        generator = torch.Generator().manual_seed(name_seed(seed, name))
        owner, local_name = initializer(model, name)
        owner.init_parameter(local_name, full, generator)
        return full

    # Generators release the interpreter lock, so tensors are drawn side by side; a bounded number
    # at a time keeps only that many whole.
    parameters = list(model.named_parameters())
    workers = min(8, available_cores())
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for start in range(0, len(parameters), workers):
            group = parameters[start : start + workers]
            for (_, parameter), full in zip(
                group, pool.map(lambda x: draw(*x), group), strict=True
            ):
                assign(parameter, full)
