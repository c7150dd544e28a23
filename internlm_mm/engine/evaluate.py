"""Held-out loss of a finished model, wherever it lies."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import init_default_scope

from internlm_mm.checkpoint.hf_import import import_hf
from internlm_mm.checkpoint.pretrained import is_hf_folder, load_model, load_tokenizer_of
from internlm_mm.checkpoint.step_folders import CONFIG_FILE, find_checkpoint
from internlm_mm.engine.runner import LLMRunner
from internlm_mm.engine.task_evaluation import RECORDS_FOLDER
from internlm_mm.registry import HOOKS, OBJECTIVES
from internlm_mm.utils.config import apply_options, check_config, load_config
from internlm_mm.utils.resolve import resolve_type
from internlm_mm.utils.suggest import nearest_path

METRICS_FILE = 'metrics.json'
"""What an evaluation found, in its output folder."""

LONGEST_ROW = 4096
"""Tokens in a row where no config says how long, if the model reads as many."""

_TRAINING_ONLY = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler')


def evaluate(
    target: str | Path,
    *,
    checkpoint: str | Path | None = None,
    data: str | Path | None = None,
    output: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    launcher: str = 'none',
) -> dict[str, Any]:
    """Loss of a model on held-out data, over all and by domain, and tasks. Collective.

    Weights are laid out over the processes there are, whatever the layout they were trained on.

    Args:
        target: A work dir, a checkpoint `iter_N`, a Hugging Face folder, or a config.
        checkpoint: Weights to take in place of the target's own; a config has none.
        data: Token file or folder of them to read in place of the config's `val_dataloader`.
        output: Folder for what was found: `metrics.json`, reports and records of tasks. None
            keeps none of it.
        options: Changes of the config, by dotted key.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        'weights' (their path), 'rank', and what the loop in `val_cfg` measures: 'loss',
        'perplexity', 'token_accuracy', each also 'loss/DOMAIN' and so on, and 'TASK/METRIC'.

    Raises:
        FileNotFoundError: If target, weights or data do not exist.
        ValueError: If weights or data are not told, are damaged or do not fit together.
    """
    options = dict(options or {})
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f'output {output} is a file: name a folder')
    config, weights = _read_target(target, checkpoint, options)
    if data is not None:
        config.val_dataloader = _loader_of(config, data)
        apply_options(config, {k: v for k, v in options.items() if k.startswith('val_dataloader.')})
    if config.get('val_dataloader') is None and not (config.get('val_cfg') or {}).get('tasks'):
        raise ValueError(
            f'{target} names no held-out data (val_dataloader): give some with --data, or '
            'val_cfg.tasks in a config'
        )
    _strip(config, options)
    config.launcher = launcher
    with tempfile.TemporaryDirectory(prefix='internlm_mm_test_') as folder:
        config.work_dir = folder
        check_config(config)
        result = _run(config, weights)
        if output is not None and result['rank'] == 0:
            _keep(Path(output), Path(folder) / RECORDS_FOLDER, result)
        return result


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Lines of a table: a line for each domain, one for all of them, and one for other metrics."""
    domains = [key.removeprefix('loss/') for key in metrics if key.startswith('loss/')]
    columns = [key for key in ('loss', 'perplexity', 'token_accuracy') if key in metrics]
    forms = {'loss': '.4f', 'perplexity': ',.3f', 'token_accuracy': '.2%'}
    rows = [('domain', *columns)] if columns else []
    for name in [*domains, ''] if columns else ():
        ends = [f'{key}/{name}' if name else key for key in columns]
        numbers = [format(metrics[end], forms[key]) for key, end in zip(columns, ends, strict=True)]
        rows.append((name or 'all', *numbers))
    shown = {'weights', 'rank'} | {
        f'{key}/{name}' if name else key for key in columns for name in [*domains, '']
    }
    others = [(key, f'{value:.4f}') for key, value in metrics.items() if key not in shown]
    return '\n'.join([*_aligned(rows), *_aligned(others)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(
            f'{cell:>{width}}' if index else f'{cell:<{width}}'
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _keep(output: Path, records: Path, result: Mapping[str, Any]) -> None:
    """Copy what tasks wrote into the folder that the user wants, with all metrics beside it."""
    output.mkdir(parents=True, exist_ok=True)
    if records.is_dir():
        shutil.copytree(records, output, dirs_exist_ok=True)
    kept = {key: value for key, value in result.items() if key != 'rank'}
    text = json.dumps(kept, indent=2, ensure_ascii=False)
    (output / METRICS_FILE).write_text(text + '\n', encoding='utf-8')


def _read_target(
    target: str | Path, checkpoint: str | Path | None, options: Mapping[str, Any]
) -> tuple[Config, Path]:
    """The config to evaluate with and the folder of the weights."""
    if is_hf_folder(target):
        config = Config({})
        weights: Path | None = Path(target)
    elif Path(target).is_dir():
        weights = find_checkpoint(target)
        config = load_config(weights / CONFIG_FILE)
    else:
        try:
            config, weights = load_config(target), None
        except FileNotFoundError as error:
            near = '' if 'Did you mean' in str(error) else nearest_path(target)
            raise FileNotFoundError(
                f'{target} is neither a checkpoint nor a Hugging Face folder, and there is '
                f'{str(error).removesuffix(".")}{near}'
            ) from error
    if checkpoint is not None:
        weights = Path(checkpoint) if is_hf_folder(checkpoint) else find_checkpoint(checkpoint)
    if weights is None:
        raise ValueError(f'{target} is a config and has no weights: give some with --checkpoint')
    if is_hf_folder(weights):
        config.model = import_hf(weights)[0]
    elif config.get('model') is None:
        config.model = load_config(weights / CONFIG_FILE).model
    apply_options(config, options)
    return config, weights


def _loader_of(config: Config, data: str | Path) -> dict[str, Any]:
    """A loader over other data with the row and batch sizes the config has, if it has any."""
    given = config.get('val_dataloader') or {}
    longest = config.model.get('max_seq_len') or LONGEST_ROW
    seq_len = given.get('dataset', {}).get('seq_len') or min(longest, LONGEST_ROW)
    return {
        'type': 'EvalLoader',
        'dataset': {
            'type': 'PretrainDataset',
            'data_root': str(data),
            'seq_len': seq_len,
            'shuffle': False,
        },
        'micro_batch_size': given.get('micro_batch_size', 1),
    }


def _strip(config: Config, options: Mapping[str, Any]) -> None:
    """Take out what only training needs, and what was decided for the machines of a run."""
    for key in _TRAINING_ONLY:
        config[key] = None
    strategy = dict(config.get('strategy') or {'type': 'HybridParallelStrategy'})
    for key in ('parallel', 'compile', 'recompute'):
        if not any(option.startswith(f'strategy.{key}') for option in options):
            strategy.pop(key, None)
    axes = [option.split('.')[-1] for option in options if option.startswith('strategy.parallel.')]
    if axes:  # those of the run would stand beside them
        strategy['parallel'] = {axis: strategy['parallel'][axis] for axis in axes}
    config.strategy = strategy
    config.val_cfg = config.get('val_cfg') or {'type': _usual_loop(config)}
    kind = config.val_cfg.type
    loop = getattr(kind, '__name__', str(kind)).rpartition('.')[2]
    if config.val_cfg.get('tasks') and loop == 'PerplexityLoop':
        config.model.pop('objective', None)  # which may be of another kind of training
    hooks = [*(config.get('default_hooks') or {}).values(), *(config.get('custom_hooks') or [])]
    config.default_hooks, config.custom_hooks = {}, [hook for hook in hooks if _is_needed(hook)]
    config.visualizer = {'type': 'ScalarVisualizer'}
    config.tokenizer = None  # the one beside the weights is taken
    config.load_from, config.resume = None, False
    config.randomness = config.get('randomness') or {'seed': 0}
    config.log_level = 'WARNING'


def _usual_loop(config: Config) -> str:
    """What measures a config that does not say how: by what its objective takes."""
    objective = (config.get('model') or {}).get('objective')
    if isinstance(objective, Mapping):
        kind = resolve_type(objective['type'], OBJECTIVES, 'model.objective.type')
        if getattr(kind, 'takes_pairs', False):
            return 'PreferenceLoop'
    return 'PerplexityLoop'


def _is_needed(hook: Mapping[str, Any] | None) -> bool:
    """Whether data means something only with what a hook gives it."""
    found = hook and resolve_type(hook['type'], HOOKS, 'default_hooks.type')
    return bool(getattr(found, 'needed_to_evaluate', False))


def _run(config: Config, weights: Path) -> dict[str, Any]:
    init_default_scope(config.get('default_scope', 'internlm_mm'))
    hugging_face, had_group = is_hf_folder(weights), dist.is_initialized()
    if not hugging_face:
        config.load_from = str(weights)
    runner = LLMRunner.from_cfg(config)
    if hugging_face:
        runner.model = load_model(weights, 'cpu', torch.float32)
    runner.tokenizer = load_tokenizer_of(weights)
    metrics = runner.val()
    result = {'weights': str(weights), 'rank': runner.rank, **metrics}
    if dist.is_initialized() and not had_group:
        dist.barrier()  # launchers end the others when one process has left
        dist.destroy_process_group()
    return result
