"""`internlm_mm/utils/internlm_model.py`: families and sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.registry import MODELS
from internlm_mm.utils.config import load_config
from internlm_mm.utils.config_draft import Draft
from internlm_mm.utils.internlm_config import convert_config, convert_text
from internlm_mm.utils.internlm_config_keys import FAMILIES
from internlm_mm.utils.internlm_model import intermediate_size
from internlm_mm.utils.internlm_reader import read_internlm_config
from tests.internlm_configs import SFT_2023, TINY, write_evo


@pytest.mark.parametrize(
    ('hidden', 'ratio', 'multiple', 'expected'),
    [
        (4096, 8 / 3, 256, 11_008),  # InternLM-7B
        (5120, 8 / 3, 256, 13_824),  # InternLM-20B
        (2048, 8 / 3, 256, 5632),  # the model of InternLM's own tests
        (2048, 4, 128, 8192),  # InternLM2-1.8B
        (4096, 3.5, 256, 14_336),  # InternLM2-7B
        (6144, 8 / 3, 256, 16_384),  # InternLM2-20B
    ],
)
def test_published_widths(hidden: int, ratio: float, multiple: int, expected: int) -> None:
    assert intermediate_size(hidden, ratio, multiple) == expected


@given(
    hidden=st.integers(1, 10_000), ratio=st.floats(0.1, 8), multiple=st.sampled_from([1, 8, 128])
)
def test_widths_are_rounded_up(hidden: int, ratio: float, multiple: int) -> None:
    width = intermediate_size(hidden, ratio, multiple)
    assert width % multiple == 0 and width - multiple < int(hidden * ratio) <= width


def build(source: Path, folder: Path) -> torch.nn.Module:
    out = folder / 'ours.py'
    convert_config(source, out, overwrite=True)
    with torch.device('meta'):
        return MODELS.build(load_config(out).model)


def test_internlm_7b_is_ours(tmp_path: Path) -> None:
    model = build(SFT_2023, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 7_321_948_160
    text, _ = convert_text(read_internlm_config(SFT_2023), 'out.py')
    assert 'configs._base_.models.internlm_7b import *' in text and 'model = dict' not in text


@pytest.mark.parametrize(
    ('model_type', 'expected'),
    [
        ('LLAMA2', 'Llama'),
        ('INTERNLM2_PUBLIC', 'InternLM2'),
        ('INTERNLM2', 'InternLM2'),
        ('INTERNLM3', 'InternLM3'),
    ],
)
def test_families(tmp_path: Path, model_type: str, expected: str) -> None:
    if MODELS.get(expected) is None:
        pytest.skip(f'no {expected} yet')
    model = build(write_evo(tmp_path, model_type), tmp_path)
    assert type(model).__name__ == FAMILIES[model_type] == expected
    assert (model.num_kv_heads, model.intermediate_size) == (8, 14_336)
    assert (model.rope_theta, model.max_seq_len) == (1e6, 4096)
    # q, k, v and o; gate, up and down; two norms; embedding and head; a last norm
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    layer = attention + 3 * 4096 * 14_336 + 2 * 4096
    assert sum(p.numel() for p in model.parameters()) == 32 * layer + 2 * 92_544 * 4096 + 4096


def convert(**model: Any) -> tuple[str, Draft]:
    config = read_internlm_config(TINY)
    config.values |= {'model': {**config.values['model'], **model}}
    text, rows = convert_text(config, 'out.py')
    return text, {row.key: row for row in rows}


def test_sizes_of_no_base_are_written(tmp_path: Path) -> None:
    text, rows = convert(rope_base=500_000)
    assert 'model = dict(\n    type=InternLM,  # ' not in text and 'type=InternLM,' in text
    assert '    rope_theta=500_000.0,  # model.rope_base\n' in text
    assert rows['model.mlp_ratio'].became == 'model.intermediate_size=88'
    assert rows['model.multiple_of'].became == 'model.intermediate_size=88'


def test_positions_beyond_the_rows(tmp_path: Path) -> None:
    text, _ = convert(max_position_embeddings=128)
    assert '    max_seq_len=128,  # model.max_position_embeddings\n' in text
    text, _ = convert(max_position_embeddings=16)  # seq_len is 32
    assert '    max_seq_len=32,' in text


def test_label_smoothing_is_the_objectives() -> None:
    text, _ = convert()
    assert 'objective=dict(type=NextToken, label_smoothing=0.1),' in text
    assert 'from internlm_mm.models import InternLM, NextToken\n' in text


@pytest.mark.parametrize(
    ('model_type', 'message'),
    [
        ('INTERNLM_MoE', 'mixtures of experts are not supported'),
        ('INTERNLM2_PUBLC', "Did you mean 'INTERNLM2_PUBLIC'"),
        (None, 'model_type=None has no family here'),
    ],
)
def test_families_that_are_not_here(model_type: Any, message: str) -> None:
    config = read_internlm_config(TINY)
    config.values['model_type'] = model_type
    with pytest.raises(ValueError, match=message):
        convert_text(config, 'out.py')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_kv_attention_heads=1), 'INTERNLM has as many as 2 heads'),
        (dict(no_bias=True), 'model.no_bias=True is not INTERNLM, as released'),
        (dict(multiple_of=0), 'model.multiple_of=0 must be at least 1'),
        (dict(hidden_size=True), 'model.hidden_size=True: expected int'),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(**options)


def test_a_size_that_is_missing_is_named() -> None:
    config = read_internlm_config(TINY)
    config.values['model']['num_layer'] = config.values['model'].pop('num_layers')
    message = r"tiny.py has no model.num_layers, which it needs. Did you mean 'num_layer'\?"
    with pytest.raises(ValueError, match=message):
        convert_text(config, 'out.py')
