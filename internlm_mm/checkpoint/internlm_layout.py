"""InternLM's own checkpoints: what a shard calls our weights, packs together and cuts.

A shard `model_tp{t}_pp{p}.pt` holds tensor-parallel part t of the layers of pipeline stage p. The
names are of three kinds of model; the first generation's feed-forward weights `w2` and `w3` changed
places when InternLM became InternEvo. docs/en/import.md has the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm_mm.utils.suggest import did_you_mean
from internlm_mm.utils.weight_layout import Packing, Rule, WeightLayout

W2_IS_UP = {'internlm-2023': True, 'internevo': False}
"""What `w2` of a first-generation model is, by the format's name: up projection, or down."""

FORMATS = tuple(W2_IS_UP)

_Q, _K, _V = (f'self_attn.{name}_proj' for name in 'qkv')


@dataclass(frozen=True)
class Kind:
    """One kind of model in InternLM's checkpoints.

    Attributes:
        model_type: InternLM's name of it.
        family: Ours.
        layers: What the list of layers is called.
        embedding: The embedding's name.
        head: The head's name.
        layer: The file's modules of one layer, but for `w2` and `w3`, and ours in each.
        packed: How the module that holds q, k and v packs them: 'thirds', 'groups', or '' if they
            lie apart.
        biased: Modules of a layer that have a bias.
    """

    model_type: str
    family: str
    layers: str
    embedding: str
    head: str
    layer: dict[str, tuple[str, ...]]
    packed: str = ''
    biased: tuple[str, ...] = ()

    @property
    def mlp(self) -> str:
        """The file's name of the feed-forward layer."""
        return next(name for name in self.layer if name.endswith('w1')).removesuffix('.w1')


_SECOND = {
    'attention.wo': ('self_attn.o_proj',),
    'attention_norm': ('input_layernorm',),
    'feed_forward.w1': ('mlp.gate_proj',),
    'ffn_norm': ('post_attention_layernorm',),
}
INTERNLM = Kind(
    'INTERNLM',
    'InternLM',
    'blocks',
    'embedding',
    'head',
    {
        'mixer.Wqkv': (_Q, _K, _V),
        'mixer.out_proj': ('self_attn.o_proj',),
        'norm1': ('input_layernorm',),
        'mlp.w1': ('mlp.gate_proj',),
        'norm2': ('post_attention_layernorm',),
    },
    packed='thirds',
    biased=('mixer.Wqkv', 'mixer.out_proj'),
)
INTERNLM2 = Kind(
    'INTERNLM2_PUBLIC',
    'InternLM2',
    'layers',
    'tok_embeddings',
    'output',
    {'attention.wqkv': (_Q, _K, _V), **_SECOND},
    packed='groups',
)
LLAMA = Kind(
    'LLAMA2',
    'Llama',
    'layers',
    'tok_embeddings',
    'output',
    {'attention.wq': (_Q,), 'attention.wk': (_K,), 'attention.wv': (_V,), **_SECOND},
)
KINDS = (INTERNLM, INTERNLM2, LLAMA)


@dataclass(frozen=True)
class Meaning:
    """What names alone do not tell.

    Attributes:
        head_dim: Width of one head.
        q_per_kv: Query heads that share a key/value head.
        w2_is_up: Whether `w2` is the up projection and `w3` the down projection.
        interleaved: Whether a head's rotary pairs lie side by side (InternEvo's `adapt_hf=False`),
            not half a head apart.
        norm_head: Whether the head's rows are divided by their lengths when it runs.
    """

    head_dim: int
    q_per_kv: int = 1
    w2_is_up: bool = False
    interleaved: bool = False
    norm_head: bool = False


def check_format(name: str, choices: Sequence[str] = ('auto', *FORMATS)) -> None:
    """Raise ValueError, with the nearest one, if `name` is no format."""
    if name not in choices:
        raise ValueError(f'format={name!r} is unknown.{did_you_mean(name, choices)}')


