"""Predictions for adapters, pairs and rewards against what real runs hold, as in `test_memory`."""

from dataclasses import replace
from pathlib import Path

import pytest

from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_memory import model_sizes
from internlm_mm.models import InternLM
from internlm_mm.planner.memory import predict_memory
from internlm_mm.planner.sizes import Adapters, RunSizes
from tests.helpers import tiny_config, tiny_runner
from tests.test_planner import test_memory
from tests.test_planner.test_memory import BF16, CONFIG, LAYERS, SEQ, SEVEN_BILLION, SIZES

no_process_group = test_memory.no_process_group
LINEAR = [f'self_attn.{x}_proj' for x in 'qkvo'] + [f'mlp.{x}_proj' for x in ('gate', 'up', 'down')]
ALL = Adapters(
    rank=4, layers=frozenset(f'layers.{n}.{name}' for n in range(LAYERS) for name in LINEAR)
)
LORA = dict(type='LoRA', rank=4, alpha=8.0)
ADAPTERS: dict[str, tuple[Adapters, dict]] = {
    'all': (ALL, LORA),
    'q and v': (
        replace(
            ALL, layers=frozenset(one for one in ALL.layers if one[-6:] in {'q_proj', 'v_proj'})
        ),
        LORA | dict(targets=['q_proj', 'v_proj']),
    ),
    'feed-forward': (
        replace(ALL, layers=frozenset(one for one in ALL.layers if '.mlp.' in one)),
        LORA | dict(targets=['gate_proj', 'up_proj', 'down_proj']),
    ),
    'last layers': (
        replace(ALL, layers=frozenset(one for one in ALL.layers if int(one.split('.')[1]) >= 2)),
        LORA | dict(targets=['layers.[23].*_proj']),
    ),
}
OBJECTIVES = {
    'DPO': (dict(compares_pairs=True), dict(type='DPO', reference='adapters_off', chunk_tokens=64)),
    'reward': (dict(compares_pairs=True, has_head=False), dict(type='PairwiseReward')),
    'SimPO': (dict(compares_pairs=True), dict(type='SimPO', chunk_tokens=64)),
}
SLOW = pytest.mark.slow
PAIRS = dict(type='RandomPairs', vocab_size=256, seq_len=SEQ)
"""Two documents a row."""


def measure(monkeypatch: pytest.MonkeyPatch, what, work_dir: Path, *args, **model):
    """One of `test_memory`'s measurements, of a model that is changed."""
    changes = CONFIG | {'model': CONFIG['model'] | model}
    if 'objective' in model:
        changes |= {'train_dataloader__dataset': PAIRS}
    monkeypatch.setattr(test_memory, 'CONFIG', changes)
    return what(work_dir, *args)


CASES = [
    (1, {}),
    (2, dict(recompute=0.5)),
    (1, BF16),
    (3, BF16),
    (2, BF16 | dict(recompute=0.5)),
    (2, BF16 | dict(reshard='never')),
]


@pytest.mark.parametrize(
    'adapters', ['all', *(pytest.param(name, marks=SLOW) for name in list(ADAPTERS)[1:])]
)
@pytest.mark.parametrize(
    ('micro_batches', 'strategy'),
    [pytest.param(*CASES[0], marks=SLOW), CASES[1], pytest.param(*CASES[2], marks=SLOW), CASES[3]],
)
def test_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: str, micro_batches: int, strategy
) -> None:
    known, model = ADAPTERS[adapters]
    kinds = test_memory.measured_kinds
    found = measure(monkeypatch, kinds, tmp_path, micro_batches, strategy, adapter=model)
    run = test_memory.run_sizes(micro_batches, strategy)
    test_memory.check_kinds(found, run, sizes=replace(SIZES, adapters=known))


@pytest.mark.slow
@pytest.mark.parametrize('adapters', ADAPTERS)
@pytest.mark.parametrize(('micro_batches', 'strategy'), CASES)
def test_peaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: str, micro_batches: int, strategy
) -> None:
    known, model = ADAPTERS[adapters]
    peaks = test_memory.measured_peak
    peak = measure(monkeypatch, peaks, tmp_path, micro_batches, strategy, adapter=model)
    sizes = replace(SIZES, adapters=known)
    found = predict_memory(sizes, test_memory.run_sizes(micro_batches, strategy))
    assert found.peak == pytest.approx(peak, rel=0.05), found.peak_moment


@pytest.mark.slow
@pytest.mark.parametrize(('micro_batches', 'strategy'), [(1, {}), (1, BF16), (3, BF16)])
def test_peaks_of_learnt_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int, strategy: dict
) -> None:
    peaks, model = test_memory.measured_peak, LORA | dict(dora=True)
    peak = measure(monkeypatch, peaks, tmp_path, micro_batches, strategy, adapter=model)
    sizes = replace(SIZES, adapters=replace(ALL, lengths=True))
    found = predict_memory(sizes, test_memory.run_sizes(micro_batches, strategy))
    assert found.peak == pytest.approx(peak, rel=0.05), found.peak_moment


