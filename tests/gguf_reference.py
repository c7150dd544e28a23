"""Folders to convert, and what a GGUF file computes, after llama.cpp's source, in float64."""

import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from internlm_mm.checkpoint.huggingface import write_tokenizer
from internlm_mm.tokenizers import load_tokenizer

VOCAB = 512  # twelve more rows than the tokenizer of the tests has ids


def llama_folder(folder: Path, tokenizer: Path | None, dtype='float32', **changes) -> Path:
    """A folder as an export of an InternLM is one: Llama's form, with biases, none of them 0."""
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        eos_token_id=[2, 5],
    )
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer is not None:
        write_tokenizer(load_tokenizer(tokenizer), folder)
    return folder


def logits_of_folder(folder: Path, ids: list[int]) -> np.ndarray:
    """What transformers computes, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def fields_of(file: Path) -> dict:
    """Every key of a GGUF file with its value."""
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file in float64."""
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in GGUFReader(file).tensors
    }


def logits_of_file(file: Path, ids: list[int]) -> np.ndarray:
    """What llama.cpp computes: src/models/llama.cpp and ggml_compute_forward_rope."""
    fields, weights = fields_of(file), tensors_of(file)
    heads = fields['llama.attention.head_count']
    kv_heads = fields['llama.attention.head_count_kv']
    eps = fields['llama.attention.layer_norm_rms_epsilon']
    cos, sin = _turns(fields, weights.get('rope_freqs.weight'), len(ids))
    seen = np.tril(np.ones((len(ids), len(ids)), dtype=bool))

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[name]

    def linear(x, name):
        return x @ weights[f'{name}.weight'].T + weights.get(f'{name}.bias', 0)

    def turned(x):
        even, odd = x[..., ::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def split(x, count):
        return x.reshape(len(ids), count, -1).transpose(1, 0, 2)

    x = weights['token_embd.weight'][ids]
    for layer in range(fields['llama.block_count']):
        block = f'blk.{layer}.'
        h = norm(x, f'{block}attn_norm.weight')
        q = turned(split(linear(h, f'{block}attn_q'), heads))
        k, v = (split(linear(h, f'{block}attn_{name}'), kv_heads) for name in 'kv')
        k, v = (np.repeat(part, heads // kv_heads, 0) for part in (turned(k), v))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(fields['llama.attention.key_length'])
        scores = np.exp(np.where(seen, scores, -np.inf))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        x = x + linear(mixed.transpose(1, 0, 2).reshape(len(ids), -1), f'{block}attn_output')
        h = norm(x, f'{block}ffn_norm.weight')
        gate = linear(h, f'{block}ffn_gate')
        inner = gate / (1 + np.exp(-gate)) * linear(h, f'{block}ffn_up')
        x = x + linear(inner, f'{block}ffn_down')
    head = 'output' if 'output.weight' in weights else 'token_embd'
    return linear(norm(x, 'output_norm.weight'), head)


def _turns(fields: dict, divisors: np.ndarray | None, count: int):
    """Cosines and sines, [count, head_dim / 2]: rope_yarn and ggml_rope_yarn_corr_dims."""
    dim, base = fields['llama.rope.dimension_count'], fields['llama.rope.freq_base']
    pairs = np.arange(dim // 2)
    extrapolated = base ** (-2 * pairs / dim) / (1 if divisors is None else divisors)
    scale = 1 / fields.get('llama.rope.scaling.factor', 1)
    frequencies, size = scale * extrapolated, 1.0
    if fields.get('llama.rope.scaling.type') == 'yarn':
        original = fields['llama.rope.scaling.original_context_length']

        def dimension(turns):
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(dimension(32))), min(dim - 1, math.ceil(dimension(1)))
        ramp = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
        frequencies = frequencies * (1 - ramp) + extrapolated * ramp
        size = fields['llama.rope.scaling.attn_factor'] * (1 + 0.1 * math.log(1 / scale))
    angles = np.arange(count)[:, None] * frequencies
    return np.cos(angles) * size, np.sin(angles) * size
