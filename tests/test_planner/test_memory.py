"""Predictions against what real runs hold: by kind from MemoryHook, peaks by following storages.

Kinds of fixed size must agree to the byte, and so do activations, whose formulas count the tensors
that autograd keeps. Peaks have 5 %: what a layer's backward holds at its fullest is estimated.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from internlm_mm.engine.runner import LLMRunner
from internlm_mm.planner.activations import kept_bytes, loss_bytes
from internlm_mm.planner.memory import KINDS, predict_memory, rank_parameters
from internlm_mm.planner.sizes import ModelSizes, RunSizes
from tests.helpers import tiny_runner
from tests.marks import slow
from tests.test_planner.live_bytes import LiveBytes

LAYERS, SEQ = 4, 128
SIZES = ModelSizes(
    num_layers=LAYERS,
    hidden_size=64,
    intermediate_size=176,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=256,
    attention_bias=True,
)
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
CONFIG = dict(
    model=dict(
        type='InternLM',
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_layers=LAYERS,
        num_heads=4,
        max_seq_len=SEQ,
        objective=dict(type='NextToken', chunk_tokens=64),
    ),
    train_dataloader__dataset=dict(type='RandomTokens', vocab_size=256, seq_len=SEQ),
    train_cfg__max_iters=3,
    val_dataloader=None,
    val_cfg=None,
    default_hooks={},
    log_level='ERROR',
)
OTHERS: dict[str, tuple[ModelSizes, dict]] = {
    'tied': (
        replace(SIZES, attention_bias=False, tie_word_embeddings=True),
        dict(type='Llama', tie_word_embeddings=True),
    ),
    'Qwen2': (replace(SIZES, num_kv_heads=2, output_bias=False), dict(type='Qwen2')),
    'Qwen3': (
        replace(
            SIZES, num_kv_heads=2, attention_bias=False, qk_norm=True, tie_word_embeddings=True
        ),
        dict(type='Qwen3', tie_word_embeddings=True),
    ),
}
BF16 = dict(precision=dict(param='bfloat16', reduce='float32'))
BYTES = {'float32': 4, 'bfloat16': 2}


def changes(micro_batches: int, strategy: dict, data: int = 1, other: str | None = None) -> dict:
    rows: dict = {'train_cfg__global_batch_size': 2 * micro_batches * data}
    if other is not None:
        sizes, model = OTHERS[other]
        rows['model'] = CONFIG['model'] | model
        if model['type'] != 'Llama':
            rows['model']['num_kv_heads'] = sizes.num_kv_heads
    return CONFIG | rows | {f'strategy__{key}': value for key, value in strategy.items()}


def run_sizes(micro_batches: int, strategy: dict, **options) -> RunSizes:
    options = {key: strategy[key] for key in ('recompute', 'reshard') if key in strategy} | options
    precision = strategy.get('precision', dict(param='float32', reduce='float32'))
    return RunSizes(
        seq_len=SEQ,
        micro_batch_size=2,
        micro_batches=micro_batches,
        param_bytes=BYTES[precision['param']],
        reduce_bytes=BYTES[precision['reduce']],
        chunk_tokens=64,
        **(dict(sharded='precision' in strategy, stages=(tuple(range(LAYERS)),)) | options),
    )


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def measured_kinds(
    work_dir: Path, micro_batches: int, strategy: dict, data: int = 1, other: str | None = None
) -> dict:
    hook = dict(type='MemoryHook', at_iter=1)
    options = changes(micro_batches, strategy, data, other)
    tiny_runner(work_dir, custom_hooks=[hook], **options).train()
    (file,) = work_dir.glob('*/memory_rank0.json')
    return json.loads(file.read_text())['bytes']


def check_kinds(
    found: dict, run: RunSizes, activations: float = 0.0, sizes: ModelSizes = SIZES
) -> None:
    prediction = predict_memory(sizes, run)
    for kind in ('parameters', 'gradients', 'optimizer'):
        assert found[kind] == prediction.kinds[kind], kind
    after_forward = prediction.moments['loss, forward']
    for kind in ('gathered_parameters', 'gathered_gradients'):
        assert found[kind] == after_forward[kind], kind
    kept = kept_bytes(sizes, run, range(LAYERS), True, True) + loss_bytes(sizes, run)
    assert found['activations'] == pytest.approx(kept, rel=activations)


CASES = [
    (1, {}),
    (3, {}),
    (2, dict(recompute=0.5)),
    (2, dict(recompute=1.0)),
    (1, BF16),
    (2, BF16),
    (3, BF16 | dict(recompute=0.5)),
    (1, BF16 | dict(recompute=1.0)),
    (2, BF16 | dict(reshard='layer')),
    (2, BF16 | dict(precision=dict(param='bfloat16', reduce='bfloat16'))),
]


@pytest.mark.parametrize(('micro_batches', 'strategy'), CASES)
def test_kinds_of_one_process(tmp_path: Path, micro_batches: int, strategy: dict) -> None:
    found = measured_kinds(tmp_path, micro_batches, strategy)
    check_kinds(found, run_sizes(micro_batches, strategy))


@pytest.mark.parametrize('strategy', [{}, slow(BF16), dict(recompute=0.5)], ids=str)
@pytest.mark.parametrize('other', OTHERS)
def test_kinds_of_other_families(tmp_path: Path, other: str, strategy: dict) -> None:
    found = measured_kinds(tmp_path, 2, strategy, other=other)
    check_kinds(found, run_sizes(2, strategy), sizes=OTHERS[other][0])


def measured_peak(
    work_dir: Path, micro_batches: int, strategy: dict, data: int = 1, other: str | None = None
) -> int:
    return peak_of_runner(tiny_runner(work_dir, **changes(micro_batches, strategy, data, other)))


def peak_of_runner(runner: LLMRunner) -> int:
    runner.prepare_training()
    steps = runner.train_loop.begin()
    runner.train_loop.run_next(steps)  # the first step also makes the optimizer's state
    with LiveBytes() as live:
        for parameter in runner.model.parameters():
            live.follow(parameter.data)
        for state in runner.optim_wrapper.optimizer.state.values():
            for moment in state.values():
                live.follow(moment)
        runner.train_loop.run_next(steps)
    return live.peak


@pytest.mark.parametrize(('micro_batches', 'strategy'), CASES)
def test_the_peak_of_one_process(tmp_path: Path, micro_batches: int, strategy: dict) -> None:
    prediction = predict_memory(SIZES, run_sizes(micro_batches, strategy))
    peak = measured_peak(tmp_path, micro_batches, strategy)
    assert prediction.peak == pytest.approx(peak, rel=0.05), prediction.peak_moment


@pytest.mark.parametrize(('micro_batches', 'strategy'), [(2, {}), (1, BF16), slow(3, BF16)])
def test_the_peak_with_products_kept(tmp_path: Path, micro_batches: int, strategy: dict) -> None:
    selective = dict(recompute=1.0, selective=True)
    prediction = predict_memory(SIZES, run_sizes(micro_batches, strategy, **selective))
    peak = measured_peak(tmp_path, micro_batches, strategy | dict(recompute='selective'))
    assert prediction.peak == pytest.approx(peak, rel=0.05), prediction.peak_moment


@pytest.mark.parametrize(('micro_batches', 'strategy'), [slow(1, {}), (1, BF16), slow(3, BF16)])
@pytest.mark.parametrize('other', OTHERS)
def test_the_peak_of_other_families(
    tmp_path: Path, other: str, micro_batches: int, strategy: dict
) -> None:
    prediction = predict_memory(OTHERS[other][0], run_sizes(micro_batches, strategy))
    peak = measured_peak(tmp_path, micro_batches, strategy, other=other)
    assert prediction.peak == pytest.approx(peak, rel=0.05), prediction.peak_moment


def peak_on_a_rank(work_dir: str, micro_batches: int, strategy: dict, data: int) -> int:
    return measured_peak(Path(work_dir), micro_batches, strategy, data)


@pytest.mark.parametrize(
    ('axis', 'options', 'micro_batches'),
    [
        slow('data_shard', {}, 1),
        ('data_shard', {}, 3),
        slow('data_shard', dict(reshard='layer'), 3),
        ('data_replicate', {}, 1),
        slow('tensor', {}, 3),
        ('context', dict(mask=2), 3),
    ],
)
def test_the_peak_of_two_ranks(
    two_ranks, tmp_path: Path, axis: str, options: dict, micro_batches: int
) -> None:
    strategy = BF16 | dict(parallel={axis: 2})
    strategy |= {key: value for key, value in options.items() if key != 'mask'}
    data = 2 if axis.startswith('data') else 1
    peak, _ = two_ranks(peak_on_a_rank, str(tmp_path), micro_batches, strategy, data)
    run = run_sizes(micro_batches, strategy, **{axis: 2}, **options)
    assert predict_memory(SIZES, run).peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ('schedule', 'stages_of_rank', 'micro_batches'),
    [
        slow('gpipe', ((0,), (1,)), 4),
        ('1f1b', ((0,), (1,)), 4),
        ('interleaved_1f1b', ((0, 2), (1, 3)), 4),
        slow('interleaved_1f1b', ((0, 2), (1, 3)), 8),
        slow('interleaved_zero_bubble', ((0, 2), (1, 3)), 8),
        slow('zbv_zero_bubble', ((0, 3), (1, 2)), 8),
    ],
)
def test_the_peaks_of_a_pipeline(
    two_ranks, tmp_path: Path, schedule: str, stages_of_rank: tuple, micro_batches: int
) -> None:
    stages = [stage for held in stages_of_rank for stage in held]
    share = LAYERS // len(stages)
    pipeline = dict(schedule=schedule, stages_per_rank=len(stages_of_rank[0]))
    strategy = BF16 | dict(parallel=dict(pipeline=2), pipeline=pipeline)
    peaks = two_ranks(peak_on_a_rank, str(tmp_path), micro_batches, strategy, 1)
    run = run_sizes(
        micro_batches,
        BF16,
        schedule=schedule,
        stages=tuple(
            tuple(range(stage * share, (stage + 1) * share)) for stage in range(len(stages))
        ),
        stages_of_rank=stages_of_rank,
    )
    for rank in (0, 1):
        assert predict_memory(SIZES, run, rank).peak == pytest.approx(peaks[rank], rel=0.05)


def measure_on_a_rank(work_dir: str, micro_batches: int, strategy: dict, data: int) -> dict | None:
    if dist.get_rank() == 0:
        return measured_kinds(Path(work_dir), micro_batches, strategy, data)
    hook = dict(type='MemoryHook', at_iter=1)
    options = changes(micro_batches, strategy, data)
    tiny_runner(Path(work_dir), custom_hooks=[hook], **options).train()
    return None


@pytest.mark.parametrize('reshard', ['step', 'layer'])
def test_kinds_of_two_ranks_that_share(two_ranks, tmp_path: Path, reshard: str) -> None:
    strategy = dict(parallel=dict(data_shard=2), reshard=reshard, **BF16)
    found, _ = two_ranks(measure_on_a_rank, str(tmp_path), 2, strategy, 2)
    check_kinds(found, run_sizes(2, strategy, data_shard=2))


@pytest.mark.parametrize('axis', [slow('tensor'), 'context'])
def test_kinds_of_two_ranks_that_share_a_row(two_ranks, tmp_path: Path, axis: str) -> None:
    """DTensor's way through a model keeps some small tensors more; hence a tolerance."""
    strategy = dict(parallel={axis: 2}, **BF16)
    found, _ = two_ranks(measure_on_a_rank, str(tmp_path), 2, strategy, 1)
    mask = dict(mask=2) if axis == 'context' else {}
    check_kinds(found, run_sizes(2, strategy, **{axis: 2}, **mask), activations=0.1)


