"""docs/en/model_zoo.md: folders with the names and shapes of its table load, its configs check."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from internlm_mm.checkpoint.foreign import open_source
from internlm_mm.registry import MODELS
from internlm_mm.utils.config import check_config, load_config
from internlm_mm.utils.config_reader import shipped_configs

PAGE = (Path(__file__).parents[1] / 'docs' / 'en' / 'model_zoo.md').read_text(encoding='utf-8')
BASES = shipped_configs() / '_base_' / 'models'
LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}


def number(text: str) -> int:
    return int(text.replace(',', ''))


def read_rows() -> dict[str, dict[str, Any]]:
    """The table of architectures, by name."""
    lines = PAGE.split('## Architectures')[1].split('## Notes')[0].splitlines()
    rows = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        match = re.match(r'\[(.*?)\]', cells[0])
        if match is None:
            continue
        theta, _, scaling = cells[7].partition(', ')
        heads, kv_heads = cells[5].split(', ')
        rows[match[1]] = {
            'vocab_size': number(cells[1]),
            'num_hidden_layers': number(cells[2]),
            'hidden_size': number(cells[3]),
            'intermediate_size': number(cells[4]),
            'num_attention_heads': number(heads),
            'num_key_value_heads': number(kv_heads),
            'max_position_embeddings': number(cells[6]),
            'rope_theta': float(theta),
            'scaling': re.fullmatch(r'(dynamic|llama3)? ?([\d.]*)(?: or none)?', scaling).groups(),
            'biases': cells[8],
            'rms_norm_eps': float(cells[9]),
            'tie_word_embeddings': cells[0].endswith('tied'),
            'parameters': number(cells[10]),
        }
    return rows


ROWS = read_rows()


def published(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The config.json, in the spelling of its authors."""
    kind, factor = row['scaling']
    config = {key: value for key, value in row.items() if key not in OURS}
    config |= {'hidden_act': 'silu', 'torch_dtype': 'bfloat16', 'use_cache': True}
    if name.startswith(('InternLM-', 'InternLM2')):
        family = 'InternLM' if name.startswith('InternLM-') else 'InternLM2'
        config['bias'] = row['biases'] != 'none'
        if family == 'InternLM':
            config['rotary'] = {'base': int(config.pop('rope_theta')), 'type': 'dynamic'}
            del config['num_key_value_heads']
        else:
            config['rope_scaling'] = {'type': kind, 'factor': float(factor)} if kind else None
        config['auto_map'] = {'AutoModelForCausalLM': f'modeling_{family.lower()}.X'}
    elif name.startswith('InternLM3'):
        family = 'InternLM3'
        config |= {'bias': False, 'qkv_bias': False, 'head_dim': 128}
        config['rope_scaling'] = {'rope_type': kind, 'factor': float(factor)}
    else:
        family = re.match('Llama|Qwen2|Qwen3|Mistral', name)[0]
        config |= {
            'Llama': {'attention_bias': False, 'mlp_bias': False},
            'Qwen2': {'use_sliding_window': False, 'sliding_window': 131_072},
            'Qwen3': {'use_sliding_window': False, 'head_dim': 128, 'attention_bias': False},
            'Mistral': {'sliding_window': None},
        }[family]
        if kind:
            scaling = {'rope_type': 'llama3', 'factor': float(factor)}
            config['rope_scaling'] = scaling | LLAMA3
    config |= {'architectures': [f'{family}ForCausalLM'], 'model_type': family.lower()}
    return config


OURS = ('scaling', 'biases', 'parameters')


def shapes(row: dict[str, Any], family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the folder, written out by hand."""
    h, f, v = row['hidden_size'], row['intermediate_size'], row['vocab_size']
    heads, kv = row['num_attention_heads'], row['num_key_value_heads']
    d = 128 if family == 'Qwen3' else h // heads
    q_bias, o_bias = 'q k v' in row['biases'], row['biases'] == 'q k v o'
    packed = family == 'InternLM2'
    table, head = ('tok_embeddings', 'output') if packed else ('embed_tokens', 'lm_head')
    found: dict[str, tuple[int, ...]] = {f'model.{table}.weight': (v, h), 'model.norm.weight': (h,)}
    if not row['tie_word_embeddings']:
        found[f'{head}.weight'] = (v, h)
    for i in range(row['num_hidden_layers']):
        layer: dict[str, tuple[int, ...]] = {}
        if packed:
            layer |= {'attention.wqkv.weight': ((heads + 2 * kv) * d, h)}
            layer |= {'attention.wo.weight': (h, heads * d)}
            layer |= {'attention_norm.weight': (h,), 'ffn_norm.weight': (h,)}
            layer |= {f'feed_forward.{w}.weight': (f, h) for w in ('w1', 'w3')}
            layer |= {'feed_forward.w2.weight': (h, f)}
        else:
            for name, count in (('q', heads), ('k', kv), ('v', kv)):
                layer[f'self_attn.{name}_proj.weight'] = (count * d, h)
                if q_bias:
                    layer[f'self_attn.{name}_proj.bias'] = (count * d,)
            layer['self_attn.o_proj.weight'] = (h, heads * d)
            if o_bias:
                layer['self_attn.o_proj.bias'] = (h,)
            if 'normalised' in row['biases']:
                layer |= {f'self_attn.{n}_norm.weight': (d,) for n in 'qk'}
            layer |= {f'mlp.{n}_proj.weight': (f, h) for n in ('gate', 'up')}
            layer |= {'mlp.down_proj.weight': (h, f)}
            layer |= {'input_layernorm.weight': (h,), 'post_attention_layernorm.weight': (h,)}
        found |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
    return found


def write_sparse(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Safetensors files in bf16 of which only the headers take space on the disk."""
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for index in range(0, len(names), 40):
        file = f'model-{index}.safetensors'
        header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
        end = 0
        for name in names[index : index + 40]:
            start, end = end, end + 2 * math.prod(tensors[name])
            offsets = {'data_offsets': [start, end]}
            header[name] = {'dtype': 'BF16', 'shape': list(tensors[name]), **offsets}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, 'wb') as stream:
            stream.write(len(text).to_bytes(8, 'little') + text)
            stream.truncate(8 + len(text) + end)
    index_text = json.dumps({'weight_map': weight_map})
    (folder / 'model.safetensors.index.json').write_text(index_text)


