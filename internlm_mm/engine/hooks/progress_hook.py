"""What a person sees of a run, and what its curves are drawn from."""

import datetime
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class ProgressHook(Hook):
    """Print a line and write scalars every `interval` steps; print evaluations as they come.

    Every number in `outputs` goes to the visualizer's backends under its own name, evaluations
    under `val/NAME`, and to `scalars.json` of the run, one JSON object a line.

    Args:
        interval: Steps from one line to the next.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f'ProgressHook: interval={interval} must be at least 1')
        self.interval = interval

    def before_run(self, runner: Any) -> None:
        """Make the folder that backends write to."""
        self.json_path = f'{runner.timestamp}.json'
        if runner.rank == 0:
            Path(runner.log_dir).mkdir(parents=True, exist_ok=True)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Print and write on the interval, at the first step and at the last."""
        due = self.every_n_train_iters(runner, self.interval)
        if not (due or runner.iter == 0 or self.is_last_train_iter(runner)):
            return
        scalars = {key: float(value) for key, value in outputs.items()}
        step = runner.iter + 1
        runner.logger.info(progress_line(step, runner.max_iters, scalars))
        runner.visualizer.add_scalars(scalars, step=step, file_path=self.json_path)

    def after_run(self, runner: Any) -> None:
        """Have the backends write what they still hold."""
        runner.visualizer.close()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Print an evaluation, a line for each domain."""
        metrics = metrics or {}
        step = runner.iter if runner.train_loop is not None else 0
        if runner.train_loop is not None:
            step = runner.train_loop.state_dict()['iter']
        names = [key.removeprefix('loss') for key in metrics if key.startswith('loss')]
        parts = [
            f'{name.removeprefix("/") or "all"} loss {metrics["loss" + name]:.4f} '
            f'perplexity {metrics["perplexity" + name]:,.2f}'
            + _accuracy(metrics.get(f'token_accuracy{name}'))
            for name in names
            if 'perplexity' + name in metrics
        ]
        rest = [
            f'{key} {value:.4f}'
            for key, value in metrics.items()
            if not key.startswith(('perplexity', 'token_accuracy'))
            and not (key.startswith('loss') and f'perplexity{key[4:]}' in metrics)
        ]
        runner.logger.info(f'evaluation at {step} | ' + ' | '.join(parts + rest))
        runner.visualizer.add_scalars(
            {f'val/{key}': value for key, value in metrics.items()},
            step=step,
            file_path=self.json_path,
        )


def _accuracy(share: float | None) -> str:
    return '' if share is None else f' accuracy {share:.1%}'


def progress_line(step: int, max_iters: int, scalars: dict[str, float]) -> str:
    """One line of progress.

    Args:
        step: Finished steps.
        max_iters: Steps of the run.
        scalars: Outputs of the step, as numbers.

    Returns:
        For example 'iter 20/400 | loss 5.1234 | lr 3.00e-04 | grad norm 1.23 | 12,345 tokens/s |
        eta 0:01:22'.
    """
    parts = [f'iter {step:>{len(str(max_iters))}}/{max_iters}']
    if 'loss' in scalars:
        parts += [
            f'loss {scalars["loss"]:.4f}',
            f'lr {scalars["lr"]:.2e}',
            f'grad norm {scalars["grad_norm"]:.3f}',
        ]
    if 'rewards/accuracy' in scalars:
        parts.append(
            f'accuracy {scalars["rewards/accuracy"]:.3f} margin {scalars["rewards/margin"]:.3f}'
        )
    if scalars.get('skipped'):
        parts.append('step skipped: gradient not finite')
    if scalars.get('num_skipped'):
        parts.append(f'skipped so far {scalars["num_skipped"]:.0f}')
    if scalars.get('passed_over'):
        parts.append('data passed over (skip_batches)')
    if 'loss_scale' in scalars:
        parts.append(f'loss scale {scalars["loss_scale"]:.0f}')
    if 'tokens_per_second' in scalars:
        parts.append(f'{scalars["tokens_per_second"]:,.0f} tokens/s')
    if 'tflops' in scalars and scalars['tflops'] >= 1:
        parts.append(f'{scalars["tflops"]:.0f} TFLOP/s')
    if 'mfu_full' in scalars:
        parts.append(f'MFU {scalars["mfu_full"]:.1%} (causal {scalars["mfu_causal"]:.1%})')
    if 'eta' in scalars:
        parts.append(f'eta {datetime.timedelta(seconds=round(scalars["eta"]))}')
    domains = [
        f'{key.removeprefix("domain_loss/")} {value:.3f}'
        for key, value in scalars.items()
        if key.startswith('domain_loss/')
    ]
    if domains:
        parts.append('by domain: ' + ', '.join(domains))
    return ' | '.join(parts)
