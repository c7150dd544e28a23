"""The share that a budget means, against trying all of them."""

from dataclasses import replace

import pytest

from internlm_mm.planner import ModelSizes, RunSizes, predict_memory
from internlm_mm.planner.recompute import fit_recompute

GIB = 2**30
SEVEN_BILLION = ModelSizes(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11_008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=103_168,
    attention_bias=True,
)
RUN = RunSizes(
    seq_len=4096,
    micro_batch_size=2,
    micro_batches=4,
    stages=(tuple(range(32)),),
    data_shard=8,
    param_bytes=2,
    compiled=True,
)
PIPELINE = replace(
    RUN,
    stages=tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(4)),
    stages_of_rank=((0,), (1,), (2,), (3,)),
    data_shard=2,
)


def peak(run: RunSizes, share: float) -> float:
    run = replace(run, recompute=share)
    ranks = range(len(run.stages_of_rank))
    return max(predict_memory(SEVEN_BILLION, run, rank).peak for rank in ranks) / GIB


@pytest.mark.parametrize('run', [RUN, PIPELINE], ids=['one stage', 'four stages'])
def test_the_smallest_share_that_fits(run: RunSizes) -> None:
    layers = len(run.stages[0])
    peaks = [peak(run, number / layers) for number in range(layers + 1)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.2 * peaks[-1]
    for number in range(layers + 1):
        share, why = fit_recompute(SEVEN_BILLION, run, peaks[number] + 1e-6)
        smallest = next(n for n, one in enumerate(peaks) if one <= peaks[number] + 1e-6)
        assert share == smallest / layers
        assert f'{peaks[smallest]:.2f} GiB' in why
    share, why = fit_recompute(SEVEN_BILLION, run, 1000)
    assert share == 0 and why.startswith('0: nothing is recomputed')


def test_why() -> None:
    share, why = fit_recompute(SEVEN_BILLION, RUN, 60)
    layers = round(share * 32)
    assert 0 < layers < 32
    assert why.startswith(f'{share:.4g}: {layers} of 32 layers recompute; ')
    assert f'none would be {peak(RUN, 0):.2f} GiB' in why
    assert f'{peak(RUN, share):.2f} GiB of 60 GiB' in why


def test_what_is_too_little() -> None:
    with pytest.raises(ValueError, match=r'budget_gib=10 is too little.*every layer') as caught:
        fit_recompute(SEVEN_BILLION, RUN, 10)
    assert f'{peak(RUN, 1):.2f} GiB (' in str(caught.value)
    assert "reshard='layer'" in str(caught.value)
    with pytest.raises(ValueError, match=r'GiB on rank \d of the pipeline \('):
        fit_recompute(SEVEN_BILLION, PIPELINE, 10)
