"""Whether an objective, its data and the rest of a run fit together, before any time is spent."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from internlm_mm.checkpoint.step_folders import read_model_state
from internlm_mm.engine.hooks.reference_hook import ReferenceHook
from internlm_mm.engine.load_from import Start
from internlm_mm.parallel.mesh import Layout
from internlm_mm.utils.adapters import is_adapter


def check_alignment(
    model: nn.Module,
    loaders: Mapping[str, Any],
    layout: Layout,
    hooks: Iterable[Any],
    val_loop: Any = None,
) -> None:
    """Compare an objective over pairs, or any other, with data, adapters, layout, hooks and loop.

    Args:
        model: Whole; may be on the meta device.
        loaders: Built loaders by config key.
        layout: Of the job.
        hooks: Of the run.
        val_loop: What evaluates, built or its class; None where nothing does.

    Raises:
        ValueError: Naming the keys that do not go together, and what would.
    """
    objective = getattr(model, 'objective', None)
    name = type(objective).__name__
    takes_pairs = getattr(objective, 'takes_pairs', False)
    for key, loader in loaders.items():
        has_pairs = getattr(loader.dataset, 'is_paired', False)
        if takes_pairs and not has_pairs:
            raise ValueError(
                f'model.objective: {name} compares two answers, and {key} has '
                f'{type(loader.dataset).__name__}: use dataset=dict(type=PreferenceDataset, ...)'
            )
        if has_pairs and not takes_pairs:
            raise ValueError(
                f'model.objective: {name} cannot compare the two answers that {key} has: use '
                'objective=dict(type=DPO, ...) or another one of pairs'
            )
    if not takes_pairs:
        return
    if 'val_dataloader' in loaders and not getattr(val_loop, 'takes_pairs', True):
        loop = val_loop if isinstance(val_loop, type) else type(val_loop)
        raise ValueError(
            f'val_cfg.type: {loop.__name__} tells the perplexity of texts, and the loss of {name} '
            'is of pairs: use val_cfg=dict(type=PreferenceLoop)'
        )
    check_pairs(model, layout)
    reference = getattr(objective, 'reference', None)
    if reference == 'precomputed' and not any(isinstance(hook, ReferenceHook) for hook in hooks):
        raise ValueError(
            "model.objective.reference='precomputed' needs a hook: "
            'default_hooks.update(references=dict(type=ReferenceHook))'
        )


def check_pairs(model: nn.Module, layout: Layout) -> None:
    """Compare an objective over pairs with adapters and layout; any other goes with all.

    Args:
        model: Whole; may be on the meta device.
        layout: Of the job.

    Raises:
        ValueError: Naming the key that does not go with the objective.
    """
    objective = getattr(model, 'objective', None)
    name = type(objective).__name__
    if not getattr(objective, 'takes_pairs', False):
        return
    if layout.context > 1:
        raise ValueError(
            f'strategy.parallel.context={layout.context}: {name} needs whole answers on a rank'
        )
    if layout.pipeline > 1:
        raise ValueError(
            f'strategy.parallel.pipeline={layout.pipeline}: {name} does not work in stages; '
            'data_shard and tensor do'
        )
    has_adapters = any('.lora_A.' in name for name, _ in model.named_parameters())
    reference = getattr(objective, 'reference', None)
    if reference == 'adapters_off' and not has_adapters:
        raise ValueError(
            "model.objective.reference='adapters_off', and the model has no adapters: set "
            "model.adapter=dict(type=LoRA, ...), or reference='precomputed' with ReferenceHook"
        )


def check_reference(start: Start | None, model: nn.Module) -> None:
    """Refuse to take a model without its adapters for what training begins with, where it is not.

    Args:
        start: What a run that trains begins with; one that is resumed goes on as it began.
        model: Whole; may be on the meta device.

    Raises:
        ValueError: Naming the adapters that are trained already, and two ways out.
    """
    objective = getattr(model, 'objective', None)
    if start is None or start.random or 'model' not in start.content:
        return
    if getattr(objective, 'reference', None) != 'adapters_off':
        return
    if start.adapter is not None:
        folder, merge = start.adapter, "peft's merge_and_unload, and load_from what it saves"
    elif start.foreign is None and any(map(is_adapter, read_model_state(start.path))):
        folder, merge = start.path, f'`tools/convert2hf.py {start.path} OUT`, and load_from=OUT'
    else:
        return
    raise ValueError(
        "model.objective.reference='adapters_off' takes the model without its adapters for the one "
        f'that training begins with, and load_from begins with the trained adapters of {folder}: '
        f"merge them first ({merge}), or set reference='precomputed' with "
        'default_hooks.update(references=dict(type=ReferenceHook)), which asks the model with them'
    )
