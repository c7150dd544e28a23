"""What ranks hold, against what a run really holds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internlm_mm.engine import held
from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.held import Held, beyond_this_machine, held_bytes
from internlm_mm.optim import CompactAdamW, MuonAdamW
from internlm_mm.parallel.adapters import left_whole
from internlm_mm.parallel.mesh import Layout
from internlm_mm.registry import MODELS
from tests.helpers import tiny_config, tiny_runner

FEW = dict(train_cfg__max_iters=1, val_dataloader=None, val_cfg=None, default_hooks={})
WIDE = dict(model__hidden_size=128, model__intermediate_size=128)  # blocks of 8 bits need it
ADAPTED = dict(model__adapter__rank=4, strategy__precision=dict(param='bfloat16'))
OPTIMIZERS = {
    'AdamW': dict(type='AdamW', lr=1e-3),
    'SGD': dict(type='SGD', lr=1e-3, momentum=0.9),
    'bfloat16': dict(type=CompactAdamW, lr=1e-3),
    'int8': dict(type=CompactAdamW, lr=1e-3, state_dtype='int8'),
    'Muon': dict(type=MuonAdamW, lr=1e-3),
}
LEAN = {name: dict(type=name, lr=1e-3) for name in ('RMSprop', 'Adagrad')}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On machines with GPUs, too, since those have memory of their own."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('changes', [WIDE, ADAPTED], ids=['all', 'adapters'])
def test_against_a_run(tmp_path: Path, name: str, changes: dict) -> None:
    options = FEW | changes | dict(optim_wrapper__optimizer=OPTIMIZERS[name])
    runner = tiny_runner(tmp_path, **options)
    runner.train()
    parameters = [p for p in runner.model.parameters() if p.requires_grad]
    state = runner.optim_wrapper.optimizer.state.values()
    kept = [x for one in state for x in one.values() if torch.is_tensor(x) and x.numel() > 1]
    whole = [x.full_tensor() if hasattr(x, 'full_tensor') else x for x in (*parameters, *kept)]
    frozen = [p for p in runner.model.parameters() if not p.requires_grad]
    with torch.device('meta'):
        model = MODELS.build(tiny_config(tmp_path, **options).model)
    strategy = runner.strategy.techniques
    found = held_bytes(
        model,
        Layout(),
        strategy.param_dtype,
        strategy.reduce_dtype,
        optimizer=held.unplaced_optimizer(
            dict(tiny_config(tmp_path, **options).optim_wrapper), model
        ),
    )
    assert found.states == sum(x.numel() * x.element_size() for x in whole)
    assert found.gradients == 4 * sum(p.numel() for p in parameters)
    itemsize = strategy.param_dtype.itemsize
    assert found.frozen == itemsize * sum(p.numel() for p in frozen)
    assert found.gathered == 0


def test_ranks_share_it(tmp_path: Path) -> None:
    with torch.device('meta'):
        model = MODELS.build(tiny_config(tmp_path).model)
    total = sum(p.numel() for p in model.parameters())
    layout = Layout(data_shard=2, context=2, tensor=2, data_replicate=3)
    found = held_bytes(model, layout, torch.bfloat16, torch.float32)
    assert found == Held(total * 4 / 8, 0.0, 0.0, total * 2 / 2)


@pytest.mark.parametrize('reshard', ['step', 'never'])
@pytest.mark.parametrize('offload', [False, True])
def test_frozen_weights_are_whole_where_sharding_leaves_them(
    tmp_path: Path, reshard: str, offload: bool
) -> None:
    with torch.device('meta'):
        model = MODELS.build(tiny_config(tmp_path, model__adapter__rank=4).model)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    alone = left_whole(model, 4, reshard, offload)
    assert alone in (set(), frozen)
    found = held_bytes(
        model,
        Layout(data_shard=4),
        torch.bfloat16,
        torch.float32,
        reshard=reshard,
        offload=offload,
    )
    assert found.frozen == 2 * sum(p.numel() for p in frozen) / (1 if alone else 4)


def test_what_no_memory_holds_is_refused_before_weights_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FEW | dict(optim_wrapper__optimizer=OPTIMIZERS['AdamW'])
    with torch.device('meta'):
        model = MODELS.build(tiny_config(tmp_path).model)
    needed = 16 * sum(p.numel() for p in model.parameters())
    for memory, is_enough in ((needed, True), (needed - 1, False), (None, True)):
        monkeypatch.setattr(held, 'total_memory', lambda memory=memory: memory)
        text = dry_run(tiny_config(tmp_path, **options))
        told = 'on this machine alone it would be refused: weights, gradients'
        assert (told in text) is not is_enough
        assert ('everything fits together' in text) is is_enough
        runner = tiny_runner(tmp_path / str(memory), **options)
        if is_enough:
            runner.train()
            continue
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r'one process take'):
            patch.setattr('internlm_mm.parallel.place.initialize_parameters', None)
            runner.train()


def test_smaller_optimizers_fit_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reckoned is this optimizer's state, not AdamW's."""
    with torch.device('meta'):
        model = MODELS.build(tiny_config(tmp_path, **WIDE).model)
    numbers = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(held, 'total_memory', lambda: 13 * numbers)
    for name, fits in {
        'AdamW': False,
        'bfloat16': True,
        'SGD': True,
        'RMSprop': True,  # 12 bytes a number, as Adagrad
        'Adagrad': True,
    }.items():
        options = FEW | WIDE | dict(optim_wrapper__optimizer=(OPTIMIZERS | LEAN)[name])
        assert ('it would be refused' not in dry_run(tiny_config(tmp_path, **options))) is fits
        if fits:
            tiny_runner(tmp_path / name, **options).train()


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, 'total_memory', lambda: 100)
    one = Held(60.0, 20.0, 10.0, 1000.0)
    assert beyond_this_machine(one, 8, is_on_host=False) is None
    assert beyond_this_machine(one, 1, is_on_host=True) is None
    assert 'of 2 processes take' in str(beyond_this_machine(one, 2, is_on_host=True))
