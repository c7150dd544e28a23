"""What one process of a layout does: train through the runner, and write down what it saw."""

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from internlm_mm.engine.runner import LLMRunner
from internlm_mm.parallel.adapters import assign
from internlm_mm.utils.config import load_config
from internlm_mm.utils.config_check import check_config
from internlm_mm.utils.launch import Launch, enter_launch
from internlm_mm.utils.shards import local_tensor
from internlm_mm.verify.reference import drawn

REFUSED = 3
"""Exit code of a process whose layout the strategy refuses."""

SAVED = 2
"""Steps after which a run saves the checkpoint that others resume from."""


class RefusedError(ValueError):
    """The strategy says that a layout cannot run, before anything is trained."""


class Recorder(Hook):
    """Keeps the numbers of every step, and in the end writes them into a folder.

    Each copy of a parameter is written by one rank: the one that is first along every axis over
    which the parameter is spread. Copies on other ranks are written, too.

    Args:
        folder: Gets `RANK.safetensors` and `RANK.json`.
        exponents: Powers of two to multiply fresh weights by, None where `drawn` stands for them;
            empty leaves them.
        save: Whether to save a checkpoint after `SAVED` steps.
    """

    priority = 'VERY_LOW'

    def __init__(self, folder: Path, exponents: Mapping[str, int | None], save: bool) -> None:
        self.folder, self.exponents, self.save = folder, exponents, save
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[dict[str, float]] = []
        self.has_begun = False

    def before_train(self, runner: Any) -> None:
        """Enlarge fresh weights, and note what training begins with."""
        self.has_begun = True
        for name, parameter in runner.model.named_parameters():
            exponent = self.exponents[name] if self.exponents else 0
            if exponent is None:
                assign(parameter.data, drawn(name, parameter.shape, runner.seed))
            else:
                local_tensor(parameter.data).mul_(2.0**exponent)
        self._keep('initial', {n: p.detach() for n, p in runner.model.named_parameters()})

    def after_backward(self, runner: Any) -> None:
        """Note every gradient as it is before the clip."""
        scale = getattr(runner.optim_wrapper, 'loss_scale', None)
        gradients = {
            name: p.grad for name, p in runner.model.named_parameters() if p.grad is not None
        }
        self._keep(f'gradients.{runner.iter}', gradients, 1 / scale.scale if scale else 1.0)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,  # noqa: ARG002  MMEngine's signature
        outputs: Any = None,
    ) -> None:
        """Note loss, norm and weights, and save."""
        step = {'step': batch_idx, 'loss': outputs['loss'], 'gradient norm': outputs['grad_norm']}
        self.steps.append({key: float(value) for key, value in step.items()})
        weights = {name: p.detach() for name, p in runner.model.named_parameters()}
        self._keep(f'weights.{batch_idx}', weights)
        if self.save and batch_idx + 1 == SAVED:
            runner.save_checkpoint(str(self.folder), f'iter_{SAVED}')
            runner.run_state.checkpointer.finish()

    def after_train(self, runner: Any) -> None:
        """Write everything."""
        save_file(self.tensors, self.folder / f'{runner.rank}.safetensors')
        (self.folder / f'{runner.rank}.json').write_text(json.dumps(self.steps))

    def _keep(self, kind: str, tensors: Mapping[str, Tensor], factor: float = 1.0) -> None:
        for name, tensor in tensors.items():
            is_first = holds_first_shard(tensor)
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all take part
            if is_first:
                # A copy: what is whole on this rank anyway would be changed by the next step.
                self.tensors[f'{kind}/{name}'] = (full * factor).cpu().contiguous().clone()


def holds_first_shard(tensor: Tensor) -> bool:
    """Whether this rank is first along every mesh axis over which the tensor is spread."""
    if not isinstance(tensor, DTensor):
        return True
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    on_axes = zip(place, tensor.placements, strict=True)
    return all(at == 0 or placement.is_replicate() for at, placement in on_axes)


def run_task(task: Mapping[str, Any], launcher: str) -> None:
    """Train one run.

    Args:
        task: `config`, a file; `options`, what to change in it; `folder`, where results go;
            `exponents`; `resume`, a checkpoint or None.
        launcher: 'none' or 'pytorch'.

    Raises:
        RefusedError: If the strategy refuses the layout.
    """
    config = load_config(task['config'], task['options'])
    folder = Path(task['folder'])
    config.work_dir = str(folder)
    config.experiment_name = folder.as_posix().replace('/', '_')
    config.launcher = launcher
    config.resume = task['resume'] or False
    check_config(config)
    if config.strategy.get('compile'):
        torch.compiler.reset()  # else what earlier runs have compiled counts against torch's limit
    exponents = {} if task['resume'] else task['exponents']
    recorder = Recorder(folder, exponents, save=not task['resume'])
    try:
        runner = LLMRunner.from_cfg(config)
        runner.register_hook(recorder)
        runner.train()
    except ValueError as error:
        if recorder.has_begun:
            raise
        raise RefusedError(str(error)) from error


def wait_for_job(
    connection: Connection, rank: int, world_size: int, device: str, prelude: str | None
) -> None:
    """Entry of a process: all is imported by now; do what `work` is then told, if anything.

    Args:
        connection: Brings `port`, `job` and `log` as JSON, once; closed, if there is no job.
        rank: See `work`, as all that follows.
        world_size: Likewise.
        device: Likewise.
        prelude: Likewise.
    """
    try:
        told = json.loads(connection.recv_bytes())
    except EOFError:
        os._exit(0)
    work(rank, world_size, told['port'], device, told['job'], told['log'], prelude)


def work(
    rank: int,
    world_size: int,
    port: int,
    device: str,
    job: str,
    log: str,
    prelude: str | None,
) -> None:
    """Run the tasks of a job one after the other, and end the process.

    Args:
        rank: This process's.
        world_size: Processes of the layout.
        port: Where they meet.
        device: 'cpu' hides GPUs.
        job: A JSON file: a list of tasks.
        log: File for what is printed.
        prelude: `module:function` to call first; for tests.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    gc.freeze()  # what the server imported: a search for garbage would copy shared memory
    try:
        launch = Launch(rank, world_size, rank, '127.0.0.1', port)
        enter_launch(launch, torch.cuda.device_count() if device == 'cuda' else 0)
        if device == 'cpu':
            torch.set_num_threads(1)
        if prelude is not None:
            module, name = prelude.split(':')
            getattr(importlib.import_module(module), name)()
        for task in json.loads(Path(job).read_text()):
            run_task(task, 'pytorch' if world_size > 1 else 'none')
        if world_size > 1:
            dist.all_reduce(torch.zeros(1))  # none leaves while another still needs it
    except RefusedError as error:
        print(error)
        _leave(REFUSED)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of process groups that are torn down with the interpreter can abort the process.
    os._exit(code)
