"""A run built on the meta device: everything checked, nothing trained."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from internlm_mm.engine.alignment import check_alignment, check_reference
from internlm_mm.engine.held import beyond_this_machine, held_bytes
from internlm_mm.engine.load_from import check_base
from internlm_mm.engine.preflight import build_data_part, check_run
from internlm_mm.engine.start import check_start, check_start_vocabulary, choose_start
from internlm_mm.engine.stock_hooks import check_hook
from internlm_mm.engine.task_evaluation import build_tasks, check_evaluation, check_objective
from internlm_mm.parallel.accumulation import against_accumulation, check_accumulation
from internlm_mm.parallel.adapters import check_adapters, check_four_bit
from internlm_mm.parallel.attention import (
    apply_attention,
    check_packed_rows,
    check_shared_attention,
    head_dim_of,
)
from internlm_mm.parallel.context import check_documents, check_exchange
from internlm_mm.parallel.fit import check_layout
from internlm_mm.parallel.float8 import (
    check_float8,
    check_partners,
    float8_obstacles,
)
from internlm_mm.parallel.kernels import apply_kernels, check_kernels
from internlm_mm.parallel.mesh import Layout, resolve_layout
from internlm_mm.parallel.options import check_dist_cfg, check_loss_scale, check_options
from internlm_mm.parallel.pipeline_plan import check_reshard, layer_names, plan_pipeline
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.recompute import check_recompute, recompute_layers
from internlm_mm.parallel.tensor import check_tensor_plan
from internlm_mm.registry import (
    DATALOADERS,
    DATASETS,
    HOOKS,
    LOOPS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    TOKENIZERS,
)
from internlm_mm.utils.device import pick_device
from internlm_mm.utils.flops import model_flops
from internlm_mm.utils.resolve import resolve_type

LOG = logging.getLogger(__name__)


def dry_run(config: Config) -> str:
    """Build every part of a run without memory for weights, and say what the run would be.

    Args:
        config: Checked.

    Returns:
        The plan, for a person.

    Raises:
        ValueError: And friends, whatever the run itself would raise before its first step.
    """
    init_default_scope(config.get('default_scope', 'internlm_mm'))
    with torch.device('meta'):
        model = MODELS.build(config.model)
    tokenizer = (
        build_data_part(TOKENIZERS, config.tokenizer, 'tokenizer')
        if config.get('tokenizer')
        else None
    )
    if config.train_cfg.max_iters < 1:
        raise ValueError(f'train_cfg.max_iters={config.train_cfg.max_iters} must be at least 1')
    layout = _layout(config)
    train = _loader(config, 'train_dataloader', layout, config.train_cfg)
    loaders = {'train_dataloader': train}
    if config.get('val_dataloader'):
        loaders['val_dataloader'] = _loader(config, 'val_dataloader', layout)
    check_run(model, loaders, tokenizer)
    check_evaluation(config.get('val_dataloader'), config.get('val_cfg'), layout)
    tasks = (config.get('val_cfg') or {}).get('tasks') or ()
    built = build_tasks(tasks, tokenizer, model.max_seq_len) if tasks else []
    strategy = config.get('strategy', {})
    check_objective(built, model, check_kernels(strategy.get('kernels')).cross_entropy)
    for key, loader in loaders.items():  # before what this machine lacks: that may be elsewhere
        for count in getattr(loader, 'micro_batch_counts', [None]):
            seq_len, pipeline = loader.dataset.seq_len, strategy.get('pipeline')
            check_layout(layout, model, seq_len, count, pipeline, key=key)
        exchange = strategy.get('context_attention', 'all_gather')
        max_docs = getattr(loader.dataset, 'max_docs', 1)
        check_documents(exchange, layout.context, max_docs, key)
        check_packed_rows(strategy.get('attention', 'auto'), max_docs, key)
    hooks, optimizer = _check_parts(config, model)
    check_alignment(model, loaders, layout, hooks, _val_loop(config))
    _check_techniques(strategy, layout, model)
    next(iter(train))  # reads one step: truncated or foreign files show here
    memory, beyond = _memory_lines(strategy, layout, model, optimizer)
    refused = [*beyond, *_float8_lines(strategy)]
    left = _budget_lines(strategy)
    fits = 'all else fits' if refused or left else 'everything fits'
    lines = [
        *_model_lines(model, train.dataset.seq_len),
        *_start_lines(config, model, tokenizer, loaders, hooks),
        *_layout_lines(strategy, layout),
        *memory,
        *refused,
        *left,
        *_data_lines(config, loaders),
        *(f'task       {task.name}: {len(task):,} samples' for task in built),
        *_tokenizer_lines(config, tokenizer),
        *_run_lines(config, train),
        f'dry run: {fits} together, nothing was trained',
    ]
    return '\n'.join(lines)


def _check_techniques(strategy: Mapping[str, Any], layout: Layout, model: nn.Module) -> None:
    """What placing the model on ranks would refuse."""
    reshard = strategy.get('reshard', 'step')
    dtype, _ = check_options(strategy.get('precision'), reshard)
    offload = strategy.get('offload', False)
    check_four_bit(model, layout, reshard, offload, dtype)
    plan = None
    if layout.pipeline > 1:
        plan = plan_pipeline(
            layer_names(model),
            layout.pipeline,
            strategy.get('pipeline'),
            strategy.get('compile', False),
        )
        check_reshard(plan, reshard)
    kernels = check_kernels(strategy.get('kernels'))
    if Techniques(param_dtype=dtype, offload=offload).needs_mesh(layout.world_size):
        obstacles = against_accumulation(layout, kernels.fuse, plan)
        check_accumulation(kernels.fuse_accumulation, obstacles)
    if layout.tensor > 1:
        check_tensor_plan(model, layout.tensor)
    check_exchange(strategy.get('context_attention', 'all_gather'))
    if layout.context > 1:
        check_shared_attention(
            strategy.get('attention', 'auto'),
            pick_device(),
            dtype,
            layout.context,
            strategy.get('context_attention', 'all_gather'),
            head_dim_of(model),
        )


def _layout(config: Config) -> Layout:
    """The layout for as few processes as the config allows."""
    parallel = dict(config.get('strategy', {}).get('parallel') or {})
    world_size = 1
    for degree in parallel.values():
        world_size *= max(degree, 1)
    return resolve_layout(parallel, world_size, world_size)


def _loader(config: Config, key: str, layout: Layout, train_cfg: dict | None = None) -> Any:
    loader = dict(config[key])
    seed = (config.get('randomness') or {}).get('seed') or 0
    loader['dataset'] = build_data_part(
        DATASETS, loader['dataset'], f'{key}.dataset', config.get('tokenizer'), seed=seed
    )
    loader['num_workers'] = 0
    options: dict[str, Any] = {'data_rank': 0, 'data_world_size': layout.data}
    if train_cfg is not None:
        keys = ('global_batch_size', 'micro_batch_size', 'rampup')
        options |= {key: train_cfg.get(key) for key in keys}
    return DATALOADERS.build(loader, default_args=options)


def _check_parts(config: Config, model: nn.Module) -> tuple[list[Any], Any]:
    """Build what needs no data: strategy options, schedules, hooks and optimizer.

    Gives the last two.
    """
    strategy = config.get('strategy', {})
    dtype, _ = check_options(strategy.get('precision'), strategy.get('reshard', 'step'))
    with _mentions_rehearsals():
        apply_attention(model, strategy.get('attention', 'auto'), pick_device(), dtype)
    kernels, layout = check_kernels(strategy.get('kernels')), _layout(config)
    rounding = check_float8(strategy.get('float8'), dtype)
    check_adapters(model, kernels.fuse, rounding is not None)
    if rounding is not None:
        check_partners(layout.tensor, kernels.fuse)
    with _mentions_rehearsals():
        apply_kernels(model, kernels, pick_device(), dtype, layout.tensor)
    share = check_recompute(strategy.get('recompute', 0.0))
    if share is not None:  # what a budget means is known when GPUs are counted: --rehearse tells
        recompute_layers(model, share)
    wrapper_cfg = dict(config.optim_wrapper)
    constructor = wrapper_cfg.pop('constructor', 'DecayGroupsConstructor')
    build = {'type': constructor, 'optim_wrapper_cfg': wrapper_cfg}
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(build)(model)
    check_loss_scale(dtype, wrapper)
    check_dist_cfg((config.get('env_cfg') or {}).get('dist_cfg') or {})
    for schedule in config.get('param_scheduler') or []:
        defaults = {'by_epoch': False, 'end': config.train_cfg.max_iters}
        PARAM_SCHEDULERS.build({**defaults, **schedule}, default_args={'optimizer': wrapper})
    named = [hook for hook in (config.get('default_hooks') or {}).values() if hook is not None]
    hooks = []
    for hook in (*named, *(config.get('custom_hooks') or [])):
        hooks.append(HOOKS.build({k: v for k, v in hook.items() if k != 'priority'}))
        check_hook(hooks[-1])
    folder = Path(config.work_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise PermissionError(f'work_dir={config.work_dir!r} cannot be made: {existing}')
    return hooks, wrapper.optimizer


@contextmanager
def _mentions_rehearsals() -> Iterator[None]:
    """What this machine lacks, the job's machines may have: tell who is refused how to ask that."""
    try:
        yield
    except ValueError as error:
        if 'needs CUDA' in str(error) and pick_device().type == 'cpu':
            raise ValueError(f'{error}; for GPUs that are elsewhere: --rehearse N') from error
        raise


