"""`model` and `model_type` of an InternLM config in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from internlm_mm.registry import MODELS
from internlm_mm.utils.config import load_config, to_plain
from internlm_mm.utils.config_draft import Draft, literal
from internlm_mm.utils.config_reader import shipped_configs
from internlm_mm.utils.internlm_config_keys import FAMILIES
from internlm_mm.utils.resolve import resolve_type
from internlm_mm.utils.signatures import options_of
from internlm_mm.utils.suggest import did_you_mean


def add_model(draft: Draft, seq_len: int) -> None:
    """The model: a base of ours where one has these sizes, else all of them."""
    path, kind = draft.source.path, draft.look('model_type', 'INTERNLM')
    if kind not in FAMILIES:
        hint = did_you_mean(kind, FAMILIES)
        moe = 'mixtures of experts are not supported.' if 'MOE' in str(kind).upper() else hint
        raise ValueError(f'{path}: model_type={kind!r} has no family here.{" " * bool(moe)}{moe}')
    family, take = FAMILIES[kind], partial(draft.take)
    hidden, heads = take('model.hidden_size', int), take('model.num_attention_heads', int)
    multiple = take('model.multiple_of', int, 256)
    width = intermediate_size(hidden, take('model.mlp_ratio', float), multiple)
    longest = max(seq_len, take('model.max_position_embeddings', int, seq_len))
    args: dict[str, tuple[Any, tuple[str, ...]]] = {
        'vocab_size': (take('model.vocab_size', int), ('model.vocab_size',)),
        'hidden_size': (hidden, ('model.hidden_size',)),
        'intermediate_size': (width, ('model.mlp_ratio', 'model.multiple_of')),
        'num_layers': (take('model.num_layers', int), ('model.num_layers',)),
        'num_heads': (heads, ('model.num_attention_heads',)),
        'rope_theta': (float(take('model.rope_base', float, 10_000.0)), ('model.rope_base',)),
        'norm_eps': (
            take('model.layer_norm_epsilon', float, 1e-5),
            ('model.layer_norm_epsilon',),
        ),
    }
    key = 'model.num_kv_attention_heads'
    kv_heads = take(key, int, heads)
    if family != 'InternLM':
        args['num_kv_heads'] = (kv_heads, (key,))
    elif kv_heads != heads:
        raise ValueError(f'{path}: {key}={kv_heads}: INTERNLM has as many as {heads} heads')
    no_bias = take('model.no_bias', bool, family != 'InternLM')
    if no_bias != (family != 'InternLM'):
        raise ValueError(f'{path}: model.no_bias={no_bias} is not {kind}, as released')
    draft.say('model.no_bias', 'as here')
    base = _fitting_base(family, {name: value for name, (value, _) in args.items()})
    draft.say('model_type', f'model.type={family}', 'mapped')
    if base is None:
        draft.put('model =', 'type', draft.use('internlm_mm.models', family), 'model_type')
        for name, (value, keys) in args.items():
            draft.put('model =', name, value, *keys)
    else:
        draft.bases.append(f'_base_.models.{base}')
        for name, (value, keys) in args.items():
            for source in keys:
                draft.say(source, f'model.{name}={literal(value)}, of {base}.py', 'mapped')
    block = 'model =' if base is None else 'model'
    draft.put(block, 'max_seq_len', longest, 'model.max_position_embeddings')
    _stretched(draft, seq_len, longest, block)
    smoothing = draft.take('loss.label_smoothing', float, 0.0)
    if smoothing:
        name = draft.use('internlm_mm.models', 'NextToken')
        objective = {'type': name, 'label_smoothing': smoothing}
        draft.put(block, 'objective', objective, 'loss.label_smoothing')
    else:
        draft.say('loss.label_smoothing', 'as here: none')


def intermediate_size(hidden_size: int, mlp_ratio: float, multiple_of: int) -> int:
    """Inner width of the feed-forward layers, as InternLM rounds it up."""
    if multiple_of < 1:
        raise ValueError(f'model.multiple_of={multiple_of} must be at least 1')
    return -(-int(hidden_size * mlp_ratio) // multiple_of) * multiple_of


def _fitting_base(family: str, sizes: Mapping[str, Any]) -> str | None:
    """Name of the shipped base with these sizes, where defaults of the class count."""
    known = options_of(resolve_type(family, MODELS, 'model.type'))
    defaults = known.defaults if known else {}
    for file in sorted((shipped_configs() / '_base_' / 'models').glob('*.py')):
        model = to_plain(load_config(file)._cfg_dict).get('model', {})
        if model.get('type', '').rpartition('.')[2] != family:
            continue
        given = {'num_kv_heads': model.get('num_heads'), **_set(defaults), **_set(model)}
        rest = set(model) - set(sizes) - {'type', 'max_seq_len'}
        if not rest and all(given.get(key) == value for key, value in sizes.items()):
            return file.stem
    return None


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _stretched(draft: Draft, seq_len: int, longest: int, block: str) -> None:
    key = 'model.use_dynamic_ntk_rope'
    if not draft.take(key, bool, False):
        draft.say(key, 'as here: none')
        return
    scaling = {'rope_type': 'dynamic', 'factor': 1.0}
    original = draft.take('model.max_position_embeddings', int, 2048)
    if seq_len > original:
        scaling['original_max_position_embeddings'] = original
    draft.put(block, 'rope_scaling', scaling, key, note=f'from {longest:,} tokens on')
