import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from internlm_mm.parallel import reducing
from internlm_mm.parallel.data import begin_micro_batch, shard_model
from internlm_mm.parallel.reducing import (
    ReduceIntoComputeMemory,
    add_in_one_pass,
    wide_add_kernel,
)


class Stream:
    """Stands for a CUDA stream where there is none."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A pretended device: what is allocated in which stream, and recorded for which."""
    seen: dict[str, object] = dict(now=Stream('compute'), made=[], recorded=[])
    empty = torch.empty

    class Entered:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, seen['now'] = seen['now'], self.stream

        def __exit__(self, *error: object) -> None:
            seen['now'] = self.before

    def make(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        seen['made'].append((seen['now'].name, *size))
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: seen['now'])
    monkeypatch.setattr(torch.cuda, 'stream', Entered)
    monkeypatch.setattr(torch, 'empty', make)
    monkeypatch.setattr(
        Tensor, 'record_stream', lambda tensor, stream: seen['recorded'].append(stream.name)
    )
    seen['enter'] = Entered
    return seen


def test_results_lie_in_the_memory_of_the_backward_pass(streams: dict) -> None:
    comm = ReduceIntoComputeMemory(2)
    options = dict(dtype=torch.float32, device=torch.device('cuda', 0))
    for size in (8, 6):
        comm.allocate((size,), **options)
        with streams['enter'](Stream('reduce')):
            comm.allocate((size // 2,), **options)
    assert streams['made'] == [('compute', 8), ('compute', 4), ('compute', 6), ('compute', 3)]
    assert streams['recorded'] == ['reduce', 'reduce']


def test_what_does_not_belong_together_is_left_where_it_is(streams: dict) -> None:
    """After a reduction that failed halfway, and where there is no stream of its own."""
    comm = ReduceIntoComputeMemory(2)
    options = dict(dtype=torch.float32, device=torch.device('cuda', 0))
    comm.allocate((8,), **options)
    comm.allocate((4,), **options)  # of another parameter, in the same stream
    with streams['enter'](Stream('reduce')):
        comm.allocate((4,), **options)
        comm.allocate((2,), **options)
    assert [name for name, _ in streams['made']] == ['compute', 'compute', 'reduce', 'reduce']
    assert streams['recorded'] == []


def gradients(device: str, custom: bool) -> list[Tensor]:
    """Of a small model, sharded over all ranks and reduced in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        if custom:
            layer.set_custom_reduce_scatter(ReduceIntoComputeMemory(mesh.size()))
    rank = dist.get_rank()
    for shift in (0.0, 1.0):  # the second reduction is added to the first
        rows = torch.arange(18.0, device=device).reshape(3, 6) / 9 + rank + shift
        model(rows).square().sum().backward()
    return [parameter.grad.full_tensor().cpu() for parameter in model.parameters()]


def same_on_two_ranks(device: str) -> bool:
    default, ours = gradients(device, custom=False), gradients(device, custom=True)
    return all(map(torch.equal, default, ours)) and all(grad.any() for grad in ours)


def test_gradients_are_those_of_the_default(two_ranks) -> None:
    assert two_ranks(same_on_two_ranks, 'cpu') == [True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_free_gradients_are_room_for_activations(tmp_path) -> None:
    """A backward pass, then tensors as large as its gradients: they need one new one less."""
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('nccl', store=store, rank=0, world_size=1)
    try:
        taken = {}
        for custom in (False, True):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            model = nn.Linear(4096, 16_384, bias=False, device='cuda')
            fully_shard(model, mesh=init_device_mesh('cuda', (1,)))
            if custom:
                model.set_custom_reduce_scatter(ReduceIntoComputeMemory(1))
            model(torch.ones(2, 4096, device='cuda')).sum().backward()
            size = model.weight.grad.to_local().numel()
            model.zero_grad()
            torch.cuda.synchronize()
            several = [torch.empty(size, device='cuda') for _ in range(4)]
            taken[custom] = torch.cuda.memory_reserved() - before
            del several, model
        assert taken[True] <= taken[False] - 3 * size  # of 4 bytes a number
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_micro_batches_add_up_as_without_the_kernel(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wide_add_kernel() is not None
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('nccl', store=store, rank=0, world_size=1)
    try:
        found = {}
        for ours in (True, False):
            if not ours:
                monkeypatch.setattr(reducing, 'wide_add_kernel', lambda: None)
            torch.manual_seed(0)
            model = nn.Linear(33, 65, device='cuda')
            mesh = init_device_mesh('cuda', (1,))
            shard_model(model, mesh, torch.bfloat16, torch.float32, 'step')
            for index in range(4):
                begin_micro_batch(model, index == 3, 'step')
                rows = torch.randn(8, 33, device='cuda', dtype=torch.bfloat16)
                model(rows).square().sum().backward()
            found[ours] = [p.grad.to_local() for p in model.parameters()]
        assert all(map(torch.equal, found[True], found[False]))
        assert all(grad.any() for grad in found[True])
    finally:
        dist.destroy_process_group()


def test_without_triton_it_is_as_fsdp2_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducing, 'wide_add_kernel', lambda: None)
    assert add_in_one_pass(nn.Linear(2, 2)) == 0
