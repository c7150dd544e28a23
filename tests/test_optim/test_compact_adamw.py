"""Moments in few bits against torch's AdamW, the same on every layout and after a resume."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import AdamW

from internlm_mm.checkpoint.storage import StoredTensors
from internlm_mm.optim import CompactAdamW
from internlm_mm.optim.compact_adamw import block_of
from internlm_mm.utils.shards import local_tensor, part_of
from tests.helpers import tiny_runner
from tests.marks import slow

DTYPES = ['bfloat16', 'int8']
OPTIONS = dict(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize('state_dtype', DTYPES)
def test_a_slow_average_still_moves(state_dtype: str) -> None:
    """beta2 = 0.999 changes the second moment by 0.1 % a step, less than half a unit of bf16."""
    weight = nn.Parameter(torch.ones(16, 128))
    optimizer = CompactAdamW([weight], lr=0.0, betas=(0.9, 0.999), state_dtype=state_dtype)
    exact = nearest = torch.zeros(16, 128)
    for step in range(2500):
        weight.grad = (1.0 if step < 1500 else 0.1) * (1 + 0.1 * torch.randn(16, 128))
        square = weight.grad.square()
        exact = exact.lerp(square, 1e-3)
        nearest = nearest.lerp(square, 1e-3).bfloat16().float()
        optimizer.step()
    state = optimizer.state[weight]
    found = state['exp_avg_sq'].float()
    if state_dtype == 'int8':
        scale = state['exp_avg_sq_scale'].repeat_interleave(16, dim=-1)
        found = ((found / 255).square() * scale).square()
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.01)
    assert nearest.mean() > 1.3 * exact.mean()  # what rounding to the nearest makes of it


# ---------------------------------------------------------------------------------- training


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.LayerNorm(256), nn.Linear(256, 32))


def losses(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """A regression on a fixed linear map."""
    generator = torch.Generator().manual_seed(8)
    target = torch.randn(128, 32, generator=generator) / 11
    found = []
    for _ in range(steps):
        rows = torch.randn(64, 128, generator=generator)
        loss = (module(rows) - rows @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(('state_dtype', 'far'), [('bfloat16', 0.02), ('int8', 0.08)])
def test_trains_as_adamw_does(state_dtype: str, far: float) -> None:
    ours, theirs = network(), network()
    start = torch.cat([p.detach().flatten() for p in theirs.parameters()])
    found = losses(ours, CompactAdamW(ours.parameters(), state_dtype=state_dtype, **OPTIONS), 200)
    expected = losses(theirs, AdamW(theirs.parameters(), **OPTIONS), 200)
    assert expected[-1] < 0.5 * expected[0]
    mean, wanted = sum(found[-20:]), sum(expected[-20:])
    assert mean == pytest.approx(wanted, rel=0.02)
    moved, should = (
        torch.cat([p.detach().flatten() for p in one.parameters()]) - start
        for one in (ours, theirs)
    )
    # 8 bits round each moment by 3 % or so at random: enough for two paths to part a little.
    assert (moved - should).norm() < far * should.norm()


def test_what_is_not_compact_is_adamw() -> None:
    """Norms and biases; and a matrix whose rows no block divides."""
    ours, theirs = (nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        CompactAdamW(ours.parameters(), state_dtype='int8', **OPTIONS),
        AdamW(theirs.parameters(), eps=1e-8, **OPTIONS),
    ]
    for _ in range(5):
        rows = torch.randn(4, 5, dtype=torch.float64)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            (module(rows) ** 3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('state_dtype', DTYPES)
def test_rows_at_once_change_no_bit(monkeypatch: pytest.MonkeyPatch, state_dtype: str) -> None:
    """Rows of a matrix in parts that do not divide them, single rows that are longer, a scalar."""
    found = []
    for numbers in (10**9, 300):
        monkeypatch.setattr('internlm_mm.optim.compact_update.AT_ONCE', numbers)
        draws = torch.Generator().manual_seed(1)
        shapes = [(7, 128), (3, 2, 512), (1000,), ()]
        weights = [nn.Parameter(torch.randn(shape, generator=draws)) for shape in shapes]
        optimizer = CompactAdamW(weights, state_dtype=state_dtype, **OPTIONS)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draws)
            optimizer.step()
        states = [value for weight in weights for value in optimizer.state[weight].values()]
        found.append([weight.detach() for weight in weights] + states)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(('state_dtype', 'size'), [('bfloat16', 2.0), ('int8', 1.0625)])
def test_what_it_takes(state_dtype: str, size: float) -> None:
    weight = nn.Parameter(torch.zeros(8, 512))
    weight.grad = torch.ones_like(weight)
    optimizer = CompactAdamW([weight], state_dtype=state_dtype)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[weight].values())
    assert held == 2 * size * weight.numel() + 4


@pytest.mark.parametrize(
    ('columns', 'block'), [(4096, 64), (128, 16), (64, 0), (1028, 0), (11008, 32)]
)
def test_blocks_divide_rows(columns: int, block: int) -> None:
    assert block_of(columns) == block


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'state_dtype': 'bf16'}, r"^optim_wrapper\.optimizer\.state_dtype='bf16'.*'bfloat16'"),
        ({'lr': -1.0}, r'^optim_wrapper\.optimizer\.lr=-1\.0 must not be negative$'),
        ({'eps': -1.0}, r'^optim_wrapper\.optimizer\.eps=-1\.0 must not be negative$'),
        ({'betas': (0.9, 1.0)}, r'^optim_wrapper\.optimizer\.betas=\(0\.9, 1\.0\): each must'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactAdamW([nn.Parameter(torch.zeros(2))], **options)


# ----------------------------------------------------------------------------------- layouts


def wholes(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in ((5, 256), (6, 128), (7,))]


def cut(whole: Tensor, mesh_shape: tuple[int, ...], placements: tuple) -> DTensor:
    mesh = init_device_mesh('cpu', mesh_shape)
    part = part_of(tuple(whole.shape), placements, mesh_shape, tuple(mesh.get_coordinate()))
    local = whole[part.slices].clone()
    options = dict(run_check=False, shape=whole.shape, stride=whole.stride())
    return DTensor.from_local(local, mesh, placements, **options)


def same_on_ranks(state_dtype: str, placements: tuple) -> bool:
    """Whether this rank's part is to the last bit what one process has there."""
    mesh_shape = (2,) if len(placements) == 1 else (1, 2)
    own, alone = [], []
    for value in wholes(0):
        used = tuple(Replicate() if value.ndim < 2 and p == Shard(1) else p for p in placements)
        own.append((nn.Parameter(cut(value, mesh_shape, used)), used))
        alone.append(nn.Parameter(value))
    sharded = CompactAdamW([p for p, _ in own], state_dtype=state_dtype, **OPTIONS)
    single = CompactAdamW(alone, state_dtype=state_dtype, **OPTIONS)
    for step in range(1, 6):
        for (p, used), q, value in zip(own, alone, wholes(step), strict=True):
            p.grad, q.grad = cut(value, mesh_shape, used), value
        sharded.step()
        single.step()
    place = tuple(init_device_mesh('cpu', mesh_shape).get_coordinate())
    right = True
    for (p, used), q in zip(own, alone, strict=True):
        states = [(p.detach(), q.detach())]
        states += [(sharded.state[p][kind], value) for kind, value in single.state[q].items()]
        for here, whole in states:
            if whole.ndim:
                whole = whole[part_of(tuple(whole.shape), used, mesh_shape, place).slices]
            right &= torch.equal(local_tensor(here).float(), whole.float())
    return right


