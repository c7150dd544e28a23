"""The part of MMEngine's interface of a strategy that saves and loads."""

from pathlib import Path
from typing import Any

from mmengine._strategy import BaseStrategy
from torch import Tensor


class SavingStrategy(BaseStrategy):
    """Hands what a run needs to go on to the run's state, and takes it back.

    Attributes:
        run_state: The runner's RunState, which saves and loads; None until there is one.
    """

    run_state: Any = None

    def model_state_dict(self) -> dict[str, Tensor]:
        """This rank's view of the weights; sharded ones are DTensors."""
        return self.model.state_dict()

    def optim_state_dict(self) -> dict[str, Tensor]:
        """This rank's view of the optimizer's tensors, by parameter name and kind."""
        return self.run_state.optimizer_tensors()

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Any = None,
    ) -> None:
        """Write everything a run needs to go on. Collective.

        Args:
            filename: The checkpoint's folder, `iter_N`.
            save_optimizer: Whether to include optimizer state and random generators.
            save_param_scheduler: Whether to include schedules.
            extra_ckpt: What else goes into `state.json`; the keys `texts` and `folders` name
                further files.
            callback: Called with the state before it is written, for hooks that add to it.
        """
        self.run_state.save(
            Path(filename), save_optimizer, save_param_scheduler, extra_ckpt or {}, callback
        )

    def load_checkpoint(
        self,
        filename: str,
        *,
        map_location: Any = 'cpu',  # noqa: ARG002  MMEngine's signature
        strict: bool = False,  # noqa: ARG002
        revise_keys: list | None = None,  # noqa: ARG002
        callback: Any = None,
    ) -> dict:
        """Weights only, every one of them. Collective."""
        return self.run_state.load(Path(filename), ('model',), callback)

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = 'default',  # noqa: ARG002  MMEngine's signature
        callback: Any = None,
    ) -> dict:
        """Weights and whatever else is asked for. Collective."""
        content = ['model', 'random']
        if resume_optimizer:
            content.append('optimizer')
        if resume_param_scheduler:
            content.append('scheduler')
        return self.run_state.load(Path(filename), tuple(content), callback)
