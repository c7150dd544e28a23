"""A job of many GPUs, reckoned without any: what its ranks would hold."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from internlm_mm.datasets.sampler import BatchSizeRampup, check_division
from internlm_mm.engine.alignment import check_pairs, check_reference
from internlm_mm.engine.memory_budget import decide
from internlm_mm.engine.preflight import check_run, give_tokenizer, propose_fit
from internlm_mm.engine.rehearse_memory import model_sizes, run_sizes, unknown_parameters
from internlm_mm.engine.rehearse_rank import build_model, build_rank, groups_of, numel
from internlm_mm.engine.start import check_start, choose_start
from internlm_mm.parallel.accumulation import against_accumulation, check_accumulation
from internlm_mm.parallel.adapters import check_adapters
from internlm_mm.parallel.attention import check_packed_rows
from internlm_mm.parallel.context import check_documents
from internlm_mm.parallel.fit import check_layout
from internlm_mm.parallel.float8 import (
    Float8,
    check_float8,
    check_partners,
    check_runs,
)
from internlm_mm.parallel.kernels import check_kernels, check_whole_matrices
from internlm_mm.parallel.mesh import Layout, resolve_layout
from internlm_mm.parallel.options import check_dist_cfg, check_loss_scale, check_options
from internlm_mm.parallel.pipeline_plan import PipelinePlan, layer_names, plan_pipeline
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.recompute import check_recompute
from internlm_mm.planner import ModelSizes, RunSizes, predict_memory
from internlm_mm.registry import DATASETS, OPTIM_WRAPPER_CONSTRUCTORS

LOG = logging.getLogger(__name__)

TECHNIQUES = ('recompute', 'compile', 'attention', 'context_attention', 'pipeline', 'offload')
"""Keys of `strategy` that `place_model` is told as they are."""


def rehearse(
    config: Config, world_size: int, gpus_per_node: int = 8, rank: int | None = None
) -> dict[str, Any]:
    """Build what ranks of a job would hold, and reckon their memory. No GPU, no memory, no data.

    Args:
        config: Checked.
        world_size: GPUs of the job.
        gpus_per_node: Of one machine.
        rank: Which rank to build; the first one of every pipeline stage if None, since stages
            differ and all else is alike.

    Returns:
        Types of JSON: 'layout', 'model', 'start' (what it begins from, if anything), 'step',
        'data', 'techniques', 'stages' (who holds which layers) and 'ranks', each with
        'coordinate', 'groups', 'shapes', 'parameters' and 'memory' in bytes.

    Raises:
        ValueError: And friends: what the job itself would raise before its first step.
    """
    start = time.perf_counter()
    local_size = _check_nodes(world_size, gpus_per_node)
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f'--rehearse-rank {rank}: the ranks are 0 to {world_size - 1}')
    init_default_scope(config.get('default_scope', 'internlm_mm'))
    strategy = dict(config.get('strategy') or {})
    model = build_model(config)
    with propose_fit(config):
        layout = resolve_layout(strategy.get('parallel'), world_size, local_size)
    check_pairs(model, layout)
    step, data = _step(config, model, layout)
    start_text = _start(config, model)
    asked = _techniques(strategy)
    is_budget = check_recompute(asked.recompute) is None
    techniques = replace(asked, recompute=0.0) if is_budget else asked
    check_layout(
        layout, model, step['seq_len'], step['micro_batches'], techniques.pipeline, local_size
    )
    plan = None
    if layout.pipeline > 1:
        plan = plan_pipeline(
            layer_names(model), layout.pipeline, techniques.pipeline, techniques.compile
        )
    is_packed = data['documents'] == 'packed'
    _check_partners(model, layout, techniques, strategy.get('kernels'), plan)
    _check_rows(layout, techniques, is_packed, data['max_docs'])
    optimizer = _check_optimizer(config, model, techniques)
    shown = [layout.rank(pipeline=p) for p in range(layout.pipeline)] if rank is None else [rank]
    ranks = [build_rank(config, layout, number, techniques) for number in shown]
    sizes = model_sizes(model)
    run = run_sizes(
        layout,
        techniques,
        plan,
        step,
        model=model,
        optimizer=optimizer,
        packed=is_packed,
        has_mask=any(one.pop('has_mask') for one in ranks),
        has_kernel=ranks[0]['attention'].startswith('varlen') and layout.context > 1,
    )
    chosen = None
    if is_budget:
        share, chosen = decide(model, run, asked)
        techniques = replace(techniques, recompute=share)
        run = replace(run, recompute=share)
    for one in ranks:
        one['node'], one['gpu'] = divmod(one['rank'], local_size)
        one['groups'] = groups_of(layout, one['rank'], local_size)
        one['memory'] = _memory(one, sizes, run)
    return {
        'world_size': world_size,
        'gpus_per_node': local_size,
        'nodes': world_size // local_size,
        'model': {
            'type': type(model).__name__,
            'parameters': sum(parameter.numel() for parameter in model.parameters()),
        },
        'layout': layout.as_dict(),
        'start': start_text,
        'step': step,
        'data': data,
        'techniques': {
            **_told(techniques),
            'recompute_chosen': chosen,
            'attention': ranks[0]['attention'],
            'schedule': plan and plan.schedule,
        },
        'stages': _stages(layout, plan, list(getattr(model, 'layers', ()))),
        'ranks': ranks,
        'seconds': time.perf_counter() - start,
    }


def _check_partners(
    model: nn.Module,
    layout: Layout,
    techniques: Techniques,
    asked_kernels: Mapping[str, Any] | None,
    plan: PipelinePlan | None,
) -> None:
    """Refuse techniques that do not go with each other, as the job does."""
    kernels = check_kernels(asked_kernels)
    check_whole_matrices(kernels, layout.tensor)
    if techniques.needs_mesh(layout.world_size):
        obstacles = against_accumulation(layout, kernels.fuse, plan)
        check_accumulation(kernels.fuse_accumulation, obstacles)
    check_adapters(model, kernels.fuse, techniques.float8 is not None)
    if techniques.float8 is not None:
        check_partners(layout.tensor, kernels.fuse)
        gpu = torch.device('cuda')
        check_runs(techniques.float8, gpu, techniques.param_dtype, elsewhere=True)


def _check_rows(layout: Layout, techniques: Techniques, is_packed: bool, max_docs: int) -> None:
    """Refuse rows of documents that attention does not take, as the job does."""
    key = 'train_dataloader'
    check_documents(techniques.context_attention, layout.context, 2 if is_packed else 1, key)
    check_packed_rows(techniques.attention, max_docs, key)


def _told(techniques: Techniques) -> dict[str, Any]:
    return {
        'param': str(techniques.param_dtype).removeprefix('torch.'),
        'reduce': str(techniques.reduce_dtype).removeprefix('torch.'),
        'reshard': techniques.reshard,
        **{key: getattr(techniques, key) for key in ('recompute', 'compile', 'offload')},
        'float8': _float8_text(techniques.float8),
    }


def _stages(layout: Layout, plan: PipelinePlan | None, names: list[str]) -> list[dict[str, Any]]:
    """What each rank of the pipeline axis holds, and which ranks of the job those are."""
    found = []
    for number in range(layout.pipeline):
        stages = plan.stages_of(number) if plan else [0]
        layers = {stage: list(plan.layers[stage]) if plan else names for stage in sorted(stages)}
        found.append(
            {
                'pipeline_rank': number,
                'layers': layers,
                'embedding': 0 in stages,
                'head': (plan.num_stages - 1 if plan else 0) in stages,
                'first_rank': layout.rank(pipeline=number),
                'num_ranks': layout.world_size // layout.pipeline,
            }
        )
    return found


def _memory(rank: dict[str, Any], sizes: ModelSizes | None, run: RunSizes) -> dict[str, Any] | None:
    """The planner's numbers for a rank, if it knows the model."""
    built = {shape['name']: numel(shape['local']) for shape in rank['shapes']}
    if sizes is None or unknown_parameters(built, sizes, run, rank['coordinate']):
        return None
    prediction = predict_memory(sizes, run, rank['coordinate']['pipeline'])
    return {
        'kinds': prediction.kinds,
        'moments': prediction.moments,
        'peak_moment': prediction.peak_moment,
        'peak': prediction.peak,
        'host': prediction.host,
    }


