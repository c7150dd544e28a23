"""The training step and the evaluation pass."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import BaseLoop
from torch import Tensor

from internlm_mm.engine.task_evaluation import RECORDS_FOLDER, TaskEvaluation
from internlm_mm.registry import LOOPS
from internlm_mm.structures import Batch
from internlm_mm.utils.signals import StopSignal


@LOOPS.register_module()
class TokenTrainLoop(BaseLoop):
    """One iteration is one optimizer step over one global batch.

    The position in the data is one integer that belongs to the loop, so a resumed run reads on
    where it stopped without reading anything again.

    Args:
        runner: Owns strategy, optimizer and hooks.
        dataloader: Config of a DATALOADERS member, or a built one.
        max_iters: Steps of the run.
        global_batch_size: Rows of `seq_len` tokens in a step, over all ranks.
        micro_batch_size: Rows of one forward on one rank; accumulation follows.
        rampup: Smaller steps at the beginning: `dict(start=, increment=, interval=)`, rows and
            steps.
        skip_batches: Steps whose data is passed over without training, [(first, last), ...],
            inclusive, steps counted from 0.

    Raises:
        ValueError: If a size is not positive or an interval is reversed.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int,
        global_batch_size: int,
        micro_batch_size: int,
        rampup: Mapping[str, int] | None = None,
        skip_batches: Sequence[Sequence[int]] = (),
    ) -> None:
        if max_iters < 1:
            raise ValueError(f'train_cfg.max_iters={max_iters} must be at least 1')
        for first, last in skip_batches:
            if not 0 <= first <= last:
                raise ValueError(f'train_cfg.skip_batches: ({first}, {last}) is not an interval')
        loader = runner.build_token_loader(dataloader, global_batch_size, micro_batch_size, rampup)
        super().__init__(runner, loader)
        self._max_iters = max_iters
        self._iter = self._done = 0
        self.skip_batches = [(first, last) for first, last in skip_batches]
        self.rows = 0
        self.consumed_tokens = 0
        self.stop_training = False
        self.stopped_by_signal = False

    @property
    def max_iters(self) -> int:
        """Steps of the run."""
        return self._max_iters

    @property
    def iter(self) -> int:
        """Finished steps; inside a step, the step's index."""
        return self._iter

    @property
    def max_epochs(self) -> int:
        """MMEngine's hooks ask; the whole run counts as one epoch."""
        return 1

    @property
    def epoch(self) -> int:
        """MMEngine's hooks ask; the whole run counts as one epoch."""
        return 0

    def run(self) -> torch.nn.Module:
        """Train until `max_iters`, a hook's `stop_training`, or SIGTERM or Ctrl-C.

        If anything else ends it, hooks that have a method `on_error` hear of it first.
        """
        runner = self.runner
        try:
            if self._iter >= self._max_iters:
                runner.logger.info(
                    f'nothing left to train: {self._iter} steps are done and '
                    f'train_cfg.max_iters={self._max_iters}'
                )
            with StopSignal() as signal:  # also while the last hooks save
                steps = self.begin()
                while self._iter < self._max_iters and not self.stop_training:
                    self.run_next(steps, signal.received)
                runner.call_hook('after_train_epoch')
                runner.call_hook('after_train')
        except BaseException:
            runner.call_hook('on_error')
            raise
        return runner.model

    def begin(self) -> Iterator[list[Batch]]:
        """Call the hooks of the beginning and open the data at the position."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.dataloader.seek(self._iter, self.rows)
        return iter(self.dataloader)

    def run_next(self, steps: Iterator[list[Batch]], signal: int = 0) -> None:
        """Wait for the next batches and run their step."""
        start = time.perf_counter()
        batches = next(steps)
        self.run_iter(batches, signal, time.perf_counter() - start)

    def run_iter(self, batches: list[Batch], signal: int = 0, data_time: float = 0.0) -> None:
        """One step: count, forward and backward, update, hooks.

        Args:
            batches: This rank's micro-batches.
            signal: Number of a signal this rank has received, or 0.
            data_time: Seconds the batches were waited for.
        """
        runner, strategy = self.runner, self.runner.strategy
        start = time.perf_counter()
        rows = self.dataloader.batch_size(self._iter)
        runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=batches)
        targets = sum(batch.num_targets for batch in batches)
        # A signal reaches ranks at different moments; the sum makes all of them stop at the same
        # step.
        counted = targets if strategy.is_data_leader else 0  # others have read the same rows
        num_targets, signals = strategy.sum_over_ranks([counted, signal])
        outputs: dict[str, Any] = {
            'num_tokens': rows * self.dataloader.dataset.seq_len,
            'num_targets': num_targets,
            'data_time': data_time,
        }
        if any(first <= self._iter <= last for first, last in self.skip_batches):
            outputs['passed_over'] = 1
        else:
            if num_targets == 0:
                raise ValueError(f'step {self._iter} has no trained token: every label is masked')
            sums = strategy.forward_backward(batches, num_targets)
            runner.call_hook('after_backward')  # the one moment at which the step's gradients exist
            outputs['lr'] = runner.optim_wrapper.param_groups[0]['lr']
            # First: it waits for the device anyway, and the means below are ready then.
            outputs |= runner.optim_wrapper.update_params()
            outputs |= _means(sums, num_targets, self.dataloader.dataset.domains)
        outputs['time'] = data_time + time.perf_counter() - start
        self._done = self._iter + 1
        self.rows += rows
        self.consumed_tokens += outputs['num_tokens']
        outputs['consumed_tokens'] = self.consumed_tokens
        if signals:
            self.stop_training = self.stopped_by_signal = True
        runner.call_hook(
            'after_train_iter', batch_idx=self._iter, data_batch=batches, outputs=outputs
        )
        self._iter += 1

    def state_dict(self) -> dict[str, int]:
        """Position after the last finished step, also when asked from a hook of that step."""
        return {
            'iter': self._done,
            'rows': self.rows,
            'consumed_tokens': self.consumed_tokens,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the step at which `state` was taken."""
        self._iter = self._done = state['iter']
        self.rows = state['rows']
        self.consumed_tokens = state['consumed_tokens']