def _val_loop(config: Config) -> Any:
    """The class of what evaluates, if anything does."""
    kind = (config.get('val_cfg') or {}).get('type')
    return None if kind is None else resolve_type(kind, LOOPS, 'val_cfg.type')


def _start_lines(
    config: Config, model: nn.Module, tokenizer: Any, loaders: dict[str, Any], hooks: list[Any]
) -> list[str]:
    """Find and verify what the run would begin from, compare it with the model, and say so."""
    start = choose_start(
        config.get('resume', False), config.get('load_from'), Path(config.work_dir), True, LOG
    )
    if start is None:
        check_base(None, model, hooks)
        return []
    check_reference(start, model)
    for one in start.chain():
        source = check_start(one, model, config, LOG)
    check_start_vocabulary(start, tokenizer, loaders, LOG)
    if source is None:
        return [f'start      {", ".join(start.content)} of {start.path}']
    sizes: Counter[str] = Counter()
    for name in source.weights:
        dtype, shape = source.weights.dtype(name), torch.Size(source.weights.shape(name))
        sizes[str(dtype).removeprefix('torch.')] += dtype.itemsize * shape.numel()
    return [
        f'start      the weights of {start.path}, {source.form}: {source.family}, '
        f'{len(source.weights)} tensors, {_bytes(sizes.total())} in {" and ".join(sizes)}'
    ]


