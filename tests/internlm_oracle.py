"""InternLM's own checkpoints cut by hand from whole weights, tensor by tensor as documented.

Nothing here is shared with what reads and writes them. Reference: the layouts in docs/en/import.md.
"""

from pathlib import Path

import torch
from torch import Tensor

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    max_seq_len=2048,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)
GROUPED = SIZES | {'num_kv_heads': 2, 'rope_theta': 1e6}
FAMILIES = {'INTERNLM': 'InternLM', 'INTERNLM2_PUBLIC': 'InternLM2', 'LLAMA2': 'Llama'}


def full_state(sizes: dict, biases: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by our names, of a size that makes every part of a model matter."""
    generator = torch.Generator().manual_seed(seed)
    h, f, v = (sizes[key] for key in ('hidden_size', 'intermediate_size', 'vocab_size'))
    kv = h // sizes['num_heads'] * sizes.get('num_kv_heads', sizes['num_heads'])

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    state = {'embed_tokens.weight': draw(v, h)}
    for i in range(sizes['num_layers']):
        for name, rows, columns in (
            ('self_attn.q_proj', h, h),
            ('self_attn.k_proj', kv, h),
            ('self_attn.v_proj', kv, h),
            ('self_attn.o_proj', h, h),
            ('mlp.gate_proj', f, h),
            ('mlp.up_proj', f, h),
            ('mlp.down_proj', h, f),
        ):
            state[f'layers.{i}.{name}.weight'] = draw(rows, columns)
            if biases and 'self_attn' in name:
                state[f'layers.{i}.{name}.bias'] = draw(rows)
        for name in ('input_layernorm', 'post_attention_layernorm'):
            state[f'layers.{i}.{name}.weight'] = 1 + draw(h)
    return {**state, 'norm.weight': 1 + draw(h), 'lm_head.weight': draw(v, h)}


def rows(tensor: Tensor, t: int, tp: int) -> Tensor:
    n = tensor.shape[0] // tp
    return tensor[t * n : (t + 1) * n]


def columns(tensor: Tensor, t: int, tp: int) -> Tensor:
    n = tensor.shape[1] // tp
    return tensor[:, t * n : (t + 1) * n]


def side_by_side(tensor: Tensor, head_dim: int) -> Tensor:
    """Row 2i of a head is row i of ours, row 2i + 1 is ours half a head further."""
    half = head_dim // 2
    order = [j for i in range(half) for j in (i, i + half)]
    picked = [head * head_dim + j for head in range(len(tensor) // head_dim) for j in order]
    return tensor[picked]


def layer_v1(state: dict, i: int, t: int, tp: int, w2_up: bool, bias_once: bool) -> dict:
    our = {name.removeprefix(f'layers.{i}.'): x for name, x in state.items()}
    up, down = ('w2', 'w3') if w2_up else ('w3', 'w2')
    shard = {
        'mixer.out_proj.weight': columns(our['self_attn.o_proj.weight'], t, tp),
        'norm1.weight': our['input_layernorm.weight'],
        'norm2.weight': our['post_attention_layernorm.weight'],
        'mlp.w1.weight': rows(our['mlp.gate_proj.weight'], t, tp),
        f'mlp.{up}.weight': rows(our['mlp.up_proj.weight'], t, tp),
        f'mlp.{down}.weight': columns(our['mlp.down_proj.weight'], t, tp),
    }
    has_bias = 'self_attn.q_proj.bias' in our
    for kind in ('weight', 'bias')[: 1 + has_bias]:
        parts = [rows(our[f'self_attn.{n}_proj.{kind}'], t, tp) for n in 'qkv']
        shard[f'mixer.Wqkv.{kind}'] = torch.cat(parts)
    if has_bias and (t == 0 or not bias_once):
        shard['mixer.out_proj.bias'] = our['self_attn.o_proj.bias']
    return shard


def layer_2(state: dict, i: int, t: int, tp: int, sizes: dict, adapt_hf: bool) -> dict:
    our = {name.removeprefix(f'layers.{i}.'): x for name, x in state.items()}
    width = sizes['hidden_size'] // sizes['num_heads']
    q, k, v = (our[f'self_attn.{n}_proj.weight'] for n in 'qkv')
    if not adapt_hf:
        q, k = side_by_side(q, width), side_by_side(k, width)
    per_kv = sizes['num_heads'] // sizes['num_kv_heads']
    packed = []
    for g in range(sizes['num_kv_heads']):
        packed.append(q[g * per_kv * width : (g + 1) * per_kv * width])
        packed.append(k[g * width : (g + 1) * width])
        packed.append(v[g * width : (g + 1) * width])
    return {'attention.wqkv.weight': rows(torch.cat(packed), t, tp), **rest_2(our, t, tp)}


def layer_llama(state: dict, i: int, t: int, tp: int, sizes: dict, adapt_hf: bool) -> dict:
    our = {name.removeprefix(f'layers.{i}.'): x for name, x in state.items()}
    width = sizes['hidden_size'] // sizes['num_heads']
    q, k, v = (our[f'self_attn.{n}_proj.weight'] for n in 'qkv')
    if not adapt_hf:
        q, k = side_by_side(q, width), side_by_side(k, width)
    three = {
        f'attention.w{n}.weight': rows(x, t, tp) for n, x in zip('qkv', (q, k, v), strict=True)
    }
    return {**three, **rest_2(our, t, tp)}


def rest_2(our: dict, t: int, tp: int) -> dict:
    return {
        'attention.wo.weight': columns(our['self_attn.o_proj.weight'], t, tp),
        'attention_norm.weight': our['input_layernorm.weight'],
        'ffn_norm.weight': our['post_attention_layernorm.weight'],
        'feed_forward.w1.weight': rows(our['mlp.gate_proj.weight'], t, tp),
        'feed_forward.w2.weight': columns(our['mlp.down_proj.weight'], t, tp),
        'feed_forward.w3.weight': rows(our['mlp.up_proj.weight'], t, tp),
    }


def write_shards(
    folder: Path,
    state: dict[str, Tensor],
    sizes: dict,
    *,
    kind: str = 'INTERNLM',
    tp: int = 1,
    pp: int = 1,
    chunks: int = 1,
    w2_up: bool = True,
    adapt_hf: bool = True,
    split_hidden: bool = True,
    bias_once: bool = False,
    inv_freq: bool = False,
    config: dict | None = None,
) -> None:
    """A folder as InternLM leaves it.

    Args:
        folder: Made here.
        state: By our names.
        sizes: As of our models.
        kind: INTERNLM, INTERNLM2_PUBLIC or LLAMA2.
        tp: Tensor-parallel parts.
        pp: Pipeline stages.
        chunks: Of an interleaved pipeline.
        w2_up: The w2 of 2023.
        adapt_hf: Rotary pairs half a head apart.
        split_hidden: Embedding cut by columns.
        bias_once: Whether only part 0 has the output projection's bias.
        inv_freq: Whether the first release's rotary frequencies are in.
        config: Changes to `model_config.pt`; None for no such file.
    """
    folder.mkdir(parents=True)
    first = kind == 'INTERNLM'
    layers = 'blocks' if first else 'layers'
    embedding, head = ('embedding', 'head') if first else ('tok_embeddings', 'output')
    total = sizes['num_layers']
    assert total % (pp * chunks) == 0
    each = total // (pp * chunks)
    for p in range(pp):
        for t in range(tp):
            shard = {}
            for c in range(chunks):
                prefix = 'model.' if chunks == 1 else f'{c}.model.'
                start = (c * pp + p) * each
                if start == 0:
                    table = state['embed_tokens.weight']
                    if split_hidden:
                        shard[f'{prefix}{embedding}.weight'] = columns(table, t, tp)
                    else:
                        name = f'{prefix}{embedding}.word_embeddings.weight'
                        shard[name] = rows(table, t, tp)
                for local in range(each):
                    i = start + local
                    if first:
                        layer = layer_v1(state, i, t, tp, w2_up, bias_once)
                        if inv_freq:
                            half = sizes['hidden_size'] // sizes['num_heads'] // 2
                            layer['mixer.rotary_emb.inv_freq'] = torch.ones(half)
                    else:
                        make = layer_2 if kind == 'INTERNLM2_PUBLIC' else layer_llama
                        layer = make(state, i, t, tp, sizes, adapt_hf)
                    for name, tensor in layer.items():
                        shard[f'{prefix}{layers}.{local}.{name}'] = tensor
                if start + each == total:
                    shard[f'{prefix}norm.weight'] = state['norm.weight']
                    shard[f'{prefix}{head}.weight'] = rows(state['lm_head.weight'], t, tp)
            shard = {name: tensor.clone() for name, tensor in shard.items()}
            torch.save(shard, folder / f'model_tp{t}_pp{p}.pt')
            torch.save({}, folder / f'topo_tp{t}_pp{p}.json')
            torch.save({'base': 1}, folder / f'optimizer_tp{t}_pp{p}_zo0.pt')
    if config is not None:
        said = {
            'num_layers': total,
            'hidden_size': sizes['hidden_size'],
            'vocab_size': sizes['vocab_size'],
            'num_attention_heads': sizes['num_heads'],
            'mlp_ratio': sizes['intermediate_size'] / sizes['hidden_size'],
            'layer_norm_epsilon': sizes['norm_eps'],
            'dtype': torch.bfloat16,
            'norm_type': 'rmsnorm',
        }
        if not first:
            said |= {
                'num_kv_attention_heads': sizes['num_kv_heads'],
                'rope_base': sizes['rope_theta'],
                'adapt_hf': adapt_hf,
            }
        torch.save(said | config, folder / 'model_config.pt')
