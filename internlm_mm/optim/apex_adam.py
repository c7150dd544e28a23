"""apex's FusedAdam on sharded parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from internlm_mm.optim.numbers import check_numbers
from internlm_mm.registry import OPTIMIZERS
from internlm_mm.utils.apex import import_apex, missing_apex
from internlm_mm.utils.shards import local_tensor, zeros_cut_like


@OPTIMIZERS.register_module()
class FusedAdam(Optimizer):
    """`apex.optimizers.FusedAdam`, which knows plain tensors alone, on this rank's parts.

    Its state has torch.optim.AdamW's names and shapes, and a checkpoint of one goes on with the
    other. On GPUs, and where a user has built NVIDIA's apex; torch's AdamW with `fused=True` does
    the same work without.

    Args:
        params: Parameters or groups, in fp32.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, unless `adam_w_mode` is False.
        adam_w_mode: Whether weight decay is AdamW's, not an L2 penalty.
        bias_correction: Whether moments are corrected for their start at zero.

    Raises:
        ValueError: If a number is out of range, or parameters are on the CPU.
        ImportError: If apex is not installed, or another package of that name is.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        self._own: dict[Tensor, nn.Parameter] = {}
        self._inner: Optimizer | None = None
        options = {'lr': lr, 'betas': betas, 'eps': eps, 'weight_decay': weight_decay}
        check_numbers(options)
        modes = {'adam_w_mode': adam_w_mode, 'bias_correction': bias_correction}
        super().__init__(params, {**options, **modes})
        missing = missing_apex('optimizers')
        if found := [*_off_gpu(self.param_groups, bool(missing)), *missing]:
            error = ImportError if missing else ValueError
            raise error(f"optim_wrapper.optimizer.type='FusedAdam' {'; '.join(found)}")
        self._apex = import_apex('optimizers', 'FusedAdam')

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Every rank works on its own parts; nothing is sent."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            (group, [p for p in group['params'] if p.grad is not None])
            for group in self.param_groups
        ]
        inner = self._built()
        given = []
        for group, parameters in trained:
            if parameters:
                shown = [self._shown(parameter, inner) for parameter in parameters]
                step = self._count(parameters)
                # `step` is what apex has finished, and what it counts on from; 0 is its first.
                options = {key: group[key] for key in ('lr', 'betas', 'eps', 'weight_decay')}
                corrected = {'bias_correction': group['bias_correction']}
                given.append({'params': shown, 'step': step, **options, **corrected})
        inner.param_groups = given
        # apex pairs parameters with what it noted of them at its first step; they may be others.
        if getattr(inner, 'param_groups_master', None) is not None:
            inner.param_groups_master = None  # type: ignore[attr-defined]
        inner.step()
        for parameter in self._own.values():
            parameter.grad = None
        return loss

    def _built(self) -> Optimizer:
        """apex's optimizer; made at the first step, since making it takes a GPU."""
        if self._inner is None:
            modes = {group['adam_w_mode'] for group in self.param_groups}
            if len(modes) > 1:
                raise ValueError('FusedAdam: adam_w_mode must be the same for all groups')
            self._inner = self._apex.FusedAdam([{'params': []}], adam_w_mode=modes.pop())
        return self._inner

    def _shown(self, parameter: Tensor, inner: Optimizer) -> nn.Parameter:
        """A plain parameter over the memory of this rank's part, with gradient and state."""
        local = local_tensor(parameter.detach())
        own = self._own.setdefault(parameter, nn.Parameter(local))
        own.data = local  # loading may have moved it
        assert parameter.grad is not None
        own.grad = local_tensor(parameter.grad)
        state = self.state[parameter]
        if not state:
            state['step'] = torch.zeros(())
            for kind in ('exp_avg', 'exp_avg_sq'):
                state[kind] = zeros_cut_like(parameter, tuple(parameter.shape), torch.float32)
        inner.state[own] = {k: local_tensor(state[k]) for k in ('exp_avg', 'exp_avg_sq')}
        return own

    def _count(self, parameters: list[Tensor]) -> int:
        """Steps that are done, and one more in the books; apex counts by the group."""
        done = int(self.state[parameters[0]]['step'].item())
        for parameter in parameters:
            self.state[parameter]['step'] += 1
        return done


def _off_gpu(groups: Sequence[Mapping[str, Any]], without_apex: bool) -> list[str]:
    """Why apex's kernels could not reach parameters, as a predicate; nothing if they could.

    Args:
        groups: Of parameters. On the meta device they say nothing of where they will be.
        without_apex: Whether there is no apex here: then this machine's own lack of a GPU is told,
            too, so that nobody builds apex in vain.
    """
    has_gpu = torch.cuda.is_available()
    if any(parameter.device.type == 'cpu' for group in groups for parameter in group['params']):
        offloaded = ', where strategy.offload=True keeps parameters' if has_gpu else ''
        return [f'needs CUDA, not cpu{offloaded}']
    return ['needs CUDA, which is not here'] if without_apex and not has_gpu else []