# ----------------------------------------------------------------------------------- the checks


def _check_nodes(world_size: int, gpus_per_node: int) -> int:
    if world_size < 1:
        raise ValueError(f'--rehearse {world_size}: a job has at least 1 GPU')
    if gpus_per_node < 1:
        raise ValueError(f'--gpus-per-node {gpus_per_node}: must be at least 1')
    local_size = min(gpus_per_node, world_size)
    if world_size % local_size:
        below = world_size // local_size * local_size
        raise ValueError(
            f'--rehearse {world_size}: GPUs do not fill machines of {gpus_per_node}; nearest: '
            f'{below} or {below + local_size}, or another --gpus-per-node'
        )
    return local_size


def _techniques(strategy: Mapping[str, Any]) -> Techniques:
    param, reduce = check_options(strategy.get('precision'), strategy.get('reshard', 'step'))
    return Techniques(
        param_dtype=param,
        reduce_dtype=reduce,
        reshard=strategy.get('reshard', 'step'),
        float8=check_float8(strategy.get('float8'), param),
        **{key: strategy[key] for key in TECHNIQUES if key in strategy},
    )


def _float8_text(options: Float8 | None) -> str | None:
    if options is None:
        return None
    return f'{options.recipe}, gathered in 8 bits' if options.gathers else options.recipe