@pytest.mark.parametrize('state_dtype', DTYPES)
@pytest.mark.parametrize(
    'placements',
    [(Shard(0),), (Replicate(),), (Shard(1),), (_StridedShard(0, split_factor=2), Shard(0))],
    ids=str,
)
def test_every_layout_has_the_same_bits(two_ranks, state_dtype: str, placements: tuple) -> None:
    assert two_ranks(same_on_ranks, state_dtype, placements) == [True, True]


@pytest.mark.parametrize('state_dtype', DTYPES)
def test_moments_are_made_where_weights_are(state_dtype: str) -> None:
    """Offloaded: from a mesh's device nothing comes to host memory, least of all from 'meta'."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    mesh = DeviceMesh('meta', [0])
    options = dict(run_check=False, shape=torch.Size((4, 100)), stride=(100, 1))
    there = DTensor.from_local(torch.zeros(4, 100), mesh, (Shard(0),), **options)
    weight, gradient = (torch.ones_like(there, device='cpu') for _ in range(2))
    weight = nn.Parameter(weight)
    weight.grad = gradient
    optimizer = CompactAdamW([weight], state_dtype=state_dtype)
    optimizer.step()
    for kind in ('exp_avg', 'exp_avg_sq'):
        moment = optimizer.state[weight][kind]
        assert (moment.shape, moment.placements) == (weight.shape, weight.placements)
        assert local_tensor(moment).device.type == 'cpu'
        assert (local_tensor(moment) > 0).all()


def blocks_cut() -> str:
    mesh = init_device_mesh('cpu', (2,))
    # As if two of 16 ranks were here.
    options = dict(run_check=False, shape=torch.Size((4, 128)), stride=(128, 1))
    weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 8), mesh, (Shard(1),), **options))
    try:
        CompactAdamW([weight], state_dtype='int8')
    except ValueError as error:
        return str(error)
    return ''


def test_blocks_that_tensor_parallelism_would_cut(two_ranks) -> None:
    for message in two_ranks(blocks_cut):
        assert 'rows of 128 numbers into parts of 8, which blocks of 16 do not fill' in message


# ------------------------------------------------------------------------------- checkpoints

CHANGES = dict(
    val_dataloader=None,
    val_cfg=None,
    default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=3),
    model__hidden_size=128,
    model__intermediate_size=256,
)


def changes(state_dtype: str | None) -> dict:
    optimizer = dict(type='AdamW', lr=1e-2)
    if state_dtype is not None:
        optimizer = dict(type='CompactAdamW', lr=1e-2, state_dtype=state_dtype)
    return CHANGES | dict(optim_wrapper__optimizer=optimizer)


def run(folder: str, state_dtype: str | None, **options) -> tuple[dict, dict]:
    """Weights and state, this rank's parts."""
    runner = tiny_runner(Path(folder), **changes(state_dtype), **options)
    runner.train()
    named = dict(runner.model.named_parameters())
    state = {
        f'optimizer.{name}.{kind}': local_tensor(value)
        for name, p in named.items()
        for kind, value in runner.optim_wrapper.optimizer.state[p].items()
    }
    return {name: local_tensor(p.detach()) for name, p in named.items()}, state