def _model_lines(model: nn.Module, seq_len: int) -> list[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [f'model      {type(model).__name__}, {parameters:,} parameters']
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained < parameters:
        lines[0] += f', of which {trained:,} are trained'
    flops = model_flops(model, seq_len)
    if flops is not None:
        lines.append(
            f'           {flops.full / 1e9:.3f} GFLOP a token at {seq_len} tokens '
            f'({flops.causal / 1e9:.3f} counted causally)'
        )
    return lines


def _layout_lines(strategy: Mapping[str, Any], layout: Layout) -> list[str]:
    precision = {'param': 'float32', 'reduce': 'float32', **(strategy.get('precision') or {})}
    processes = f'{layout.world_size} processes' if layout.world_size > 1 else 'one process'
    return [
        f'layout     {layout} on {processes}; '
        f'compute in {precision["param"]}, reduce in {precision["reduce"]}'
    ]


def _memory_lines(
    strategy: Mapping[str, Any], layout: Layout, model: nn.Module, optimizer: Any
) -> tuple[list[str], list[str]]:
    """What a rank holds, and why this machine could not hold that, if so."""
    reshard, offload = strategy.get('reshard', 'step'), bool(strategy.get('offload', False))
    param, reduce = check_options(strategy.get('precision'), reshard)
    float8 = check_float8(strategy.get('float8'), param)
    how = {'reshard': reshard, 'offload': offload, 'float8': float8, 'optimizer': optimizer}
    held = held_bytes(model, layout, param, reduce, **how)
    text = (
        f'memory     {_bytes(held.states)} masters and moments, {_bytes(held.gradients)} gradients'
        + (' in host memory' if offload else '')
        + (f', {_bytes(held.frozen)} frozen weights' if held.frozen else '')
        + (f', {_bytes(held.gathered)} gathered weights' if held.gathered else '')
        + ' a rank, and activations'
    )
    surely = held_bytes(model, layout, param, reduce, **how, unknown=0)
    beyond = beyond_this_machine(surely, 1, offload or pick_device().type == 'cpu')
    told = f'           on this machine alone it would be refused: {beyond}'
    return [text], [told] if beyond else []


def _budget_lines(strategy: Mapping[str, Any]) -> list[str]:
    """What a budget means depends on the number of GPUs, which nobody has told."""
    recompute = strategy.get('recompute', 0.0)
    if check_recompute(recompute) is not None:
        return []
    return [
        f'recompute  {dict(recompute)} was not tried: --rehearse N tells what it means on N GPUs'
    ]


def _float8_lines(strategy: Mapping[str, Any]) -> list[str]:
    """Told, not refused: a machine without GPUs may well look at a config that is for one."""
    dtype, _ = check_options(strategy.get('precision'), strategy.get('reshard', 'step'))
    options = check_float8(strategy.get('float8'), dtype)
    found = [] if options is None else float8_obstacles(pick_device(), dtype, options.emulate)
    return [f'float8     this machine would refuse it: {"; ".join(found)}'] if found else []


def _bytes(size: float) -> str:
    return f'{size / 2**30:.2f} GiB' if size >= 2**30 else f'{size / 2**20:.1f} MiB'


def _data_lines(config: Config, loaders: dict[str, Any]) -> list[str]:
    lines = []
    for key, loader in loaders.items():
        dataset = loader.dataset
        given = config[key]['dataset']
        root = given.get('data_root') or given.get('path') or type(dataset).__name__
        rows = len(dataset)
        domains = f', domains {", ".join(dataset.domains)}' if dataset.domains else ''
        lines.append(
            f'{key.split("_")[0]:<10} {root}: {rows:,} rows of {dataset.seq_len} tokens '
            f'= {rows * dataset.seq_len:,} an epoch{domains}'
        )
    return lines


def _tokenizer_lines(config: Config, tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return ['tokenizer  none named: checkpoints and exports will have none']
    return [
        f'tokenizer  {tokenizer.vocab_size} tokens of {config.model.get("vocab_size")} in the model'
    ]


def _run_lines(config: Config, train: Any) -> list[str]:
    cfg = config.train_cfg
    rows = sum(train.batch_size(step) for step in range(min(cfg.max_iters, 100_000)))
    if cfg.max_iters > 100_000:  # ramp-ups are long over
        rows += (cfg.max_iters - 100_000) * cfg.global_batch_size
    tokens = rows * train.dataset.seq_len
    accumulation = cfg.global_batch_size // (cfg.micro_batch_size * train.data_world_size)
    return [
        f'step       {cfg.global_batch_size} rows = '
        f'{cfg.global_batch_size * train.dataset.seq_len:,} '
        f'tokens: {_several(accumulation, "micro-batch", "micro-batches")} of '
        f'{_several(cfg.micro_batch_size, "row")} on '
        f'{"each of " if train.data_world_size > 1 else ""}'
        f'{_several(train.data_world_size, "data rank")}',
        f'run        {cfg.max_iters:,} steps, {tokens:,} tokens, '
        f'{rows / len(train.dataset):.2f} epochs, '
        f'into {config.work_dir}',
    ]


def _several(number: int, one: str, many: str | None = None) -> str:
    return f'{number:,} {one if number == 1 else many or one + "s"}'