def _step(
    config: Config, model: nn.Module, layout: Layout
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows and micro-batches of a step, and what is known of the data."""
    dataset, data = _data(config)
    cfg = config.train_cfg
    seq_len = getattr(dataset, 'seq_len', None)
    if seq_len is None:
        raise ValueError('train_dataloader.dataset.seq_len is not set; a rehearsal needs it')
    check_run(model, {'train_dataloader': SimpleNamespace(dataset=dataset)})
    full, rows = cfg.global_batch_size, cfg.micro_batch_size
    rampup = cfg.get('rampup')
    sizes = BatchSizeRampup(**rampup).stages(full) if rampup else [full]
    for size in sizes:
        key = 'train_cfg.global_batch_size' if size == full else 'train_cfg.rampup: a step of'
        check_division(size, rows, layout.data, key)
    return {
        'seq_len': seq_len,
        'rows': full,
        'tokens': full * seq_len,
        'micro_batch_size': rows,
        'micro_batches': min(sizes) // (rows * layout.data),
        'micro_batches_at_most': full // (rows * layout.data),
        'data_ranks': layout.data,
    }, data


def _data(config: Config) -> tuple[Any, dict[str, Any]]:
    """The training data if it is here, or what the config says of it."""
    cfg = give_tokenizer(config.train_dataloader.dataset, config.get('tokenizer'))
    data: dict[str, Any] = {'checked': 'built', 'documents': 'packed'}
    try:
        dataset = DATASETS.build(dict(cfg))
    except FileNotFoundError as error:
        dataset = SimpleNamespace(seq_len=cfg.get('seq_len'))
        data['checked'] = f'not checked: {str(error).splitlines()[0].split(";")[0]}'
    if getattr(dataset, 'max_docs', 2) == 1:
        data['documents'] = 'one a row'
    # Data that is not here, or does not say, is reckoned with as packed, but not refused as such.
    data['max_docs'] = getattr(dataset, 'max_docs', 1)
    return dataset, data


def _start(config: Config, model: nn.Module) -> str | None:
    """What the job would begin from, compared with the model if it is here; None for nothing."""
    try:
        start = choose_start(
            config.get('resume', False), config.get('load_from'), Path(config.work_dir), True, LOG
        )
    except FileNotFoundError as error:
        return f'not checked: {str(error).splitlines()[0].split(";")[0]}'
    if start is None:
        return None
    check_reference(start, model)
    for one in start.chain():
        check_start(one, model, config, LOG)
    return f'{", ".join(start.content)} of {start.path}'


def _check_optimizer(config: Config, model: nn.Module, techniques: Techniques) -> Any:
    """Build the wrapper on the whole model, as far as needs no memory. Returns the optimizer."""
    wrapper_cfg = dict(config.optim_wrapper)
    constructor = wrapper_cfg.pop('constructor', 'DecayGroupsConstructor')
    build = {'type': constructor, 'optim_wrapper_cfg': wrapper_cfg}
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(build)(model)
    check_loss_scale(techniques.param_dtype, wrapper)
    check_dist_cfg((config.get('env_cfg') or {}).get('dist_cfg') or {})
    return wrapper.optimizer