@LOOPS.register_module()
class PerplexityLoop(BaseLoop):
    """Loss, perplexity and token accuracy of held-out text by domain, and tasks.

    Token-weighted over everything that is read: neither the number of ranks nor the size of batches
    changes the result beyond rounding.

    Args:
        runner: Owns strategy and hooks.
        dataloader: Config of a loader that passes once over a dataset, or a built one; empty or
            None where there are tasks alone.
        evaluator: Must be None; MMEngine's signature.
        tasks: Configs of TASKS members: questions with right answers, asked after the pass.
        task_batch_size: Rows of one forward of a task on one rank, and prompts that are continued
            at once.
    """

    takes_pairs = False  # whether what it tells means something where the loss is of pairs

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any = None,
        tasks: Sequence[Mapping[str, Any]] = (),
        task_batch_size: int = 8,
    ) -> None:
        if evaluator:
            raise ValueError(
                'val_evaluator is not supported: metrics come from the loop in val_cfg'
            )
        super().__init__(runner, runner.build_eval_loader(dataloader) if dataloader else None)
        self.tasks = TaskEvaluation(runner, tasks, task_batch_size) if tasks else None

    def run(self) -> dict[str, float]:
        """One pass, then the tasks. Collective.

        Returns:
            'loss', 'perplexity', 'token_accuracy', with domains also 'loss/NAME' and so on; and
            'TASK/METRIC'.
        """
        runner = self.runner
        runner.call_hook('before_val')
        runner.call_hook('before_val_epoch')
        was_training = runner.model.training
        runner.model.eval()
        metrics = {} if self.dataloader is None else self._measure()
        if self.tasks is not None:
            metrics |= self.tasks.run(self._records_folder())
        runner.model.train(was_training)
        runner.call_hook('after_val_epoch', metrics=metrics)
        runner.call_hook('after_val')
        return metrics

    def _measure(self) -> dict[str, float]:
        """The pass over held-out text."""
        runner, strategy = self.runner, self.runner.strategy
        totals: dict[str, Tensor] = {}
        targets = 0
        for index, batch in enumerate(self.dataloader):
            runner.call_hook('before_val_iter', batch_idx=index, data_batch=batch)
            sums = strategy.evaluate([batch])
            targets += batch.num_targets
            for key, value in sums.items():
                totals[key] = totals[key] + value.double() if key in totals else value.double()
            runner.call_hook('after_val_iter', batch_idx=index, data_batch=batch, outputs=sums)
        (targets,) = strategy.sum_over_ranks([targets if strategy.is_data_leader else 0])
        if targets == 0:
            raise ValueError('val_dataloader: the held-out data has no token to predict')
        return self._metrics(_means(totals, targets, self.dataloader.dataset.domains))

    def _records_folder(self) -> Path:
        """Where answers to tasks go: a folder for each evaluated step of a run."""
        folder = Path(self.runner.work_dir) / RECORDS_FOLDER
        training = self.runner._train_loop  # a config where nothing is trained
        if not isinstance(training, TokenTrainLoop):
            return folder
        return folder / f'iter_{training.state_dict()["iter"]}'

    def _metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        """What is reported, from means over all that was read."""
        metrics = {'loss': float(means['loss'])}
        metrics |= {
            f'loss/{key.removeprefix("domain_loss/")}': float(value)
            for key, value in means.items()
            if key.startswith('domain_loss/')
        }
        # exp overflows long before a loss says anything: inf is the honest reading.
        metrics |= {
            key.replace('loss', 'perplexity', 1): math.exp(value) if value < 700 else math.inf
            for key, value in metrics.items()
        }
        return metrics | {
            f'token_accuracy{key.removeprefix("domain_").removeprefix("correct")}': float(value)
            for key, value in means.items()
            if key.startswith(('correct', 'domain_correct/'))
        }


def _means(sums: Mapping[str, Tensor], num_targets: int, domains: Sequence[str]) -> dict[str, Any]:
    """Sums over a step -> means per target, without domains that the step has none of."""
    means: dict[str, Any] = {
        key: value / num_targets for key, value in sums.items() if not key.startswith('domain_')
    }
    for kind in [key for key in ('domain_loss', 'domain_correct') if key in sums]:
        found, counts = sums[kind].tolist(), sums['domain_targets'].tolist()
        means |= {
            f'{kind}/{name}': value / count
            for name, value, count in zip(domains, found, counts, strict=True)
            if count
        }
    return means
