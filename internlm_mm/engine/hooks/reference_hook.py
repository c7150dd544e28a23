"""What the model says of all answers before it is trained."""

from __future__ import annotations

import time
from typing import Any

from mmengine.hooks import Hook

from internlm_mm.engine.references import (
    compute_references,
    describe,
    hash_model,
    keep_references,
    read_references,
)
from internlm_mm.registry import HOOKS

_STATE_KEY = 'reference_weights'


@HOOKS.register_module()
class ReferenceHook(Hook):
    """Give every pair the log-probabilities of the model that training begins with.

    For objectives with `reference='precomputed'`, where all weights are trained and no frozen ones
    are left to ask. All pairs of the training and of the held-out data are asked about once, before
    the first step. What was found is kept in the datasets' `cache_dir` under a hash of the weights
    with the model's config, the data, the tokenizer and the template, so that nothing of another
    model or of other data is ever taken. Checkpoints remember the hash; a resumed run, and a later
    evaluation, read what was kept.
    """

    priority = 'HIGH'  # before anything is evaluated
    needed_to_evaluate = True

    def __init__(self) -> None:
        self._model: str | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Note which model the run that is gone on with began with."""
        self._model = checkpoint.get(_STATE_KEY)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Have the checkpoint remember it."""
        checkpoint[_STATE_KEY] = self._model

    def before_train(self, runner: Any) -> None:
        """Ask, or read what was kept."""
        is_start = runner.iter == 0
        if is_start:
            self._model = hash_model(runner.strategy.model, runner.cfg)
        loaders = {'train_dataloader': runner.train_loop.dataloader}
        if runner.val_loop is not None:
            loaders['val_dataloader'] = runner.val_loop.dataloader
        for key, loader in loaders.items():
            self._fill(runner, key, loader, may_ask=is_start)

    def before_val(self, runner: Any) -> None:
        """The same for an evaluation by itself, of a checkpoint."""
        if runner.train_loop is None:
            self._fill(runner, 'val_dataloader', runner.val_loop.dataloader, may_ask=False)

    def _fill(self, runner: Any, key: str, loader: Any, may_ask: bool) -> None:
        if loader is None or loader.dataset.has_references:  # there may be tasks alone
            return
        strategy, dataset = runner.strategy, loader.dataset
        if self._model is None:
            raise ValueError(
                f'{key}: the checkpoint does not say which model its run began with, so its '
                'answers have no reference: it was trained without ReferenceHook'
            )
        source = describe(strategy, dataset, self._model)
        kept = read_references(source, dataset)
        (missing,) = strategy.sum_over_ranks([int(kept is None)])
        if not missing:
            assert kept is not None
            runner.logger.info(f'{key}: references of {sum(dataset.num_pairs):,} pairs were kept')
            dataset.set_references(kept)
            return
        if not may_ask:
            raise ValueError(
                f'{key}: {dataset.cache_dir} has no references for these answers by the model '
                f'{self._model[:12]}..., which the run began with, and it is trained already: '
                'keep the folder, or train from the beginning with this data as well'
            )
        start = time.perf_counter()
        found = compute_references(strategy, dataset, loader.micro_batch_size)
        folder = keep_references(source, dataset, found)
        runner.logger.info(
            f'{key}: references of {sum(dataset.num_pairs):,} pairs in '
            f'{time.perf_counter() - start:.1f} s, kept in {folder}'
        )
        dataset.set_references(found)
