"""A user's config made small enough to be trained on every layout within seconds."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch.optim import AdamW

from internlm_mm.engine.preflight import give_tokenizer
from internlm_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from internlm_mm.utils.config import to_plain
from internlm_mm.utils.resolve import resolve_type
from internlm_mm.verify.layouts import Case, deepest

STEPS = 3
"""Steps of every run; the last is what a resumed run repeats."""

WARMUP = 8
"""Steps of warm-up: the rate differs from step to step, so that a resume must restore it."""

LR = 2e-2

WRAPPER_KEYS = ('type', 'constructor', 'optimizer', 'clip_grad')


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What is trained in place of the user's config.

    Attributes:
        config: Top-level keys of the small config, plain values only, without clip, eps and layout.
        notes: What was changed beyond sizes, a line each.
        betas: AdamW's.
        weight_decay: Of tensors of two or more dimensions.
        max_norm: The config's own clip, or None.
        rows: Rows of a step over all ranks.
    """

    config: dict[str, Any]
    notes: list[str]
    betas: tuple[float, float]
    weight_decay: float
    max_norm: float | None
    rows: int

    @property
    def model(self) -> dict[str, Any]:
        """Config of the small model."""
        return self.config['model']

    @property
    def dataset(self) -> dict[str, Any]:
        """Config of the rows."""
        return self.config['train_dataloader']['dataset']

    @property
    def seed(self) -> int:
        """Of weights and data."""
        return self.config['randomness']['seed']


_KERNEL_WIDTH = 32  # of heads, the least that every attention kernel takes


def shrink(config: Config, cases: Sequence[Case], device: str, random_data: bool) -> Shrunk:
    """Shrink widths, depth and sequence, and the number of rows; keep everything else.

    Args:
        config: The user's, checked.
        cases: Layouts that it will run on.
        device: 'cpu' or 'cuda'.
        random_data: Take random tokens in packed documents, not the config's data.

    Raises:
        ValueError: If the config trains in a way that the reference does not know.
    """
    plain = to_plain(deepcopy(dict(config._cfg_dict)))
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not plain.get(key):
            raise ValueError(f'{key} is missing: the config does not train')
    notes: list[str] = []
    optimizer = _adamw(plain['optim_wrapper'])
    seq_len = _seq_len(plain, cases)
    plain['model'] = shrink_model(plain['model'], cases, seq_len, device)
    plain['train_dataloader'] = _loader(plain, seq_len, random_data)
    rows = rows_of_a_step(cases)
    kept = {
        key: plain[key]
        for key in ('runner_type', 'default_scope', 'custom_imports', 'model', 'train_dataloader')
        if key in plain
    }
    wrapper = {key: plain['optim_wrapper'].get(key) for key in WRAPPER_KEYS}
    wrapper['optimizer'] = dict(wrapper['optimizer'], lr=LR)
    if 'loss_scale' in plain['optim_wrapper']:
        wrapper['loss_scale'] = plain['optim_wrapper']['loss_scale']
    kept |= {
        'train_cfg': {
            'type': plain['train_cfg']['type'],
            'max_iters': STEPS,
            'global_batch_size': rows,
            'micro_batch_size': 1,
        },
        'optim_wrapper': {key: value for key, value in wrapper.items() if value is not None},
        'param_scheduler': [{'type': 'WarmupCosine', 'warmup': WARMUP}],
        'default_hooks': {'param_scheduler': {'type': 'ParamSchedulerHook'}},
        'strategy': _strategy(plain.get('strategy') or {}, device, notes),
        'randomness': {
            'seed': _or(plain.get('randomness', {}).get('seed'), 0),
            'deterministic': bool(plain.get('randomness', {}).get('deterministic')),
        },
        'env_cfg': {'dist_cfg': {'timeout': 120}},  # seconds
        'visualizer': {
            'type': 'ScalarVisualizer',
            'vis_backends': [],
        },
        'log_level': 'WARNING',
    }
    if plain.get('custom_hooks'):
        notes.append('custom_hooks are left out')
    return Shrunk(
        config=kept,
        notes=notes,
        betas=tuple(optimizer.get('betas', (0.9, 0.999))),
        weight_decay=float(optimizer.get('weight_decay', 1e-2)),
        max_norm=(plain['optim_wrapper'].get('clip_grad') or {}).get('max_norm'),
        rows=rows,
    )


def micro_batches(case: Case) -> int:
    """Micro-batches of a step on each rank: two at least, and enough to fill a pipeline twice."""
    return max(2, 2 * case.degree('pipeline'))


def rows_of_a_step(cases: Sequence[Case]) -> int:
    """Rows that every layout cuts into its micro-batches, of two rows at least."""
    return 2 * math.lcm(*(case.data * micro_batches(case) for case in cases))


