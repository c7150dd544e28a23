"""From a budget of memory to how much is recomputed, before a model is placed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from internlm_mm.engine.rehearse_memory import model_sizes, run_sizes, unknown_parameters
from internlm_mm.parallel.attention import apply_attention, check_shared_attention, head_dim_of
from internlm_mm.parallel.mesh import Layout
from internlm_mm.parallel.pipeline_plan import layer_names, plan_pipeline
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.recompute import check_recompute
from internlm_mm.planner import ModelSizes, RunSizes
from internlm_mm.planner.recompute import fit_recompute
from internlm_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


def settle_recompute(runner: Any, training: bool) -> None:
    """Replace a budget in the strategy's options by the share that follows from it.

    All ranks reckon the same and need not talk.

    Args:
        runner: Its model is whole, its training loader built, its optimizer still a config.
        training: Whether anything will be kept for a backward.

    Raises:
        ValueError: If not even recomputing everything fits, or the model is not known.
    """
    strategy = runner.strategy
    techniques = getattr(strategy, 'techniques', None)
    if techniques is None or check_recompute(techniques.recompute) is not None:
        return
    share = 0.0
    if training:
        loader = runner.train_dataloader
        step = {
            'seq_len': loader.dataset.seq_len,
            'micro_batch_size': loader.micro_batch_size,
            'micro_batches_at_most': max(loader.micro_batch_counts),
        }
        packed = getattr(loader.dataset, 'max_docs', 2) != 1
        optimizer = unplaced_optimizer(runner.optim_wrapper, runner.model)
        run = _run_sizes(strategy, runner.model, step, optimizer, packed)
        share, why = decide(runner.model, run, techniques)
        runner.logger.info(f'recompute {why}')
    strategy.techniques = replace(techniques, recompute=share)


def decide(model: nn.Module, run: RunSizes, techniques: Techniques) -> tuple[float, str]:
    """The share of layers that a budget means, and why.

    Args:
        model: Whole.
        run: What the planner is told, without a say on recomputation.
        techniques: Hold the budget.

    Raises:
        ValueError: If not even recomputing everything fits, or the model is not known.
    """
    budget = techniques.recompute
    assert isinstance(budget, Mapping)
    sizes = model_sizes(model)
    if sizes is None or _is_unknown(model, sizes, run):
        frozen = not all(parameter.requires_grad for parameter in model.parameters())
        why = 'has frozen weights, which' if frozen else 'is no decoder of the sizes that'
        raise ValueError(
            f'strategy.recompute={dict(budget)}: {type(model).__name__} {why} the planner '
            f'{"does not reckon with but under adapters" if frozen else "knows"}; give the share '
            'of layers to recompute, 0 to 1'
        )
    return fit_recompute(sizes, run, budget['budget_gib'])


def _is_unknown(model: nn.Module, sizes: ModelSizes, run: RunSizes) -> bool:
    built = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = tuple(range(sizes.num_layers))
    whole = replace(
        run, stages=(layers,), stages_of_rank=((0,),), tensor=1, data_shard=1, context=1
    )
    here = {'pipeline': 0, 'data_shard': 0, 'context': 0}
    return bool(unknown_parameters(built, sizes, whole, here))


def unplaced_optimizer(wrapper: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, on the model as it is; one that was built elsewhere is taken as it is.

    Args:
        wrapper: The optimizer wrapper, or its config.
        model: Whole.
    """
    if not isinstance(wrapper, Mapping):
        return wrapper.optimizer
    config = dict(wrapper)
    constructor = config.pop('constructor', 'DecayGroupsConstructor')
    build = {'type': constructor, 'optim_wrapper_cfg': config}
    return OPTIM_WRAPPER_CONSTRUCTORS.build(build)(model).optimizer


def _run_sizes(
    strategy: Any,
    model: nn.Module,
    step: Mapping[str, int],
    optimizer: torch.optim.Optimizer,
    packed: bool,
) -> RunSizes:
    layout: Layout = strategy.layout
    techniques: Techniques = replace(strategy.techniques, recompute=0.0)
    plan = None
    if layout.pipeline > 1:
        plan = plan_pipeline(
            layer_names(model), layout.pipeline, techniques.pipeline, techniques.compile
        )
    name, device, dtype = techniques.attention, strategy.device, techniques.param_dtype
    has_mask = has_kernel = False
    if layout.context > 1:
        exchange = techniques.context_attention
        backend = check_shared_attention(
            name, device, dtype, layout.context, exchange, head_dim_of(model)
        )
        has_kernel = backend == 'varlen'
    else:
        apply_attention(model, name, device, dtype)
        has_mask = attends_by_mask(model)
    return run_sizes(
        layout,
        techniques,
        plan,
        step,
        model=model,
        optimizer=optimizer,
        packed=packed,
        has_mask=has_mask,
        has_kernel=has_kernel,
    )


def attends_by_mask(model: nn.Module) -> bool:
    """Whether attention on packed rows is told by a mask, and not by where documents end."""
    kernels = [module.attend for module in model.modules() if hasattr(module, 'attend')]
    return any(getattr(attend, 'needs_mask', True) for attend in kernels)
