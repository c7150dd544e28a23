"""The least recomputation with which a run fits a budget of memory."""

from dataclasses import replace

from internlm_mm.planner.memory import MemoryPrediction, predict_memory
from internlm_mm.planner.sizes import ModelSizes, RunSizes

GIB = 2**30


def fit_recompute(sizes: ModelSizes, run: RunSizes, budget_gib: float) -> tuple[float, str]:
    """Choose the share of layers that are recomputed.

    Args:
        sizes: Of the model.
        run: Of the run; its `recompute` does not matter.
        budget_gib: What the fullest rank may hold in tensors.

    Returns:
        The smallest share that fits on every rank of the pipeline, and why, in words.

    Raises:
        ValueError: If not even recomputing all layers fits; says what fills the memory.
    """
    longest = max(map(len, run.stages))
    without = 0.0
    for layers in range(longest + 1):
        share = layers / longest
        rank, found = _fullest(sizes, replace(run, recompute=share, selective=False))
        if not layers:
            without = found.peak / GIB
        if found.peak <= budget_gib * GIB:
            break
    else:
        raise ValueError(_refusal(budget_gib, rank, found, len(run.stages_of_rank) > 1))
    held = f'{found.peak / GIB:.2f} GiB of {budget_gib:g} GiB ({found.peak_moment})'
    if not layers:
        return 0.0, f'0: nothing is recomputed; {held}'
    of = 'of each stage' if len(run.stages) > 1 else 'layers'
    return share, (
        f'{share:.4g}: {layers} of {longest} {of} recompute; {held}, none would be '
        f'{without:.2f} GiB'
    )


def _fullest(sizes: ModelSizes, run: RunSizes) -> tuple[int, MemoryPrediction]:
    """The rank of the pipeline axis that holds most, and what."""
    ranks = range(len(run.stages_of_rank))
    predictions = {rank: predict_memory(sizes, run, rank) for rank in ranks}
    return max(predictions.items(), key=lambda item: item[1].peak)


def _refusal(budget_gib: float, rank: int, found: MemoryPrediction, is_pipeline: bool) -> str:
    where = f' on rank {rank} of the pipeline' if is_pipeline else ''
    kinds = found.moments[found.peak_moment]
    largest = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
    parts = ', '.join(f'{kind.replace("_", " ")} {kinds[kind] / GIB:.2f}' for kind in largest)
    return (
        f'strategy.recompute.budget_gib={budget_gib:g} is too little: with every layer recomputed '
        f'tensors still take {found.peak / GIB:.2f} GiB{where} ({found.peak_moment}: {parts}). '
        "Less take strategy.reshard='layer', offload=True, a wider parallel.data_shard, or a "
        'smaller train_cfg.micro_batch_size'
    )
