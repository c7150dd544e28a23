"""AdamW that holds its moments in 16 or 8 bits."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from internlm_mm.optim.compact_update import COMPILED_FROM, Rates, update
from internlm_mm.optim.numbers import check_numbers
from internlm_mm.registry import OPTIMIZERS
from internlm_mm.utils.inductor import look_for_vectors
from internlm_mm.utils.shards import local_tensor, zeros_cut_like
from internlm_mm.utils.suggest import did_you_mean

STATE_DTYPES = ('bfloat16', 'int8')

BLOCK = 64
"""Numbers of a row that share a scale, at most; a power of two that divides the row's parts."""

PARTS = 8
"""Into how many parts tensor parallelism may cut a row without cutting a block."""

SMALLEST_BLOCK = 16
"""With fewer, scales would take too much: such a tensor keeps its moments as they are."""


def block_of(columns: int) -> int:
    """How many numbers of a row share a scale; 0 if none would do."""
    block = math.gcd(columns // PARTS, BLOCK) if columns % PARTS == 0 else 0
    return block if block >= SMALLEST_BLOCK else 0


@OPTIMIZERS.register_module()
class CompactAdamW(Optimizer):
    """AdamW with the moments of matrices in bfloat16 or in 8 bits; the arithmetic is in fp32.

    Rounding is at random and right on average. In 8 bits every block of up to 64 numbers of a row
    has a scale of its own, and what is held of the second moment is its root, which has half as
    many decades. Blocks are parts of rows, so that state is the same on every layout, and a
    checkpoint of one goes on on another. Moments of norms and biases are held in full; in 8 bits,
    so are those of matrices whose rows are no multiple of 128.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        state_dtype: 'bfloat16' or 'int8'.

    Raises:
        ValueError: If an option is out of range, or a layout would cut a block of 8 bits.

    Source: bfloat16 moments: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.3; blocks
        of 8 bits: Dettmers et al., https://arxiv.org/abs/2110.02861.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str = 'bfloat16',
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(
                f'optim_wrapper.optimizer.state_dtype={state_dtype!r}.'
                f'{did_you_mean(state_dtype, STATE_DTYPES)}'
            )
        options = {'lr': lr, 'betas': betas, 'eps': eps, 'weight_decay': weight_decay}
        check_numbers(options)
        super().__init__(params, {**options, 'state_dtype': state_dtype})
        if self._is_compiled_on_cpu(p for group in self.param_groups for p in group['params']):
            look_for_vectors()  # long before the first update waits for it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group['state_dtype'] == 'int8':
            for parameter in group['params']:
                if parameter.ndim > 1:
                    _check_blocks(parameter)

    @staticmethod
    def state_bytes(
        parameter: Tensor, group: dict[str, Any], master_bytes: int
    ) -> tuple[float, int]:
        """What a parameter's state takes: bytes for each of its numbers, and besides."""
        if parameter.ndim > 1 and group['state_dtype'] == 'bfloat16':
            return 4.0, 4
        block = block_of(parameter.shape[-1]) if parameter.ndim > 1 else 0
        return (2 + 8 / block, 4) if block else (2.0 * master_bytes, 4)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Every rank works on its own parts; nothing is sent."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
        compiled_on_cpu = self._is_compiled_on_cpu(given)
        for group in self.param_groups:
            rates: dict[tuple[int, torch.device, torch.dtype], Rates] = {}
            for parameter in group['params']:
                if parameter.grad is not None:
                    gradient = local_tensor(parameter.grad)
                    self._update(parameter, gradient, group, rates, compiled_on_cpu)
        return loss

    @staticmethod
    def _is_compiled_on_cpu(parameters: Iterable[Tensor]) -> bool:
        # Whole tensors are counted, so that what they are cut into changes no bit.
        on_cpu = (p.numel() for p in parameters if local_tensor(p).device.type == 'cpu')
        return sum(on_cpu) >= COMPILED_FROM

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
        rates: dict[tuple[int, torch.device, torch.dtype], Rates],
        compiled_on_cpu: bool,
    ) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, group['state_dtype'], state)
        state['step'] += 1
        step = int(state['step'].item())  # in host memory
        weight = local_tensor(parameter.detach())
        if not weight.numel():
            return
        key = step, weight.device, weight.dtype
        if key not in rates:
            rates[key] = Rates.of(step, group, weight)
        held = {
            kind: torch.atleast_1d(local_tensor(value))
            for kind, value in state.items()
            if kind != 'step'
        }
        weight, gradient = torch.atleast_1d(weight, gradient)
        compiled = compiled_on_cpu or weight.device.type != 'cpu'
        update(weight, gradient, held, rates[key], compiled)

    @staticmethod
    def _begin(parameter: Tensor, state_dtype: str, state: dict[str, Tensor]) -> None:
        shape, is_matrix = tuple(parameter.shape), parameter.ndim > 1
        block = block_of(shape[-1]) if is_matrix and state_dtype == 'int8' else 0
        dtype = torch.bfloat16 if is_matrix and state_dtype == 'bfloat16' else parameter.dtype
        state['step'] = torch.zeros(())
        for kind, codes in (('exp_avg', torch.int8), ('exp_avg_sq', torch.uint8)):
            # Not `zeros_cut_like`: what is offloaded would be sent to the GPU and back.
            state[kind] = torch.zeros_like(parameter, dtype=codes if block else dtype)
            if block:
                scales = (*shape[:-1], shape[-1] // block)
                state[f'{kind}_scale'] = zeros_cut_like(parameter, scales, torch.float32)


def _check_blocks(parameter: Tensor) -> None:
    """Raise ValueError if a block would be cut."""
    columns, here = parameter.shape[-1], local_tensor(parameter).shape[-1]
    block = block_of(columns)
    if block and here % block:
        raise ValueError(
            "optim_wrapper.optimizer.state_dtype='int8': strategy.parallel.tensor cuts rows of "
            f'{columns} numbers into parts of {here}, which blocks of {block} do not fill; '
            "state_dtype='bfloat16' needs none"
        )
