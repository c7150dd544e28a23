"""HybridZero's optimizer side: one true gradient norm, clip, loss scale, safe update."""

from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.profiler import record_function

from internlm_mm.optim.grad_norm import gradient_norm
from internlm_mm.optim.loss_scale import DynamicLossScale
from internlm_mm.registry import OPTIM_WRAPPERS
from internlm_mm.utils.shards import local_tensor
from internlm_mm.utils.suggest import did_you_mean

NORM_AND_CLIP = 'internlm_mm.norm_and_clip'
"""What a profiler shows the norm of the gradients and their scaling as."""


@OPTIM_WRAPPERS.register_module()
class HybridZeroOptimWrapper(OptimWrapper):
    """Ends a step whose gradients the strategy has already accumulated and reduced.

    One `update_params()` is one optimizer step, whatever the accumulation. The optimizer holds the
    fp32 master weights as the strategy sharded them, so its state is sharded with them.

    A step whose gradient norm is not finite changes no weight and no optimizer state. The norm is
    reduced over all ranks, so all of them decide alike.

    Args:
        optimizer: Holds the parameters.
        clip_grad: `dict(max_norm=1.0)`: largest global norm of the gradient; None leaves it alone.
        loss_scale: For fp16: `dict(...)` of `DynamicLossScale`'s options, or a fixed factor.
            None for bf16 and wider, which need none.
        skip_nonfinite: Whether to skip such steps; otherwise they raise.

    Attributes:
        after_step: Called at the end of every `update_params()`, also of a skipped one; set by the
            strategy, which has work to do as soon as weights are new.
        norm_groups: Process groups whose ranks hold different parameters, as the stages of a
            pipeline do; set by the strategy.

    Raises:
        ValueError: If `clip_grad` holds anything but a positive `max_norm`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip_grad: Mapping[str, float] | None = None,
        loss_scale: Mapping[str, float] | float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        super().__init__(optimizer)
        # MMEngine's extra group that no parameter is in; here groups are the optimizer's.
        self.base_param_settings = None
        options = dict(clip_grad or {})
        self.max_norm = options.pop('max_norm', None)
        if options or (clip_grad and not (self.max_norm and self.max_norm > 0)):
            raise ValueError(
                f'optim_wrapper.clip_grad={clip_grad!r}: expected dict(max_norm=NORM) '
                'with NORM > 0, or None'
            )
        self.skip_nonfinite = skip_nonfinite
        self.num_skipped = 0
        self.after_step: Callable[[], None] | None = None
        self.norm_groups: tuple[ProcessGroup, ...] = ()
        if isinstance(loss_scale, Mapping):
            known = [option.name for option in fields(DynamicLossScale) if option.init]
            for key, value in loss_scale.items():
                if key not in known:
                    raise ValueError(
                        f'optim_wrapper.loss_scale.{key}={value!r} is unknown.'
                        f'{did_you_mean(key, known)}'
                    )
            self.loss_scale: DynamicLossScale | None = DynamicLossScale(
                **loss_scale  # type: ignore[arg-type]  # the keys say what is an int
            )
        elif loss_scale is not None:
            self.loss_scale = DynamicLossScale(
                initial=loss_scale, minimum=loss_scale, maximum=loss_scale
            )
        else:
            self.loss_scale = None

    @contextmanager
    def optim_context(self, model: nn.Module):  # noqa: ARG002  MMEngine's signature
        """Nothing to set up: the strategy decides which micro-batch reduces gradients."""
        yield

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Apply the loss scale. The loss is divided by the step's tokens already."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def step(self, **kwargs: Any) -> None:
        """One step of the optimizer; clipping is done. Schedulers count calls of this method."""
        self.optimizer.step(**kwargs)

    def update_params(
        self,
        loss: Tensor | None = None,
        step_kwargs: dict[str, Any] | None = None,
        zero_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, float | int]:
        """Norm, clip, step, zero. Collective.

        Args:
            loss: A loss to go backward from first; None when the gradients are there already.
            step_kwargs: For `optimizer.step`.
            zero_kwargs: For `optimizer.zero_grad`.

        Returns:
            grad_norm: Global L2 norm before clipping and without the loss scale.
            skipped: 1 if nothing was updated because the norm was not finite.
            num_skipped: Such steps so far.
            loss_scale: The scale of this step; only with a loss scale.

        Raises:
            FloatingPointError: If the norm is not finite and `skip_nonfinite` is False.
        """
        if loss is not None:
            self.backward(self.scale_loss(loss))
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group['params']
            if parameter.grad is not None
        ]
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        with record_function(NORM_AND_CLIP):
            norm = self._norm_and_clip(gradients, scale)
        finite = norm < float('inf')  # False for NaN, too
        outputs: dict[str, float | int] = {'grad_norm': norm, 'skipped': int(not finite)}
        if finite:
            self.step(**(step_kwargs or {}))
        elif not self.skip_nonfinite:
            raise FloatingPointError(
                f'the gradient norm is {norm}; optim_wrapper.skip_nonfinite=False'
            )
        else:
            self.num_skipped += 1
        if self.loss_scale is not None:
            outputs['loss_scale'] = scale
            self.loss_scale.update(finite)
        outputs['num_skipped'] = self.num_skipped
        self.zero_grad(**(zero_kwargs or {}))
        if self.after_step is not None:
            self.after_step()
        return outputs

    def _norm_and_clip(self, gradients: list[Tensor], scale: float) -> float:
        """The norm without the loss scale; of finite gradients, which are scaled and clipped."""
        # The one wait for the device in a step: everything later depends on this number.
        norm = gradient_norm(gradients, self.norm_groups).item() / scale
        if norm < float('inf'):
            factor = 1 / scale
            if self.max_norm is not None and norm > self.max_norm:
                factor *= self.max_norm / (norm + 1e-6)
            if factor != 1:
                torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], factor)
        return norm

    def scalar_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the optimizer's tensors; JSON types."""
        return {
            'num_skipped': self.num_skipped,
            'loss_scale': None if self.loss_scale is None else self.loss_scale.state_dict(),
            'param_groups': [
                {key: value for key, value in group.items() if key != 'params'}
                for group in self.optimizer.param_groups
            ],
        }

    def load_scalar_state(self, state: Mapping[str, Any], scheduled: Collection[str] = ()) -> None:
        """Undo of `scalar_state`.

        Options of the optimizer are the config's, also after a resume, but for those that
        schedulers carry forward from their last value.

        Args:
            state: From `scalar_state`.
            scheduled: Keys of parameter groups to take from the checkpoint.

        Raises:
            ValueError: If the checkpoint's optimizer has other parameter groups, or state of
                another kind.
        """
        groups = self.optimizer.param_groups
        if len(groups) != len(state['param_groups']):
            raise ValueError(
                f'the checkpoint has {len(state["param_groups"])} parameter groups, '
                f'this run {len(groups)}'
            )
        for group, saved in zip(groups, state['param_groups'], strict=True):
            for key in ('muon', 'state_dtype'):  # what decides which state there is
                if saved.get(key) != group.get(key):
                    raise ValueError(
                        f'the checkpoint has the state of an optimizer with {key}='
                        f'{saved.get(key)!r}, this run has {group.get(key)!r}; weights alone: '
                        "load_from=dict(path=..., content=['model'])"
                    )
            for key in scheduled:
                group[key] = tuple(saved[key]) if isinstance(group[key], tuple) else saved[key]
        self.num_skipped = state['num_skipped']
        if self.loss_scale is not None and state['loss_scale'] is not None:
            self.loss_scale.load_state_dict(state['loss_scale'])
