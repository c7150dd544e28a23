"""Counts by hand, and the schedules against torch's own order of actions."""

from dataclasses import replace

import pytest
from torch.distributed.pipelining.schedules import _get_warmup_ops

from internlm_mm.planner.activations import (
    head_norm_bytes,
    in_flight,
    kept_bytes,
    layer_bytes,
    logits_bytes,
    recomputed_bytes,
)
from internlm_mm.planner.sizes import ModelSizes, RunSizes

SIZES = ModelSizes(
    num_layers=8,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    attention_bias=True,
)


def run_of(**changes) -> RunSizes:
    options = dict(seq_len=16, micro_batch_size=2, micro_batches=4, stages=(tuple(range(8)),))
    return RunSizes(**(options | changes))


def test_a_compiled_layer_by_hand() -> None:
    """Per token: residual and norm before both halves, q, k, v, result, gate, up, product."""
    per_token = 2 * (4 * 32 + 2 * 32 + 2 * 16 + 3 * 48) + 2 * 4 + 4 * 4
    assert layer_bytes(SIZES, run_of(compiled=True, param_bytes=2)) == 32 * per_token


def test_norms_of_heads_by_hand() -> None:
    normed = replace(SIZES, qk_norm=True)
    compiled = run_of(compiled=True, param_bytes=2)
    # Per token: q and k as they were, and a factor for each of six heads.
    assert head_norm_bytes(normed, compiled) == 32 * 6 * (8 * 2 + 4)
    more = layer_bytes(normed, compiled) - layer_bytes(SIZES, compiled)
    assert more == head_norm_bytes(normed, compiled)
    plain = run_of(param_bytes=2, tensor=2)
    assert head_norm_bytes(normed, plain) == 32 * 3 * (8 * (4 + 2) + 4)


def test_sequence_parallelism_shares_what_is_not_gathered() -> None:
    whole = layer_bytes(SIZES, run_of(compiled=True, param_bytes=2))
    half = layer_bytes(SIZES, run_of(compiled=True, param_bytes=2, tensor=2))
    gathered = 2 * 32 * 32 * 2  # what q, k, v and gate, up read
    assert half - gathered == (whole - gathered) / 2


def test_context_parallelism_keeps_whole_keys() -> None:
    alone = layer_bytes(SIZES, run_of())
    shared = layer_bytes(SIZES, run_of(context=2))
    keys = 2 * 32 * 16 * 4
    assert shared - keys == (alone - keys) / 2
    chunked = layer_bytes(SIZES, run_of(context=2, context_kernel=True))
    assert chunked - shared == 16 * 32 * 4


def test_a_recomputed_layer_keeps_its_input() -> None:
    some = kept_bytes(SIZES, run_of(recompute=0.5), range(8), False, False)
    none = kept_bytes(SIZES, run_of(), range(8), False, False)
    assert none - some == 4 * (layer_bytes(SIZES, run_of()) - 32 * 32 * 4)


@pytest.mark.parametrize(
    ('param_bytes', 'chunk', 'each'), [(4, 8, 12), (4, 32, 8), (2, 8, 16), (2, 64, 10)]
)
def test_logits_are_a_chunk(param_bytes: int, chunk: int, each: int) -> None:
    run = run_of(param_bytes=param_bytes, chunk_tokens=chunk)
    assert logits_bytes(SIZES, run) == min(chunk, 32) * 64 * each
    split = run_of(param_bytes=param_bytes, chunk_tokens=chunk, tensor=2)
    assert logits_bytes(SIZES, split) == min(chunk, 32) * 32 * each
    in_place = run_of(param_bytes=param_bytes, chunk_tokens=chunk, loss_in_place=True)
    assert logits_bytes(SIZES, in_place) == min(chunk, 32) * 64 * param_bytes


def pipeline(schedule: str, ranks: int, per_rank: int, micro_batches: int) -> RunSizes:
    stages = tuple((i,) for i in range(ranks * per_rank))
    held = tuple(tuple(range(rank, len(stages), ranks)) for rank in range(ranks))
    return run_of(
        schedule=schedule, stages=stages, stages_of_rank=held, micro_batches=micro_batches
    )


def test_micro_batches_in_flight() -> None:
    assert in_flight(run_of(), 0) == 1
    assert [in_flight(pipeline('gpipe', 4, 1, 6), rank) for rank in range(4)] == [6, 6, 6, 6]
    assert [in_flight(pipeline('1f1b', 4, 1, 6), rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [in_flight(pipeline('1f1b', 4, 1, 2), rank) for rank in range(4)] == [2, 2, 2, 1]
    assert [in_flight(pipeline('zbv_zero_bubble', 4, 2, 8), rank) for rank in (0, 3)] == [4, 4]
    assert in_flight(pipeline('interleaved_zero_bubble', 4, 2, 8), 3) == 4.5


@pytest.mark.parametrize('rank', range(4))
def test_interleaved_warms_up_as_torch_does(rank: int) -> None:
    for per_rank in (2, 3):
        warm_up = _get_warmup_ops(
            rank, per_rank, microbatches_per_round=4, pp_group_size=4, n_microbatches=16
        )
        run = pipeline('interleaved_1f1b', 4, per_rank, 16)
        assert in_flight(run, rank) * per_rank == warm_up + 1


def test_a_compiled_layer_that_keeps_its_products_by_hand() -> None:
    """Per token: residual before both halves, q, k, v, result, gate, up; what o gives is one."""
    run = run_of(compiled=True, param_bytes=2, recompute=1.0, selective=True)
    per_token = 2 * (2 * 32 + 2 * 32 + 2 * 16 + 2 * 48) + 2 * 4 + 4 * 4
    assert recomputed_bytes(SIZES, run) == 32 * per_token
    # Norms' outputs and the gates' product are what it does without.
    assert layer_bytes(SIZES, run) - recomputed_bytes(SIZES, run) == 32 * 2 * (2 * 32 + 48)


def test_a_compiled_layer_that_rounds_computes_as_much_again() -> None:
    """What norms and gates gave is rounded in backward, and made there."""
    run = run_of(compiled=True, param_bytes=2)
    saved = layer_bytes(SIZES, run) - layer_bytes(SIZES, replace(run, rounded=True))
    assert saved == 32 * 2 * (2 * 32 + 48)
    shared = replace(run, context=2, context_kernel=True)
    saved = layer_bytes(SIZES, shared) - layer_bytes(SIZES, replace(shared, rounded=True))
    assert saved == 16 * 2 * (2 * 32 + 48)
    eager = replace(run, compiled=False)
    assert layer_bytes(SIZES, replace(eager, rounded=True)) == layer_bytes(SIZES, eager)