def test_there_are_rows() -> None:
    assert len(ROWS) == PAGE.split('## Architectures')[1].split('## Notes')[0].count('\n| [') > 10


@pytest.mark.parametrize('name', ROWS)
def test_a_published_folder_loads(tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    config = published(name, row)
    family = config['architectures'][0].removesuffix('ForCausalLM')
    tensors = shapes(row, family)
    assert sum(map(math.prod, tensors.values())) == row['parameters']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    write_sparse(tmp_path, tensors)
    source = open_source(tmp_path)
    assert source.family == family
    model = source.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == row['parameters']
    assert model.max_seq_len == row['max_position_embeddings']
    assert model.rope_theta == row['rope_theta'] and model.norm_eps == row['rms_norm_eps']
    kind, factor = row['scaling']
    said = model.rope_scaling or {}
    assert said.get('rope_type') == kind
    assert said.get('factor', 1.0) == float(factor or 1.0)


def test_every_base_on_the_page_is_there() -> None:
    named = set(re.findall(r'`(\w+\.py)`', PAGE.split('## InternLM\n')[1].split('## Arch')[0]))
    assert named and all((BASES / name).is_file() for name in named)
    others = {path.name for path in BASES.glob('*.py')} - named
    assert others == {'internlm_20b.py', 'internlm_tiny.py'}  # the page says of what they are


@pytest.mark.parametrize(
    ('base', 'name'),
    [
        ('internlm_7b', 'InternLM-7B'),
        ('internlm2_1_8b', 'InternLM2-1.8B'),
        ('internlm2_7b', 'InternLM2-7B'),
        ('internlm2_20b', 'InternLM2-20B'),
        ('internlm3_8b', 'InternLM3-8B'),
        ('llama3_8b', 'Llama-3-8B'),
        ('qwen2_5_7b', 'Qwen2.5-7B'),
        ('qwen3_8b', 'Qwen3-8B'),
        ('mistral_7b', 'Mistral-7B-v0.3'),
    ],
)
def test_bases_are_the_published_sizes(base: str, name: str) -> None:
    model, row = load_config(BASES / f'{base}.py').model, ROWS[name]
    for ours, theirs in (
        ('vocab_size', 'vocab_size'),
        ('hidden_size', 'hidden_size'),
        ('intermediate_size', 'intermediate_size'),
        ('num_layers', 'num_hidden_layers'),
        ('num_heads', 'num_attention_heads'),
    ):
        assert model[ours] == row[theirs]
    kv_heads = model.get('num_kv_heads', model.num_heads)
    assert kv_heads == row['num_key_value_heads']
    if base != 'internlm_7b':  # whose run is longer, and more careful
        assert model.max_seq_len == row['max_position_embeddings']
        assert (
            MODELS.build({'type': model.type, **options_of(model)}).norm_eps == row['rms_norm_eps']
        )
        assert model.rope_theta == row['rope_theta']


def options_of(model: Config) -> dict[str, Any]:
    """Small, with the settings that do not show in sizes."""
    small = {'vocab_size': 8, 'hidden_size': 8, 'intermediate_size': 8, 'num_layers': 1}
    small |= {'num_heads': 2, 'num_kv_heads': 2}
    rest = {key: value for key, value in model.items() if key not in (*small, 'type', 'head_dim')}
    return small | rest


@pytest.mark.parametrize('load_from', [False, True])
def test_the_configs_on_the_page(tmp_path: Path, load_from: bool) -> None:
    blocks = re.findall(r'```python\n(.*?)```', PAGE, re.S)
    (source,) = [block for block in blocks if ('load_from' in block) == load_from]
    (tmp_path / 'mine.py').write_text(source)
    config = load_config(tmp_path / 'mine.py')
    if load_from:
        assert config.load_from == 'hf/internlm2_5-7b' and 'model' not in config
        config.model = load_config(BASES / 'internlm2_7b.py').model
    check_config(config)
    assert config.model.num_layers == 32
