"""Whether an objective, its data and the rest of a run fit together, before any time is spent."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from internlm_mm.engine.hooks.reference_hook import ReferenceHook
from internlm_mm.parallel.mesh import Layout


def check_alignment(
    model: nn.Module, loaders: Mapping[str, Any], layout: Layout, hooks: Iterable[Any]
) -> None:
    """Compare an objective over pairs, or any other, with data, adapters, layout and hooks.

    Args:
        model: Whole; may be on the meta device.
        loaders: Built loaders by config key.
        layout: Of the job.
        hooks: Of the run.

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
    reference = getattr(objective, 'reference', None)
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
    if reference == 'adapters_off' and not has_adapters:
        raise ValueError(
            "model.objective.reference='adapters_off', and the model has no adapters: set "
            "model.adapter=dict(type=LoRA, ...), or reference='precomputed' with ReferenceHook"
        )
    if reference == 'precomputed' and not any(isinstance(hook, ReferenceHook) for hook in hooks):
        raise ValueError(
            "model.objective.reference='precomputed' needs a hook: "
            'default_hooks.update(references=dict(type=ReferenceHook))'
        )
