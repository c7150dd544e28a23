"""Dynamic loss scale for fp16."""

from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class DynamicLossScale:
    """Grows while gradients stay finite, backs off when they do not.

    Args:
        initial: First factor on the loss.
        growth_interval: Finite steps from one doubling to the next.
        growth_factor: What the scale is multiplied by then.
        backoff_factor: What it is multiplied by after an overflow.
        hysteresis: Overflows since the last growth that it takes to back off; with 2 a single bad
            step is forgiven.
        minimum: Never smaller.
        maximum: Never larger.
    """

    initial: float = 2.0**16
    growth_interval: int = 1000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    hysteresis: int = 2
    minimum: float = 1.0
    maximum: float = 2.0**24
    scale: float = field(init=False)
    finite_steps: int = field(init=False, default=0)
    overflows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f'loss_scale: need 0 < minimum={self.minimum} <= initial={self.initial} '
                f'<= maximum={self.maximum}'
            )
        if self.growth_interval < 1 or self.hysteresis < 1:
            raise ValueError(
                f'loss_scale: growth_interval={self.growth_interval} and '
                f'hysteresis={self.hysteresis} must be at least 1'
            )
        self.scale = self.initial

    def update(self, finite: bool) -> None:
        """Take note of one step. Non-finite of any kind counts as overflow, NaN as well."""
        if finite:
            self.finite_steps += 1
            if self.finite_steps == self.growth_interval:
                self.finite_steps = self.overflows = 0
                self.scale = min(self.scale * self.growth_factor, self.maximum)
            return
        self.finite_steps = 0
        self.overflows += 1
        if self.overflows >= self.hysteresis:
            self.scale = max(self.scale * self.backoff_factor, self.minimum)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs; plain numbers."""
        state = asdict(self)
        return {key: state[key] for key in ('scale', 'finite_steps', 'overflows')}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Undo of `state_dict`."""
        self.scale = state['scale']
        self.finite_steps, self.overflows = int(state['finite_steps']), int(state['overflows'])