def test_every_moment_has_every_kind() -> None:
    prediction = predict_memory(SIZES, run_sizes(2, BF16, data_shard=8))
    assert all(set(found) == set(KINDS) for found in prediction.moments.values())
    assert prediction.peak == sum(prediction.moments[prediction.peak_moment].values())


def pipelined(**changes) -> RunSizes:
    stages = tuple((2 * i, 2 * i + 1) for i in range(LAYERS // 2))
    options = dict(stages=stages, stages_of_rank=((0,), (1,)), sharded=True) | changes
    return run_sizes(4, BF16, **options)


def test_pipeline_ranks_share_the_model() -> None:
    names = [{one.name for one in rank_parameters(SIZES, pipelined(), rank)} for rank in (0, 1)]
    assert not names[0] & names[1]
    whole = {one.name for one in rank_parameters(SIZES, run_sizes(1, {}), 0)}
    assert names[0] | names[1] == whole
    first, last = (predict_memory(SIZES, pipelined(), rank) for rank in (0, 1))
    assert first.kinds['logits'] == 0 < last.kinds['logits']
    # Two micro-batches are on their way on the first of two ranks, one on the last.
    assert first.kinds['activations'] > 1.5 * last.kinds['activations']


def test_offloading_empties_the_device() -> None:
    here = predict_memory(SIZES, run_sizes(2, BF16))
    away = predict_memory(SIZES, run_sizes(2, BF16, offload=True))
    states = ('parameters', 'optimizer', 'gradients')
    assert all(away.kinds[kind] == 0 for kind in states)
    assert (here.host, away.host) == (0, sum(here.kinds[kind] for kind in states))
    assert away.peak < here.peak
    assert away.kinds['activations'] == here.kinds['activations']


def test_a_whole_model_that_was_measured() -> None:
    """16 layers of the 7B on one H200, compiled: 88.1 GiB were allocated at most, torch 2.11.

    The run is the first of docs/en/performance.md; 2 % are for what the count leaves out.
    """
    sizes = replace(SEVEN_BILLION, num_layers=16)
    run = RunSizes(
        seq_len=4096,
        micro_batch_size=2,
        micro_batches=8,
        stages=(tuple(range(16)),),
        param_bytes=2,
        compiled=True,
    )
    assert predict_memory(sizes, run).peak == pytest.approx(88.1 * 2**30, rel=0.02)


def test_the_sizes_that_internlm_published() -> None:
    """InternLM's profiler page, 7B sharded over 8: 13965.51 MiB of bf16 parameters on every rank.

    Its fp32 masters were 3461.52 MiB and Adam's state 6923.03 MiB on a rank with a little less than
    an eighth, since it dealt out whole tensors.
    """
    run = RunSizes(
        seq_len=2048,
        micro_batch_size=2,
        micro_batches=4,
        stages=(tuple(range(32)),),
        data_shard=8,
        param_bytes=2,
    )
    kinds = predict_memory(SEVEN_BILLION, run).kinds
    assert round(kinds['gathered_parameters'] / 2**20, 2) == 13965.51
    assert kinds['parameters'] / 2**20 == pytest.approx(3461.52, rel=0.01)
    assert kinds['optimizer'] / 2**20 == pytest.approx(6923.03, rel=0.01)


IN_8_BITS = frozenset(
    one.name for one in rank_parameters(SIZES, run_sizes(1, BF16), 0) if '_proj.weight' in one.name
)


@pytest.mark.parametrize('reshard', ['step', 'layer', 'never'])
@pytest.mark.parametrize('micro_batches', [1, 3])
def test_weights_that_are_gathered_in_8_bits(reshard: str, micro_batches: int) -> None:
    """Each of their numbers takes one byte in place of two; nothing else changes."""
    layer = 4 * 64 * 64 + 3 * 64 * 176
    held = (2 if reshard == 'layer' else LAYERS) * layer
    wide = run_sizes(micro_batches, BF16, reshard=reshard)
    kinds, narrow = (
        predict_memory(SIZES, run).kinds for run in (wide, replace(wide, in_8_bits=IN_8_BITS))
    )
    assert kinds['gathered_parameters'] - narrow['gathered_parameters'] == held
    fixed = set(KINDS) - {'gathered_parameters', 'buffers'}
    assert {key: kinds[key] for key in fixed} == {key: narrow[key] for key in fixed}


@pytest.mark.skipif(importlib.util.find_spec('torchao') is None, reason='torchao is not installed')
@pytest.mark.filterwarnings('ignore')
def test_what_is_gathered_in_8_bits(tmp_path: Path) -> None:
    found = measured_kinds(tmp_path, 3, BF16 | dict(float8=dict(emulate=True)))
    run = run_sizes(3, BF16, in_8_bits=IN_8_BITS)
    predicted = predict_memory(SIZES, run).kinds['gathered_parameters']
    # Each shares the scales of all, four bytes each.
    scales = 4 * len(IN_8_BITS) ** 2
    assert found['gathered_parameters'] - predicted == scales
