"""Learning-rate and beta2 schedules, as functions of the step alone.

All are MMEngine parameter schedulers that step once an iteration. Their state is one integer, and a
value never depends on the values before it, so a resumed run continues exactly.
"""

import math

from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler

from internlm_mm.registry import PARAM_SCHEDULERS


class _StepSchedule(_ParamScheduler):
    """A parameter as `initial value x factor(step)`.

    Args:
        optimizer: The optimizer wrapper.
        param_name: Key of the parameter groups.
        by_epoch: Must be False; here so that a config that says so is understood.
    """

    def __init__(self, optimizer: object, param_name: str, by_epoch: bool = False) -> None:
        if by_epoch:
            raise ValueError(f'{type(self).__name__}: by_epoch=True, but steps are all there is')
        super().__init__(optimizer, param_name, begin=0, end=INF, by_epoch=False)

    def factor(self, step: int) -> float:  # noqa: ARG002  for subclasses
        """What the initial value is multiplied by at a step, counted from 0."""
        raise RuntimeError(f'{type(self).__name__} does not define factor')

    def _get_value(self) -> list[float]:
        return [value * self.factor(self.last_step) for value in self.base_values]

    def step(self) -> None:
        """Go to the next step, whether or not the optimizer made one: a skipped step counts."""
        self._global_step += 1
        self.last_step += 1
        self._set()

    def state_dict(self) -> dict[str, int]:
        """The position alone: peak values and spans are the config's, also after a resume."""
        return {'last_step': self.last_step, '_global_step': self._global_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a position and set the value that belongs to it."""
        super().load_state_dict(state_dict)
        self._set()

    def _set(self) -> None:
        self._last_value = self._get_value()
        for group, value in zip(self.optimizer.param_groups, self._last_value, strict=True):
            group[self.param_name] = value


def _check_warmup(name: str, warmup: int) -> None:
    # A warm-up longer than the run is allowed: trials of a few steps keep the config as it is.
    if warmup < 0:
        raise ValueError(f'{name}: warmup={warmup} must not be negative')


@PARAM_SCHEDULERS.register_module()
class WarmupCosine(_StepSchedule):
    """Linear warm-up from nearly zero, then half a cosine down to `min_ratio`.

    Args:
        optimizer: The optimizer wrapper.
        warmup: Steps of warm-up; step 0 already trains with 1 / warmup of the rate.
        end: Steps until the minimum is reached; the length of the run by default. Constant
            afterwards.
        min_ratio: Last value over the peak.
        by_epoch: Must be False.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, without restarts.
    """

    def __init__(
        self,
        optimizer: object,
        warmup: int,
        end: int = INF,
        min_ratio: float = 0.1,
        by_epoch: bool = False,
    ) -> None:
        _check_warmup(type(self).__name__, warmup)
        self.warmup, self.total, self.min_ratio = warmup, end, min_ratio
        super().__init__(optimizer, 'lr', by_epoch)

    def factor(self, step: int) -> float:
        """See `_StepSchedule.factor`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * progress)) / 2


@PARAM_SCHEDULERS.register_module()
class WarmupStableDecay(_StepSchedule):
    """Linear warm-up, a plateau, and a decay over the last `decay` steps.

    A run can be prolonged: resume a checkpoint of the plateau with a larger `end`.

    Args:
        optimizer: The optimizer wrapper.
        warmup: Steps of warm-up.
        decay: Steps of decay at the end.
        end: Steps of the schedule; the length of the run by default. Constant afterwards.
        min_ratio: Last value over the peak.
        shape: 'linear', or 'sqrt' for 1 - sqrt(progress).
        by_epoch: Must be False.

    Source: Hu et al. (MiniCPM), https://arxiv.org/abs/2404.06395, section 4; the square-root shape:
        Haegele et al., https://arxiv.org/abs/2405.18392, section 3.
    """

    def __init__(
        self,
        optimizer: object,
        warmup: int,
        decay: int,
        end: int = INF,
        min_ratio: float = 0.0,
        shape: str = 'sqrt',
        by_epoch: bool = False,
    ) -> None:
        _check_warmup(type(self).__name__, warmup)
        if not 0 < decay <= end:
            raise ValueError(f'WarmupStableDecay: decay={decay} must lie in [1, {end}], the run')
        if shape not in ('linear', 'sqrt'):
            raise ValueError(
                f"WarmupStableDecay: shape={shape!r} is unknown. Valid: 'linear', 'sqrt'."
            )
        self.warmup, self.decay, self.total = warmup, decay, end
        self.min_ratio, self.shape = min_ratio, shape
        super().__init__(optimizer, 'lr', by_epoch)

    def factor(self, step: int) -> float:
        """See `_StepSchedule.factor`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(max((step - (self.total - self.decay)) / self.decay, 0.0), 1.0)
        fall = math.sqrt(progress) if self.shape == 'sqrt' else progress
        return 1 - (1 - self.min_ratio) * fall


@PARAM_SCHEDULERS.register_module()
class Beta2Schedule(_StepSchedule):
    """AdamW's second decay rate as `max(initial, 1 - step ** -exponent)`, steps counted from 1.

    Args:
        optimizer: The optimizer wrapper; its `betas[1]` is the initial value.
        exponent: Larger means a faster rise; 0 leaves beta2 alone.
        end: Steps of the schedule; the length of the run by default. Constant afterwards.
        by_epoch: Must be False.

    Source: Shazeer and Stern, https://arxiv.org/abs/1804.04235, section 7.2.
    """

    def __init__(
        self,
        optimizer: object,
        exponent: float = 0.8,
        end: int = INF,
        by_epoch: bool = False,
    ) -> None:
        if exponent < 0:
            raise ValueError(f'Beta2Schedule: exponent={exponent} must not be negative')
        self.exponent, self.total = exponent, end
        for group in optimizer.param_groups:  # type: ignore[attr-defined]
            group.setdefault('initial_betas', tuple(group['betas']))
        super().__init__(optimizer, 'betas', by_epoch)

    def _get_value(self) -> list:
        rise = 1 - float(min(self.last_step + 1, self.total)) ** -self.exponent
        return [(beta1, max(beta2, rise)) for beta1, beta2 in self.base_values]
