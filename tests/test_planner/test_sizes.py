"""Shapes against the models themselves."""

import pytest
import torch

from internlm_mm.models import InternLM, Llama, Qwen2, Qwen3
from internlm_mm.planner.sizes import (
    ModelSizes,
    ParameterShape,
    RunSizes,
    layer_parameters,
    outer_parameters,
)

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4)


@pytest.mark.parametrize(
    ('family', 'options', 'said'),
    [
        (InternLM, {}, dict(attention_bias=True)),
        (Llama, dict(num_kv_heads=2, head_dim=10), {}),
        (Llama, dict(num_kv_heads=2, head_dim=10, tie_word_embeddings=True),
         dict(tie_word_embeddings=True)),
        (Qwen2, dict(num_kv_heads=2), dict(attention_bias=True, output_bias=False)),
        (Qwen3, dict(num_kv_heads=2, head_dim=10), dict(qk_norm=True)),
    ],
)  # fmt: skip
def test_names_and_shapes_are_the_models(family, options: dict, said: dict) -> None:
    with torch.device('meta'):
        model = family(**SMALL, **options)
    sizes = ModelSizes(
        num_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=options.get('num_kv_heads', 4),
        head_dim=options.get('head_dim', 8),
        vocab_size=64,
        **(dict(attention_bias=False) | said),
    )
    shapes = outer_parameters(sizes, first=True, last=True)
    for layer in range(3):
        shapes += layer_parameters(sizes, layer)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {one.name: one.shape for one in shapes} == expected


def test_stages_hold_only_their_end() -> None:
    sizes = ModelSizes(
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=16,
        attention_bias=False,
    )
    assert [one.name for one in outer_parameters(sizes, True, False)] == ['embed_tokens.weight']
    last = [one.name for one in outer_parameters(sizes, False, True)]
    assert last == ['norm.weight', 'lm_head.weight']
    assert outer_parameters(sizes, False, False) == []


@pytest.mark.parametrize('rows', [1, 5, 7, 8, 103])
@pytest.mark.parametrize('shards', [1, 2, 3, 8])
def test_shards_are_cut_as_torch_does(rows: int, shards: int) -> None:
    shape = ParameterShape('x', (rows, 3), None)
    chunks = torch.empty(rows, 3).chunk(shards)
    numbers = [chunk.numel() for chunk in chunks] + [0] * (shards - len(chunks))
    assert [shape.sharded(1, shards, index) for index in range(shards)] == numbers
    assert shape.sharded(1, shards) == max(numbers)


def test_tensor_parallelism_cuts_first() -> None:
    rows = ParameterShape('x', (12, 10), 0)
    columns = ParameterShape('x', (12, 10), 1)
    norm = ParameterShape('x', (12,), None)
    assert (rows.unsharded(4), columns.unsharded(2), norm.unsharded(2)) == (30, 60, 12)
    assert (rows.sharded(4, 2), columns.sharded(2, 5), norm.sharded(2, 5)) == (20, 15, 3)


def test_what_follows_from_a_run() -> None:
    run = RunSizes(
        seq_len=64,
        micro_batch_size=3,
        micro_batches=2,
        stages=((0,),),
        data_shard=4,
        context=2,
        param_bytes=2,
    )
    assert (run.shards, run.tokens, run.master_bytes) == (8, 96, 4)
