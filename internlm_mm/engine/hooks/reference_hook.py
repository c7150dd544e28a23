"""What the model says of all answers before it is trained."""

from __future__ import annotations

import time
from typing import Any

from mmengine.hooks import Hook

from internlm_mm.engine.references import (
    compute_references,
    describe,
    find_outdated,
    hash_model,
    hash_said,
    keep_references,
    read_references,
)
from internlm_mm.registry import HOOKS

_STATE_KEY = 'reference_model'

_OLD_STATE_KEY = 'reference_weights'
"""Of checkpoints that may know the model by a hash of its weights alone."""


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
        self._old: str | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Note which model the run that is gone on with began with."""
        self._model = checkpoint.get(_STATE_KEY)
        self._old = checkpoint.get(_OLD_STATE_KEY)

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
        dataset = loaders['train_dataloader'].dataset
        for folder in find_outdated(dataset.cache_dir):
            runner.logger.info(f'{folder}: references of an older version, which nobody reads')

    def before_val(self, runner: Any) -> None:
        """The same for an evaluation by itself, of a checkpoint."""
        if runner.train_loop is None:
            self._fill(runner, 'val_dataloader', runner.val_loop.dataloader, may_ask=False)

    def _fill(self, runner: Any, key: str, loader: Any, may_ask: bool) -> None:
        if loader is None or loader.dataset.has_references:  # there may be tasks alone
            return
        dataset = loader.dataset
        if self._read(runner, dataset):
            runner.logger.info(f'{key}: references of {sum(dataset.num_pairs):,} pairs were kept')
            return
        if not may_ask:
            raise ValueError(self._what_is_missing(key, dataset))
        assert self._model is not None
        start = time.perf_counter()
        found = compute_references(runner.strategy, dataset, loader.micro_batch_size)
        folder = keep_references(describe(runner.strategy, dataset, self._model), dataset, found)
        runner.logger.info(
            f'{key}: references of {sum(dataset.num_pairs):,} pairs in '
            f'{time.perf_counter() - start:.1f} s, kept in {folder}'
        )
        dataset.set_references(found)

    def _read(self, runner: Any, dataset: Any) -> bool:
        """Take what was kept, if every rank finds it. Collective."""
        models = [self._model]
        if self._model is None and self._old is not None:
            models = [self._old, hash_said(self._old, runner.cfg)]
        for model in filter(None, models):
            kept = read_references(describe(runner.strategy, dataset, model), dataset)
            (missing,) = runner.strategy.sum_over_ranks([int(kept is None)])
            if not missing:
                assert kept is not None
                self._model = model
                dataset.set_references(kept)
                return True
        return False

    def _what_is_missing(self, key: str, dataset: Any) -> str:
        known = self._model or self._old
        if known is None:
            return (
                f'{key}: the checkpoint does not say which model its run began with, so its '
                'answers have no reference: it was trained without ReferenceHook'
            )
        message = (
            f'{key}: {dataset.cache_dir} has no references for these answers by the model '
            f'{known[:12]}..., which the run began with, and it is trained already'
        )
        if self._model is not None:
            return f'{message}: keep the folder, or train from the beginning with this data as well'
        outdated = ', '.join(map(str, find_outdated(dataset.cache_dir)))
        if outdated:
            message += f'. What an older version has kept, {outdated}, is not read any more'
        return (
            f'{message}. Make them anew: `tools/train.py CONFIG --work-dir work_dirs/references '
            '--cfg-options train_cfg.max_iters=1` with the config, load_from and data that the '
            'run began with keeps them, and this one then goes on'
        )
