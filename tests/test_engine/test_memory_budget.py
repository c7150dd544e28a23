"""A budget in a config, in a run and in a rehearsal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_report import render
from internlm_mm.models import InternLM
from internlm_mm.utils.config_reader import ConfigError
from tests.helpers import tiny_config, tiny_runner
from tests.marks import slow

BF16 = dict(param='bfloat16', reduce='float32')
CHANGES = dict(
    model__num_layers=4,
    train_cfg__global_batch_size=8,
    train_cfg__micro_batch_size=4,
    train_cfg__max_iters=2,
    val_dataloader=None,
    val_cfg=None,
    default_hooks={},
    strategy__precision=BF16,
)
GIB = 2**30


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_of(folder: Path, recompute: float, gpus: int, **changes) -> float:
    """GiB that a rehearsal predicts."""
    options = CHANGES | changes | {'strategy__recompute': recompute}
    report = rehearse(tiny_config(folder, **options), gpus)
    return max(rank['memory']['peak'] for rank in report['ranks']) / GIB


def settled(folder: str, budget: float, **changes) -> tuple[float, list[bool]]:
    """The share that a run takes, and which layers recompute."""
    runner = tiny_runner(
        Path(folder), **(CHANGES | changes | {'strategy__recompute': {'budget_gib': budget}})
    )
    runner.train()
    layers = [layer for part in runner.strategy.parts for layer in part.layers.values()]
    return runner.strategy.techniques.recompute, ['forward' in vars(one) for one in layers]


def test_a_run_takes_the_smallest_share_that_fits(tmp_path: Path) -> None:
    peaks = [peak_of(tmp_path, number / 4, 1) for number in range(5)]
    assert peaks[0] > peaks[2] > peaks[4]
    between = (peaks[1] + peaks[2]) / 2
    share, chosen = settled(str(tmp_path / 'run'), between)
    assert share == 0.5
    assert chosen == [True, True, False, False]
    (log,) = (tmp_path / 'run').glob('*/*.log')
    assert f'recompute 0.5: 2 of 4 layers recompute; {peaks[2]:.2f} GiB of' in log.read_text()


@pytest.mark.parametrize('axis', ['data_shard', slow('tensor'), slow('context'), 'pipeline'])
def test_ranks_and_a_rehearsal_agree(two_ranks, tmp_path: Path, axis: str) -> None:
    layout = {'strategy__parallel': {axis: 2}}
    shares = [number / 4 for number in range(0, 5, 2 if axis == 'pipeline' else 1)]
    peaks = [peak_of(tmp_path, share, 2, **layout) for share in shares]
    assert peaks[0] > peaks[1]
    budget = (peaks[0] + peaks[1]) / 2
    found = two_ranks(settled, str(tmp_path / 'run'), budget, **layout)
    options = CHANGES | layout | {'strategy__recompute': {'budget_gib': budget}}
    report = rehearse(tiny_config(tmp_path, **options), 2)
    assert {share for share, _ in found} == {report['techniques']['recompute']} == {shares[1]}
    assert all(any(chosen) and not all(chosen) for _, chosen in found)
    assert max(rank['memory']['peak'] for rank in report['ranks']) / GIB == peaks[1]
    assert f'recompute  {shares[1]:.4g}: ' in render(report)


def test_a_budget_that_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'budget_gib=1e-05 is too little.*optimizer'):
        settled(str(tmp_path), 1e-5)
    dist.destroy_process_group()
    options = CHANGES | {'strategy__recompute': {'budget_gib': 1e-5}}
    with pytest.raises(ValueError, match='is too little'):
        rehearse(tiny_config(tmp_path, **options), 1)


def test_a_model_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('internlm_mm.engine.memory_budget.model_sizes', lambda model: None)
    with pytest.raises(ValueError, match='InternLM is no decoder of the sizes'):
        settled(str(tmp_path), 1.0)


def test_evaluation_recomputes_nothing(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, strategy__recompute={'budget_gib': 1e-5})
    assert runner.val()
    assert runner.strategy.techniques.recompute == 0.0


def test_selective_is_told_to_the_planner(tmp_path: Path) -> None:
    options = CHANGES | {'strategy__recompute': 'selective'}
    report = rehearse(tiny_config(tmp_path, **options), 1)
    found = report['ranks'][0]['memory']['peak'] / GIB
    assert peak_of(tmp_path, 1.0, 1) < found < peak_of(tmp_path, 0.0, 1)
    assert 'recompute=selective' in render(report)


def test_dry_run_takes_every_form(tmp_path: Path) -> None:
    for recompute in ({'budget_gib': 1.0}, 'selective', 0.5):
        text = dry_run(tiny_config(tmp_path, strategy__recompute=recompute))
        assert ('all else' if isinstance(recompute, dict) else 'everything') + ' fits' in text
    with pytest.raises((ValueError, ConfigError), match='budget_gb=1'):
        dry_run(tiny_config(tmp_path, strategy__recompute={'budget_gb': 1}))


@pytest.mark.parametrize('form', ['budget', 'selective'])
def test_training_is_the_same(tmp_path: Path, form: str) -> None:
    """Whatever is recomputed, in float64."""
    wide = {'strategy__precision': dict(param='float64', reduce='float64')}
    recompute = form if form == 'selective' else {'budget_gib': peak_of(tmp_path, 0.5, 1, **wide)}
    weights = []
    for number, one in enumerate((0.0, recompute)):
        options = CHANGES | wide | {'strategy__recompute': one}
        runner = tiny_runner(tmp_path / str(number), **options)
        weights.append(dict(runner.train().named_parameters()))
    assert runner.strategy.techniques.recompute == (0.5 if form == 'budget' else form)
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


class FrozenTable(InternLM):
    """Trains all but the embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.embed_tokens.requires_grad_(False)


def test_frozen_weights_are_told_of(tmp_path: Path) -> None:
    options = dict(model__type=FrozenTable, strategy__recompute__budget_gib=10)
    with pytest.raises(ValueError, match='has frozen weights, which the planner does not reckon'):
        tiny_runner(tmp_path, **options).prepare_training()
