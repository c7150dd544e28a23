"""A Hugging Face folder of ours as one GGUF file, which llama.cpp and what is built on it run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internlm_mm.checkpoint.gguf_rope import head_dim_of, rope_metadata
from internlm_mm.checkpoint.gguf_vocab import Vocabulary, read_vocabulary
from internlm_mm.checkpoint.hf_files import HFWeights
from internlm_mm.utils.progress import byte_bar
from internlm_mm.utils.suggest import did_you_mean

DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}
"""Dtypes of the matrices; vectors are always float32, as llama.cpp computes with them."""

# What llama.cpp calls its architecture `llama`; the two differ in what we write by nothing.
_MODEL_TYPES = ('llama', 'mistral')

_GLOBAL = {
    'model.embed_tokens.weight': 'token_embd.weight',
    'model.norm.weight': 'output_norm.weight',
    'lm_head.weight': 'output.weight',
}
_LAYER = {
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}

Read = Callable[[], Tensor]


def write_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Write weights, configuration, tokenizer and chat template of a folder to one file.

    One tensor is in memory at a time. Everything is written to `OUT.tmp`, which takes the name OUT
    when it is whole.

    Args:
        folder: A Hugging Face folder of Llama's form with a SentencePiece tokenizer, as
            `convert2hf` writes it.
        out: The `.gguf` file to make.
        dtype: Of the matrices: 'f32', 'f16' or 'bf16'; None for the one that config.json names.
        overwrite: Whether an existing `out` is replaced.
        show_progress: Whether a bar on standard error shows how far it is.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False.
        FileNotFoundError: If the folder, its weights or its tokenizer are missing.
        ModuleNotFoundError: If the package `gguf` is missing.
        ValueError: If weights are missing or left over, or llama.cpp would not compute or encode
            as the folder says.
    """
    folder, out = Path(folder), Path(out)
    config = _read_config(folder)
    chosen = _dtype_of(config, dtype)
    if out.exists() and not overwrite:
        raise FileExistsError(f'{out} exists; choose another file or overwrite it (--overwrite)')
    weights = HFWeights(folder)
    tensors = dict(_tensors(config, weights))
    vocabulary = read_vocabulary(folder, config['vocab_size'])
    rope, frequencies = rope_metadata(config)
    if frequencies is not None:
        tensors['rope_freqs.weight'] = ([len(frequencies)], lambda: frequencies)
    staging = out.with_name(out.name + '.tmp')
    staging.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(_writer(staging)) as writer:
            _add_config(writer, config, folder.resolve().name, chosen)
            adds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            for key, value in rope.items():
                adds[type(value)](key, value)
            _add_vocabulary(writer, vocabulary)
            _write_tensors(writer, tensors, chosen, show_progress)
        with open(staging, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(staging, out)
    finally:
        staging.unlink(missing_ok=True)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / 'config.json'
    if not file.is_file():
        raise FileNotFoundError(f'{folder} is no Hugging Face model: config.json is missing')
    config = json.loads(file.read_text(encoding='utf-8'))
    kind = config.get('model_type')
    if kind not in _MODEL_TYPES:
        raise ValueError(
            f'{file} has model_type={kind!r}; only {" and ".join(_MODEL_TYPES)} are written here. '
            'Export with --format llama where the model has that form'
        )
    only = {'hidden_act': 'silu', 'mlp_bias': False, 'sliding_window': None}
    for key, value in only.items():
        if config.get(key, value) != value:
            raise ValueError(f'{file} has {key}={config[key]!r}; only {value!r} is written here')
    if config.get('quantization_config'):
        raise ValueError(f'{file}: the weights are quantised; give the folder of before that')
    return config


def _dtype_of(config: Mapping[str, Any], dtype: str | None) -> str:
    if dtype is None:
        named = config.get('dtype') or config.get('torch_dtype')
        return next((name for name, d in DTYPES.items() if str(d) == f'torch.{named}'), 'f32')
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} cannot be written.{did_you_mean(dtype, DTYPES)}')
    return dtype


def _tensors(
    config: Mapping[str, Any], weights: HFWeights
) -> Iterator[tuple[str, tuple[list[int], Read]]]:
    """Names in the file, in order, with shape and what reads the tensor.

    Raises:
        ValueError: If weights are missing or left over, or one has another shape.
    """
    shapes = _shapes(config)
    if config.get('tie_word_embeddings') and 'lm_head.weight' not in weights:
        del shapes['lm_head.weight']
    missing, extra = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing:
        raise ValueError(f'{len(missing)} weights are missing, the first is {missing[0]!r}')
    if extra:
        raise ValueError(f'{len(extra)} weights have no place in GGUF, the first is {extra[0]!r}')
    queries = config['num_attention_heads']
    heads = {'q_proj': queries, 'k_proj': config.get('num_key_value_heads') or queries}
    for name, shape in shapes.items():
        found = weights.shape(name)
        if found != shape:
            raise ValueError(f'{name} has shape {found} in the files and {shape} by config.json')
        turned = heads.get(name.split('.')[-2])
        yield _gguf_name(name), (shape, _reader(weights, name, turned))


