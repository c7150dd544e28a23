"""MMEngine's own hooks that cannot work here, and what to use instead."""

from mmengine.hooks import CheckpointHook, EMAHook, Hook


def check_hook(hook: Hook) -> None:
    """Refuse a stock hook, or an option of one, that would fail hours later or lose a checkpoint.

    Subclasses are refused for the same reasons, unless they override what fails and say so with a
    class attribute `works_on_sharded_models = True`.

    Raises:
        ValueError: Naming the hook, the option and our alternative.
    """
    if getattr(hook, 'works_on_sharded_models', False):
        return
    if isinstance(hook, EMAHook):
        raise ValueError(
            'EMAHook copies the whole model on every rank and swaps it with the trained one, which '
            'sharded parameters do not allow. A schedule that decays, WarmupCosine or '
            'WarmupStableDecay, does what averaging is for; to average checkpoints afterwards read '
            'them with '
            'internlm_mm.checkpoint.step_folders.read_model_state'
        )
    if isinstance(hook, CheckpointHook):
        for option, problem in _checkpoint_problems(hook):
            raise ValueError(f'CheckpointHook: {option}: {problem}')


def _checkpoint_problems(hook: CheckpointHook) -> list[tuple[str, str]]:
    problems = []
    if hook.save_best:
        problems.append(
            (
                f'save_best={hook.save_best!r}',
                'it writes a single file under another name, and only rank 0 would; use '
                'EvaluationHook(interval=N) with StepCheckpointHook(interval=N) and choose by the '
                'validation loss in the log',
            )
        )
    if hook.published_keys is not None:
        problems.append(
            (
                f'published_keys={hook.published_keys!r}',
                'it unpickles the checkpoint, which here is a folder without pickles; '
                'tools/convert2hf.py writes the weights alone',
            )
        )
    if hook.by_epoch:
        problems.append(
            ('by_epoch=True', 'training has no epochs to save after; set by_epoch=False')
        )
    if hook.filename_tmpl != 'iter_{}':
        problems.append(
            (
                f'filename_tmpl={hook.filename_tmpl!r}',
                "checkpoints are folders called iter_N; set filename_tmpl='iter_{}'",
            )
        )
    if hook.max_keep_ckpts == 1:
        problems.append(
            (
                'max_keep_ckpts=1',
                'it deletes the old checkpoint before the new one is written; keep 2, or use '
                'StepCheckpointHook(keep_last=1), which deletes afterwards',
            )
        )
    return problems