def shrink_model(
    model: dict[str, Any], cases: Sequence[Case], seq_len: int, device: str = 'cpu'
) -> dict[str, Any]:
    """The model's config with small widths and a depth of two layers a stage.

    Heads and inner widths divide by the same tensor degrees as the user's do, and as many heads
    share keys, up to two. On GPUs heads stay as wide as the kernels ask that the user's have.
    """
    small = dict(model)
    degrees = math.lcm(*(case.degree('tensor') for case in cases), 2)
    if 'num_layers' in small:
        small['num_layers'] = max(2, 2 * deepest(cases))
    heads = small.get('num_heads')
    if heads is not None:
        kv_heads = small.get('num_kv_heads') or heads
        sharing = min(heads // kv_heads, 2)
        small_kv = alike(kv_heads, degrees, 2 if sharing == 1 else 1)
        small['num_heads'] = small_kv * sharing
        if small.get('num_kv_heads'):
            small['num_kv_heads'] = small_kv
        width = 8 if small['num_heads'] >= 4 else 16
        own = small.get('head_dim') or small.get('hidden_size', 0) // heads
        if device == 'cuda' and own and own % _KERNEL_WIDTH == 0:
            width = _KERNEL_WIDTH
        if small.get('head_dim'):
            small['head_dim'] = width
        if 'hidden_size' in small:
            small['hidden_size'] = small['num_heads'] * width
    elif 'hidden_size' in small:
        small['hidden_size'] = alike(small['hidden_size'], degrees, 32)
    if 'intermediate_size' in small:
        ratio = model['intermediate_size'] / model.get('hidden_size', model['intermediate_size'])
        wanted = round(ratio * small.get('hidden_size', 32))
        small['intermediate_size'] = alike(model['intermediate_size'], degrees, wanted)
    if small.get('rope_scaling'):
        longest = small.get('max_seq_len') or seq_len
        small['rope_scaling'] = _shrink_scaling(small['rope_scaling'], longest, seq_len)
    if 'max_seq_len' in small:
        small['max_seq_len'] = seq_len
    return small


def _shrink_scaling(scaling: dict[str, Any], longest: int, seq_len: int) -> dict[str, Any]:
    """A `rope_scaling` whose length of training is the same share of the longest row."""
    key = 'original_max_position_embeddings'
    if key not in scaling:
        return scaling
    return scaling | {key: max(1, round(scaling[key] * seq_len / longest))}


def alike(size: int, degrees: int, at_least: int) -> int:
    """The smallest number from `at_least` on that shares with `degrees` what `size` shares."""
    if size <= at_least:
        return size
    found = at_least
    while math.gcd(found, degrees) != math.gcd(size, degrees):
        found += 1
    return found


def _seq_len(plain: dict[str, Any], cases: Sequence[Case]) -> int:
    own = plain['train_dataloader'].get('dataset', {}).get('seq_len')
    own = own or plain['model'].get('max_seq_len')
    if not own:
        raise ValueError('train_dataloader.dataset.seq_len is missing: how long are rows?')
    # 2 x context pieces, each of which tensor parallelism cuts again.
    unit = math.lcm(*(2 * case.degree('context') * case.degree('tensor') for case in cases), 1)
    return min(int(own), max(32, unit))


def _loader(plain: dict[str, Any], seq_len: int, random_data: bool) -> dict[str, Any]:
    loader = dict(plain['train_dataloader'])
    dataset = loader['dataset']
    if random_data:
        dataset = {
            'type': 'internlm_mm.datasets.RandomTokens',
            'vocab_size': plain['model']['vocab_size'],
            'seq_len': seq_len,
            # A few documents a row, of lengths that no degree divides.
            'document_lengths': [seq_len // 6 or 1, seq_len // 3 or 1, seq_len // 2 + 1],
        }
    else:
        dataset = give_tokenizer(dataset, plain.get('tokenizer'))
    uneven = {'type': 'internlm_mm.verify.UnevenRows', 'dataset': dataset, 'seq_len': seq_len}
    for key in ('micro_batch_size', 'global_batch_size', 'rampup', 'num_workers'):
        loader.pop(key, None)
    return loader | {'dataset': uneven}


def _strategy(strategy: dict[str, Any], device: str, notes: list[str]) -> dict[str, Any]:
    """The user's strategy without what cannot run here."""
    kept = {key: value for key, value in strategy.items() if key not in ('parallel', 'pipeline')}
    kept.setdefault('type', 'HybridParallelStrategy')
    if device == 'cpu':
        if kept.pop('compile', False):
            notes.append('strategy.compile=True is left out on the CPU')
        if kept.get('attention', 'auto') in ('cudnn', 'varlen'):
            notes.append(f"strategy.attention={kept['attention']!r} is 'auto' on the CPU")
            kept['attention'] = 'auto'
    return kept


def _adamw(wrapper: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's config.

    Raises:
        ValueError: If it is none that the reference's hand-written update knows.
    """
    optimizer = wrapper.get('optimizer') or {}
    named = resolve_type(optimizer.get('type'), OPTIMIZERS, 'optim_wrapper.optimizer.type')
    if named is not AdamW or optimizer.get('amsgrad') or optimizer.get('maximize'):
        raise ValueError(
            f'optim_wrapper.optimizer={optimizer}: the reference knows plain torch.optim.AdamW; '
            'verify with it, --cfg-options optim_wrapper.optimizer.type=AdamW'
        )
    constructor = resolve_type(
        wrapper.get('constructor', 'DefaultOptimWrapperConstructor'),
        OPTIM_WRAPPER_CONSTRUCTORS,
        'optim_wrapper.constructor',
    )
    if constructor.__name__ != 'DecayGroupsConstructor':
        raise ValueError(
            f'optim_wrapper.constructor={constructor.__name__}: the reference decays tensors of '
            'two or more dimensions, as DecayGroupsConstructor does; verify with that'
        )
    return optimizer


def default_precision(strategy: dict[str, Any]) -> str:
    """What the config's layers compute in."""
    return (strategy.get('precision') or {}).get('param', 'float32')


def with_precision(strategy: dict[str, Any], name: str) -> dict[str, Any]:
    """A strategy that computes in another dtype; sums of gradients stay as wide as the config's.

    In float64 everything is.
    """
    precision = dict(strategy.get('precision') or {})
    reduce = precision.get('reduce', 'float32')
    if name == 'float64':
        reduce = 'float64'
    elif name == 'float32':
        reduce = 'float32'
    changed = dict(strategy, precision={'param': name, 'reduce': reduce})
    half = getattr(torch, name).itemsize == 2
    if not half and changed.get('attention', 'auto') in ('cudnn', 'varlen'):
        changed['attention'] = 'auto'
    return changed


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
