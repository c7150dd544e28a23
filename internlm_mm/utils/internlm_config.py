"""A config of InternLM (`7B_sft.py`) or InternEvo becomes one of ours, key by key."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from internlm_mm.utils.config import check_config, load_config
from internlm_mm.utils.config_draft import Code, Draft, Row, literal
from internlm_mm.utils.config_reader import ConfigError
from internlm_mm.utils.internlm_config_keys import ALWAYS, DTYPES
from internlm_mm.utils.internlm_data import add_checkpoints, add_data
from internlm_mm.utils.internlm_layout import (
    Batches,
    Degrees,
    parse_skip_batches,
    read_batches,
    read_degrees,
)
from internlm_mm.utils.internlm_model import add_model
from internlm_mm.utils.internlm_reader import InternLMConfig, read_internlm_config
from internlm_mm.utils.suggest import did_you_mean

_OBJECT_STORES = ('boto3:', 'volc:', 'oss2:')
_READABLE = ('internlm', 'internevo', 'normal', 'hf', 'hf_llama', 'newinternlm')
_HYSTERESIS = {
    'grad_scaler.fp16.initial_scale': 'initial',
    'grad_scaler.fp16.min_scale': 'minimum',
    'grad_scaler.fp16.growth_interval': 'growth_interval',
    'grad_scaler.growth_factor': 'growth_factor',
    'grad_scaler.backoff_factor': 'backoff_factor',
    'grad_scaler.max_scale': 'maximum',
    'grad_scaler.hysteresis': 'hysteresis',
}


def convert_config(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    gpus: int | None = None,
    overwrite: bool = False,
) -> list[Row]:
    """Write a config of ours that does what an InternLM config does.

    What is written has been read again and compared with the constructors that it names.

    Args:
        source: The config, of a 2023 release of InternLM or of InternEvo.
        out: The file to write.
        data: Tokens made by tools/preprocess_data.py: the folder with `train` in it, or one of
            training data alone.
        tokenizer: The tokenizer they were made with; by default the one that the folder records.
        gpus: Of the job, which the step's size depends on.
        overwrite: Whether `out` may exist.

    Returns:
        What became of every key, in the order of the file.

    Raises:
        FileNotFoundError: If `source` or `data` is not there.
        FileExistsError: If `out` is there.
        ValueError: If `source` cannot be read without running it, or asks for what cannot be had.
    """
    target = Path(out)
    if target.suffix != '.py':
        raise ValueError(f'{str(out)!r}: a config is a Python file, {target.stem}.py')
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} exists; choose another file or overwrite it (--overwrite)')
    config = read_internlm_config(source)
    text, rows = convert_text(config, target.name, data=data, tokenizer=tokenizer, gpus=gpus)
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f'.{target.stem}.unchecked.py')
    try:
        unchecked.write_text(text, encoding='utf-8')
        check_config(load_config(unchecked))
        os.replace(unchecked, target)
    except ConfigError as error:
        message = str(error).replace(str(unchecked.resolve()), str(target))
        raise ValueError(f'{source} gives a config that cannot be run: {message}') from error
    finally:
        unchecked.unlink(missing_ok=True)
    return rows


def convert_text(
    config: InternLMConfig,
    name: str,
    *,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    gpus: int | None = None,
) -> tuple[str, list[Row]]:
    """The text of the config, and what became of every key; see `convert_config`."""
    draft = Draft(config)
    draft.bases = ['_base_.default_runtime', '_base_.schedules.adamw_cosine']
    degrees = read_degrees(draft, gpus)
    batches = read_batches(draft, degrees)
    seq_len = draft.take('data.seq_len', int)
    guess = max(degrees.shard, 1)
    draft.put('', '_data_ranks', degrees.data_ranks or guess)
    _run(draft)
    add_model(draft, seq_len)
    add_data(draft, seq_len, data, tokenizer)
    _loop(draft, batches)
    _optimizer(draft)
    _precision(draft)
    add_checkpoints(draft)
    draft.finish()
    return draft.text(_heading(draft, name, degrees, batches, seq_len, gpus)), list(
        draft.rows.values()
    )


def _heading(
    draft: Draft, name: str, made: Degrees, batches: Batches, seq_len: int, gpus: int | None
) -> str:
    job = str(draft.look('JOB_NAME', 'A run')).replace('\\', '/').replace('"', "'")
    ranks = made.data_ranks or max(made.shard, 1)
    processes = gpus or ranks * made.tensor * made.context * made.pipeline
    rows = batches.micro_num * batches.micro_bsz * ranks
    text = [
        f'{job}: {draft.source.path.name}, converted by tools/convert_config.py.',
        '',
        f'    torchrun --nproc-per-node {min(processes, 8)} tools/train.py {shlex.quote(name)} '
        '--launcher pytorch',
        '',
        f'{rows:,} rows of {seq_len:,} tokens a step = {rows * seq_len:,} tokens, on {processes} '
        f'GPU{"s" if processes > 1 else ""}.',
    ]
    if gpus is None:
        text += [
            'How many GPUs the job has was not said (--gpus), and the size of a step follows from',
            'that in InternLM: set _data_ranks to GPUs / (tensor x context x pipeline).',
        ]
    text += ['', 'Always different from the original (docs/en/migration.md):', '']
    return '\n'.join([*text, *(f'- {line}' for line in ALWAYS), ''])


def _run(draft: Draft) -> None:
    if isinstance(draft.look('JOB_NAME'), str):
        draft.put('', 'experiment_name', draft.look('JOB_NAME'), 'JOB_NAME')
    for key, block, name in (
        ('cudnn_deterministic', 'randomness', 'deterministic'),
        ('cudnn_benchmark', 'env_cfg', 'cudnn_benchmark'),
    ):
        if draft.take(key, bool, False):
            draft.put(block, name, True, key)
        else:
            draft.say(key, 'as here')
    if 'seed' in draft.source.values or draft.look('data.seed') is not None:
        draft.put('randomness', 'seed', draft.look('data.seed', draft.look('seed')), 'data.seed')
    if draft.take('enable_tb', bool, True):
        draft.say('enable_tb', 'as here: visualizer writes for TensorBoard')
    else:
        local = draft.use('mmengine.visualization', 'LocalVisBackend')
        draft.put('visualizer', 'vis_backends', [{'type': local}], 'enable_tb')


def _loop(draft: Draft, batches: Batches) -> None:
    micro_num, micro_bsz, micro, rampup = (
        batches.micro_num,
        batches.micro_bsz,
        batches.micro_batch_size,
        batches.rampup,
    )
    block = 'train_cfg ='
    draft.put(block, 'type', draft.use('internlm_mm.engine', 'TokenTrainLoop'))
    draft.put(block, 'max_iters', draft.take('data.total_steps', int), 'data.total_steps')
    rows = Code(f'{micro_num} * {micro_bsz} * _data_ranks')
    draft.put(block, 'global_batch_size', rows, 'data.micro_num', 'data.gradient_accumulation')
    note = '' if micro == micro_bsz else 'so that every stage of the pipeline has one'
    draft.put(block, 'micro_batch_size', micro, 'data.micro_bsz', note=note)
    if rampup is not None:
        start, increment, every = rampup
        steps = {
            'start': Code(f'{start} * {micro_bsz} * _data_ranks'),
            'increment': Code(f'{increment} * {micro_bsz} * _data_ranks'),
            'interval': every,
        }
        draft.put(block, 'rampup', steps, 'data.rampup_batch_size')
    skipped = parse_skip_batches(draft)
    if skipped:
        note = 'the learning rate moves on at such a step'
        draft.put(block, 'skip_batches', skipped, 'data.skip_batches', note=note)
    else:
        draft.say('data.skip_batches', 'as here: none')


def _optimizer(draft: Draft) -> None:
    block, take = 'optim_wrapper.optimizer', draft.take
    rate = take('adam.lr', float)
    draft.put(block, 'lr', rate, 'adam.lr')
    first = take('adam.adam_beta1', float)
    second = take('beta2_scheduler.init_beta2', float, take('adam.adam_beta2', float))
    keys = ('adam.adam_beta1', 'adam.adam_beta2', 'beta2_scheduler.init_beta2')
    draft.put(block, 'betas', (first, second), *keys)
    draft.put(block, 'eps', take('adam.adam_eps', float), 'adam.adam_eps')
    note = 'on matrices only, not on norms and biases'
    decay = take('adam.weight_decay', float)
    draft.put(block, 'weight_decay', decay, 'adam.weight_decay', note=note, changed=decay != 0)
    key = 'hybrid_zero_optimizer.clip_grad_norm'
    norm = take(key, float, 0.0)
    clip = {'max_norm': norm} if norm > 0 else None
    draft.put('optim_wrapper', 'clip_grad', clip, key)
    steps = take('data.total_steps', int)
    total = take('lr_scheduler.total_steps', int, steps)
    ratio = take('lr_scheduler.warmup_ratio', float, 0.0)
    key = 'lr_scheduler.warmup_ratio'
    draft.put('param_scheduler[0]', 'warmup', int(total * ratio), key)
    least = take('lr_scheduler.eta_min', float, 0.0)
    share = float(f'{least / rate:.12g}') if rate else 0.0
    draft.put('param_scheduler[0]', 'min_ratio', share, 'lr_scheduler.eta_min')
    if total == steps:
        draft.say('lr_scheduler.total_steps', 'as here: the length of the run')
    else:
        draft.put('param_scheduler[0]', 'end', total, 'lr_scheduler.total_steps')
    exponent = take('beta2_scheduler.c', float, 0.0)
    if exponent > 0:
        name = draft.use('internlm_mm.optim', 'Beta2Schedule')
        schedule = {'type': name, 'exponent': exponent}
        entry = Code(f'[*param_scheduler, {literal(schedule)}]')
        draft.put('', 'param_scheduler', entry, 'beta2_scheduler.c')
    else:
        draft.say('beta2_scheduler.c', 'as here: beta2 does not move')


def _precision(draft: Draft) -> None:
    key = 'model.dtype'
    dtype = draft.look(key, 'torch.float16')
    if dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES)
        raise ValueError(f'{draft.source.path}: {key}={dtype!r} is unknown.{hint}')
    precision = {'param': DTYPES[dtype], 'reduce': 'float32'}
    is_tf32 = dtype == 'torch.tf32'
    note = 'TensorFloat-32 is off here' if is_tf32 else ''
    draft.put('strategy', 'precision', precision, key, note=note, changed=is_tf32)
    scale = {
        name: draft.look(source)
        for source, name in _HYSTERESIS.items()
        if draft.look(source) is not None
    }
    if DTYPES[dtype] == 'float16':
        draft.put('optim_wrapper', 'loss_scale', scale, *_HYSTERESIS)
    else:
        draft.say('grad_scaler', f'{DTYPES[dtype]} needs no loss scale')
    share = draft.look('model.checkpoint', 0)  # True and False are 1 and 0
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(
            f'{draft.source.path}: model.checkpoint={share!r} must be a bool or lie in [0, 1]'
        )
    if share:
        draft.put('strategy', 'recompute', float(share), 'model.checkpoint')
    else:
        draft.say('model.checkpoint', 'as here: nothing is recomputed')
    if draft.take('model.use_flash_attn', bool, True):
        draft.say('model.use_flash_attn', "strategy.attention='auto': the best there is", 'mapped')
    else:
        draft.put('strategy', 'attention', 'sdpa', 'model.use_flash_attn')