@pytest.mark.slow
@pytest.mark.parametrize(
    ('objective', 'trained'),
    [(name, 'adapters') for name in OBJECTIVES] + [('reward', 'all'), ('SimPO', 'all')],
)
@pytest.mark.parametrize(('micro_batches', 'strategy'), [(1, {}), (2, BF16)])
def test_pairs_and_rewards(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    trained: str,
    micro_batches: int,
    strategy: dict,
) -> None:
    sizes, model = OBJECTIVES[objective]
    changes: dict = dict(objective=model)
    if trained == 'adapters':
        sizes, changes = sizes | dict(adapters=ALL), changes | dict(adapter=LORA)
    args = (tmp_path, micro_batches, strategy)
    peak = measure(monkeypatch, test_memory.measured_peak, *args, **changes)
    run = test_memory.run_sizes(micro_batches, strategy)
    # Documents are told apart by a mask.
    found = predict_memory(replace(SIZES, **sizes), replace(run, mask=run.param_bytes))
    assert found.peak == pytest.approx(peak, rel=0.05), found.peak_moment


def peak_of_adapters(folder: str, strategy: dict) -> int:
    changes = test_memory.changes(3, strategy, 2) | {'model': CONFIG['model'] | {'adapter': LORA}}
    return test_memory.peak_of_runner(tiny_runner(Path(folder), **changes))


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data_shard', 'tensor'])
@pytest.mark.parametrize('reshard', ['step', 'layer', 'never'])
def test_the_peak_of_two_ranks(two_ranks, tmp_path: Path, axis: str, reshard: str) -> None:
    strategy = BF16 | dict(parallel={axis: 2}, reshard=reshard)
    peak, _ = two_ranks(peak_of_adapters, str(tmp_path), strategy)
    micro_batches = 6 if axis == 'tensor' else 3
    run = test_memory.run_sizes(micro_batches, strategy, **{axis: 2})
    found = predict_memory(replace(SIZES, adapters=ALL), run)
    assert found.peak == pytest.approx(peak, rel=0.05), found.peak_moment


def test_a_whole_model_that_was_measured() -> None:
    """LoRA of the 7B on one H100, compiled: 47.6 GiB were allocated at most, torch 2.11.

    The run is in docs/en/performance.md.
    """
    layers = {f'layers.{n}.{name}' for n in range(32) for name in LINEAR}
    run = RunSizes(
        seq_len=4096,
        micro_batch_size=2,
        micro_batches=4,
        stages=(tuple(range(32)),),
        param_bytes=2,
        compiled=True,
        chunk_tokens=4096,
        loss_in_place=True,
    )
    sizes = replace(SEVEN_BILLION, adapters=replace(ALL, rank=16, layers=frozenset(layers)))
    found = predict_memory(sizes, run)
    assert found.peak == pytest.approx(47.6 * 2**30, rel=0.02)
    four = replace(sizes, adapters=replace(sizes.adapters, four_bit=True))
    saved = found.kinds['parameters'] - predict_memory(four, run).kinds['parameters']
    numbers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008)
    assert saved == numbers * 2 - (numbers // 2 + 4 * numbers // 64)


def rehearsed(folder: Path, **changes) -> dict:
    options = dict(
        strategy__precision=BF16['precision'], val_dataloader=None, val_cfg=None, default_hooks={}
    )
    return rehearse(tiny_config(folder, **(options | changes)), 1)


def test_a_rehearsal_and_a_budget(tmp_path: Path) -> None:
    """They find adapters in a model, and take the least recomputation that fits."""
    adapted = {'model__adapter': LORA}
    peaks = [
        rehearsed(tmp_path, **adapted, strategy__recompute=share)['ranks'][0]['memory']['peak']
        for share in (0.0, 0.5)
    ]
    assert peaks[1] < peaks[0] < rehearsed(tmp_path)['ranks'][0]['memory']['peak']
    budget = {'budget_gib': sum(peaks) / 2 / 2**30}
    assert rehearsed(tmp_path, **adapted, strategy__recompute=budget)['techniques'][
        'recompute'
    ] == pytest.approx(0.5)


def test_models_that_are_frozen_otherwise_are_not_known() -> None:
    model = InternLM(**{key: value for key, value in CONFIG['model'].items() if key != 'type'})
    known = model_sizes(model)
    assert known == replace(SIZES, output_bias=True)
    model.embed_tokens.requires_grad_(False)
    assert model_sizes(model) is None