def layout_of(kind: Kind, meaning: Meaning) -> WeightLayout:
    """Names and packings of one shard; layers are numbered through the whole model."""
    up, down = ('w2', 'w3') if meaning.w2_is_up else ('w3', 'w2')
    modules = {
        **kind.layer,
        f'{kind.mlp}.{up}': ('mlp.up_proj',),
        f'{kind.mlp}.{down}': ('mlp.down_proj',),
    }
    rules = [Rule(('embed_tokens.',), f'{kind.embedding}.')]
    for theirs, ours in modules.items():
        names = tuple(f'layers.{{}}.{name}.' for name in ours)
        rules.append(Rule(names, f'{kind.layers}.{{}}.{theirs}.', _packing(kind, meaning, ours)))
    rules.append(Rule(('norm.',), 'norm.'))
    head = Packing(lambda parts: parts[0], _unit_rows) if meaning.norm_head else None
    rules.append(Rule(('lm_head.',), f'{kind.head}.', head))
    return WeightLayout(tuple(rules), ignored=('rotary_emb.inv_freq',))


def _packing(kind: Kind, meaning: Meaning, ours: tuple[str, ...]) -> Packing | None:
    if ours == (_Q, _K, _V):
        if kind.packed == 'thirds':
            return Packing(
                lambda parts: torch.cat(list(parts)),
                lambda tensor: tensor.view(3, -1, *tensor.shape[1:]).unbind(),
            )
        return _groups(meaning)
    if meaning.interleaved and ours in ((_Q,), (_K,)):
        width = meaning.head_dim
        return Packing(
            lambda parts: to_pairs(parts[0], width), lambda tensor: [to_halves(tensor, width)]
        )
    return None


def _groups(meaning: Meaning) -> Packing:
    """Rows by key/value head: its queries, its key, its value."""
    width, queries = meaning.head_dim, meaning.q_per_kv

    def split(tensor: Tensor) -> list[Tensor]:
        groups = tensor.view(-1, queries + 2, width, *tensor.shape[1:])
        parts = (groups[:, :queries], groups[:, queries], groups[:, queries + 1])
        q, k, v = (part.reshape(-1, *tensor.shape[1:]) for part in parts)
        return [to_halves(q, width), to_halves(k, width), v] if meaning.interleaved else [q, k, v]

    def join(parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts
        if meaning.interleaved:
            q, k = to_pairs(q, width), to_pairs(k, width)
        rest = q.shape[1:]
        groups = [
            q.reshape(-1, queries, width, *rest),
            *(part.reshape(-1, 1, width, *rest) for part in (k, v)),
        ]
        return torch.cat(groups, dim=1).reshape(-1, *rest)

    return Packing(join, split)


def to_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose rotary pairs lie side by side, with the pairs half a head apart."""
    rest = tensor.shape[1:]
    return tensor.reshape(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)


def to_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    rest = tensor.shape[1:]
    return tensor.reshape(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(-1, *rest)


def _unit_rows(tensor: Tensor) -> list[Tensor]:
    rows = torch.nn.functional.normalize(tensor.float(), dim=-1)
    return [rows.to(tensor.dtype)]


def cut_dim(name: str, vocabulary_split: bool = False) -> int | None:
    """The dimension of our weight `name` that tensor parallelism cuts, None if every part has it.

    Args:
        name: Ours.
        vocabulary_split: Whether the embedding is cut by rows (`embed_split_hidden=False`).
    """
    module, kind = name.split('.')[-2:]
    if module in ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj', 'lm_head'):
        return 0
    if module in ('o_proj', 'down_proj'):
        return 1 if kind == 'weight' else None
    if module == 'embed_tokens':
        return 0 if vocabulary_split else 1
    return None


def split_evenly(num_layers: int, stages: int, num_chunks: int = 1) -> list[list[range]]:
    """Layers of every stage's chunks, as InternLM deals them out: later stages get the rest.

    Raises:
        ValueError: If a chunk would have no layer.
    """
    parts: list[list[range]] = [[] for _ in range(stages)]
    each, start = num_layers // num_chunks, 0
    for _ in range(num_chunks):
        for stage in range(stages):
            size = each // stages + (stage >= stages - each % stages)
            parts[stage].append(range(start, start + size))
            start += size
    if start != num_layers or any(not part for stage in parts for part in stage):
        raise ValueError(f'{num_layers} layers do not divide into {stages} x {num_chunks} parts')
    return parts


def family_name(config: dict[str, Any]) -> str:
    """The registered name in a model's config: of a class, a dotted name or a plain one."""
    kind = config['type']
    return (kind if isinstance(kind, str) else kind.__name__).rsplit('.', 1)[-1]