@pytest.mark.parametrize('state_dtype', DTYPES)
def test_goes_on_exactly(tmp_path: Path, state_dtype: str) -> None:
    weights, state = run(str(tmp_path / 'a'), state_dtype)
    resumed, again = run(str(tmp_path / 'b'), state_dtype, resume=str(tmp_path / 'a' / 'iter_3'))
    dtypes = {'bfloat16': {torch.bfloat16}, 'int8': {torch.int8, torch.uint8}}[state_dtype]
    assert {v.dtype for v in state.values()} == dtypes | {torch.float32}
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k].float(), value.float()) for k, value in state.items())


@pytest.mark.parametrize('state_dtype', [slow('bfloat16'), 'int8'])
def test_state_moves_between_layouts(two_ranks, tmp_path: Path, state_dtype: str) -> None:
    two = str(tmp_path / 'two')
    two_ranks(run, two, state_dtype, strategy__parallel={'tensor': 2}, train_cfg__max_iters=3)
    # Nothing is left to train, so what was loaded is what is there.
    options = dict(resume=f'{two}/iter_3', train_cfg__max_iters=3)
    _, found = run(str(tmp_path / 'one'), state_dtype, **options)
    stored = StoredTensors(Path(two) / 'iter_3')
    assert {name for name in stored if name.startswith('optimizer.')} == found.keys()
    for name, value in found.items():
        assert torch.equal(value.float(), stored[name].float()), name
    sharded = two_ranks(run, str(tmp_path / 'again'), state_dtype,
                        strategy__parallel={'data_shard': 2}, **options)  # fmt: skip
    for name, value in found.items():
        if value.ndim:
            whole = torch.cat([state[name].float() for _, state in sharded])
            assert torch.equal(whole, value.float()), name


def test_another_kind_of_state_is_refused(tmp_path: Path) -> None:
    run(str(tmp_path / 'a'), None, train_cfg__max_iters=3)
    with pytest.raises(ValueError, match=r"state_dtype=None, this run has 'bfloat16'"):
        run(str(tmp_path / 'b'), 'bfloat16', resume=str(tmp_path / 'a' / 'iter_3'))
