"""What goes wrong in a run, on purpose: hooks and a model that tests name in configs."""

import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class TraceHook(Hook):
    """Append every step's numbers, bit for bit, to WORK_DIR/trace.txt as they happen."""

    priority = 'LOW'  # before checkpoints

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        numbers = [float(outputs[key]).hex() for key in ('loss', 'grad_norm', 'lr')]
        rest = [str(outputs['num_skipped']), str(outputs.get('loss_scale'))]
        line = ' '.join([str(runner.iter + 1), *numbers, *rest])
        with open(Path(runner.work_dir) / f'trace_{runner.rank}.txt', 'a') as file:
            file.write(line + '\n')


@HOOKS.register_module()
class FaultHook(Hook):
    """Do harm on one rank after one step.

    Args:
        kind: 'kill' the process at once, 'kill_in_save' while the step's checkpoint is written,
            'raise' an error, 'signal' for SIGTERM, 'wait' to sleep so that others can signal it,
            or 'inf_grad' for a gradient that is not finite.
        step: After which step, counted from 1.
        rank: On which rank.
        delay: Seconds before 'kill_in_save' or of 'wait'.
    """

    priority = 'LOWEST'  # after checkpoints

    def __init__(
        self, kind: str | None = None, step: int = 1, rank: int = 0, delay: float = 0.0
    ) -> None:
        self.kind, self.step, self.rank, self.delay = kind, step, rank, delay
        self._handle: Any = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.kind == 'inf_grad' and self._is_here(runner):
            self._handle = runner.model.norm.register_forward_hook(_spoil_gradient)
        elif self._handle is not None:
            self._handle.remove()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self._is_here(runner):
            return
        if self.kind == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == 'kill_in_save':
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif self.kind == 'signal':
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == 'raise':
            raise RuntimeError(f'planted on rank {runner.rank}')
        elif self.kind == 'wait':
            (Path(runner.work_dir) / 'waiting').touch()
            time.sleep(self.delay)

    def _is_here(self, runner) -> bool:
        return runner.rank == self.rank and runner.iter + 1 == self.step


def _spoil_gradient(module: Any, inputs: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * torch.inf)


def forbid_pickle() -> None:
    """From now on, reading a pickle from anywhere is an error. `torch.load` is one."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError('a pickle was read')

    class Refusing(pickle.Unpickler):
        def __init__(self, *arguments: object, **options: object) -> None:
            refuse()

    pickle.load = pickle.loads = pickle._load = pickle._loads = refuse  # type: ignore[attr-defined]
    pickle.Unpickler = pickle._Unpickler = Refusing  # type: ignore[misc, attr-defined]
    torch.load = torch.serialization.load = refuse  # type: ignore[assignment]