def _shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, inner, vocab = (
        config[key] for key in ('hidden_size', 'intermediate_size', 'vocab_size')
    )
    queries = config['num_attention_heads'] * head_dim_of(config)
    keys = (config.get('num_key_value_heads') or config['num_attention_heads']) * head_dim_of(
        config
    )
    shapes = {'model.embed_tokens.weight': [vocab, hidden]}
    for layer in range(config['num_hidden_layers']):
        prefix = f'model.layers.{layer}.'
        for name, rows, columns in (
            ('q', queries, hidden),
            ('k', keys, hidden),
            ('v', keys, hidden),
            ('o', hidden, queries),
        ):
            shapes[f'{prefix}self_attn.{name}_proj.weight'] = [rows, columns]
            if config.get('attention_bias'):
                shapes[f'{prefix}self_attn.{name}_proj.bias'] = [rows]
        shapes |= {
            f'{prefix}mlp.gate_proj.weight': [inner, hidden],
            f'{prefix}mlp.up_proj.weight': [inner, hidden],
            f'{prefix}mlp.down_proj.weight': [hidden, inner],
            f'{prefix}input_layernorm.weight': [hidden],
            f'{prefix}post_attention_layernorm.weight': [hidden],
        }
    return shapes | {'model.norm.weight': [hidden], 'lm_head.weight': [vocab, hidden]}


def _gguf_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    _, _, layer, *module, kind = name.split('.')
    return f'blk.{layer}.{_LAYER[".".join(module)]}.{kind}'


def _reader(weights: HFWeights, name: str, heads: int | None) -> Read:
    def read() -> Tensor:
        weight = weights[name]
        return weight if heads is None else interleave(weight, heads)

    return read


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, or its bias, in the order of llama.cpp's Llama.

    There channel 2i of a head turns together with 2i + 1, here i with i + head_dim / 2.

    Args:
        weight: [heads * head_dim, ...].
        heads: Query heads, or key heads.
    """
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def _writer(path: Path) -> Any:
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('GGUF files need gguf: pip install gguf') from error
    return GGUFWriter(path, 'llama')


def _add_config(writer: Any, config: Mapping[str, Any], name: str, dtype: str) -> None:
    from gguf import LlamaFileType

    heads = config['num_attention_heads']
    file_type = {'f32': 'ALL_F32', 'f16': 'MOSTLY_F16', 'bf16': 'MOSTLY_BF16'}[dtype]
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_vocab_size(config['vocab_size'])
    writer.add_context_length(config['max_position_embeddings'])
    writer.add_embedding_length(config['hidden_size'])
    writer.add_feed_forward_length(config['intermediate_size'])
    writer.add_block_count(config['num_hidden_layers'])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get('num_key_value_heads') or heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config['rms_norm_eps'])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model('llama')
    writer.add_tokenizer_pre('default')
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, index in zip(adds, vocabulary.stop_ids, strict=False):
        add(index)
    for add, optional in (
        (writer.add_bos_token_id, vocabulary.bos_id),
        (writer.add_unk_token_id, vocabulary.unk_id),
        (writer.add_pad_token_id, vocabulary.pad_id),
    ):
        if optional is not None:
            add(optional)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(
    writer: Any, tensors: Mapping[str, tuple[list[int], Read]], dtype: str, show_progress: bool
) -> None:
    from gguf import GGMLQuantizationType

    total = 0
    stored = {name: dtype if len(shape) > 1 else 'f32' for name, (shape, _) in tensors.items()}
    for name, (shape, _) in tensors.items():
        size = DTYPES[stored[name]].itemsize * math.prod(shape)
        total += size
        kind = GGMLQuantizationType[stored[name].upper()]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with byte_bar('writing', total, show_progress) as advance:
        for name, (_, read) in tensors.items():
            data = _bytes(name, read(), DTYPES[stored[name]])
            writer.write_tensor_data(data)
            advance(data.nbytes)
    writer.flush()


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """What is stored of a tensor.

    Raises:
        ValueError: If a number is too large for `dtype`.
    """
    cast = tensor.to(dtype).contiguous()
    if dtype != tensor.dtype and not bool(cast.isfinite().all()) and bool(tensor.isfinite().all()):
        largest = float(tensor.abs().max())
        raise ValueError(f'{name} has {largest:.3g} in it, too large for {dtype}; take bf16 or f32')
    return cast.flatten().view(torch.uint8).numpy()
