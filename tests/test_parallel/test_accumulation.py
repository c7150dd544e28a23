"""Gradients that add up in their products, against autograd's and against float64."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM, Llama
from internlm_mm.models.lora import LoRA
from internlm_mm.ops.gradient_sum import AddingLinear, find_sum
from internlm_mm.parallel import gathered
from internlm_mm.parallel.accumulation import fuse_accumulation
from internlm_mm.parallel.adapters import round_frozen
from internlm_mm.parallel.compiling import compile_layers
from internlm_mm.parallel.data import begin_micro_batch, shard_model
from internlm_mm.parallel.recompute import recompute_layers
from internlm_mm.structures import Batch
from tests.strategies import OPTIM, strategy

CPU = torch.device('cpu')
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
MODEL = dict(type=InternLM, **SIZES)
PARTITIONED = 'aot_eager_decomp_partition'


def traced(test: Callable) -> Callable:
    """Dynamo makes an object of a function's class, and looks for gradients everywhere."""
    for message in (
        '.*should not be instantiated:DeprecationWarning',
        'The .grad attribute of a Tensor that is not a leaf',
    ):
        test = pytest.mark.filterwarnings(f'ignore:{message}')(test)
    return test


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batches(count: int) -> list[Batch]:
    rows = RandomTokens(seq_len=16, vocab_size=64, seed=5)
    return [collate_rows([rows[2 * i], rows[2 * i + 1]]) for i in range(count)]


def built(dtype: torch.dtype = torch.float32, **options) -> InternLM:
    torch.manual_seed(1)
    family = Llama if 'tie_word_embeddings' in options else InternLM
    model = family(**SIZES | options)
    with torch.no_grad():  # numbers of bfloat16, so that both precisions compute with the same
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if 'norm' in name else 0.0, 0.2)
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def exact(micro_batches: list[Batch], **options) -> dict[str, Tensor]:
    """Gradients in float64, by plain autograd."""
    model = built(torch.float64, **options)
    for batch in micro_batches:
        (model(batch)['loss'] / 64).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def train(
    model: InternLM, micro_batches: list[Batch], reshard: str = 'step', steps: int = 1
) -> dict[str, Tensor]:
    """Gradients of the last of some equal steps."""
    for _ in range(steps):
        model.zero_grad()
        for index, batch in enumerate(micro_batches):
            begin_micro_batch(model, index == len(micro_batches) - 1, reshard)
            (model(batch)['loss'] / 64).backward()
    return {name: p.grad.to_local() for name, p in model.named_parameters()}


def sharded(
    fused: bool,
    reshard: str = 'step',
    param: torch.dtype = torch.bfloat16,
    reduce: torch.dtype = torch.float32,
    backend: str | None = None,
    recompute: float | str = 0.0,
    **options,
) -> InternLM:
    model = built(**options)
    recompute_layers(model, recompute, compiled=backend is not None)
    if backend is not None:
        torch._dynamo.reset()
        compile_layers(model, recompute, backend)
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    shard_model(model, mesh, param, reduce, reshard)
    said = fuse_accumulation(model, fused, CPU, param, reduce, [])
    count = 7 * len(model.layers)
    assert said == (f'{count} linear layers, and the loss at the head' if fused else 'off')
    return model


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - want).norm() / want.norm()).item()
        for name, want in expected.items()
    }


@traced
@pytest.mark.parametrize(
    ('reshard', 'backend', 'recompute', 'options'),
    [
        ('step', None, 0.0, {}),
        ('layer', None, 1.0, {'tie_word_embeddings': True}),
        *(
            pytest.param('layer', PARTITIONED, recompute, {}, marks=pytest.mark.slow)
            for recompute in (0.0, 0.5, 'selective')
        ),
    ],
)
def test_it_is_nearer_to_float64(
    reshard: str,
    backend: str | None,
    recompute: float | str,
    options: dict,
    process_group: None,
) -> None:
    micro_batches = batches(3)
    expected = exact(micro_batches, **options)
    plain, fused = (
        distance(
            train(
                sharded(on, reshard, backend=backend, recompute=recompute, **options),
                micro_batches,
                reshard,
                steps=2,
            ),
            expected,
        )
        for on in (False, True)
    )
    assert max(plain.values()) < 0.1
    for name, error in fused.items():
        assert error < plain[name] * 1.05 + 1e-4, name
    assert sum(fused.values()) < sum(plain.values())


@traced
@pytest.mark.slow
@pytest.mark.parametrize('recompute', [0.0, 1.0, 'selective'])
def test_layers_share_what_is_compiled(recompute: float | str, process_group: None) -> None:
    """More layers than torch compiles anew, through sums that begin or are there, and eval."""
    counted = []
    for fused in (False, True):
        torch._dynamo.utils.counters.clear()
        model = sharded(fused, backend=PARTITIONED, recompute=recompute, num_layers=12)
        train(model, batches(3), steps=2)
        with torch.no_grad():
            model(batches(1)[0])
        counters = torch._dynamo.utils.counters
        counted.append((counters['stats']['unique_graphs'], dict(counters['graph_break'])))
        assert not counters['unimplemented'] and not counters['recompile_limit']
    assert counted[0] == counted[1]
    assert counted[1][0] <= 3


@pytest.mark.parametrize('count', [1, 3])
def test_without_a_wider_dtype_numbers_are_the_same(count: int, process_group: None) -> None:
    answers = [
        train(sharded(on, param=torch.float32, reduce=torch.float32), batches(count))
        for on in (False, True)
    ]
    for name, want in answers[0].items():
        torch.testing.assert_close(answers[1][name], want, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_of_one_micro_batch_is_as_without_it(process_group: None) -> None:
    answers = [train(sharded(on), batches(1)) for on in (False, True)]
    for name, want in answers[0].items():
        torch.testing.assert_close(answers[1][name], want, rtol=0.01, atol=1e-4, msg=name)


def test_gradients_wait_in_the_reductions_dtype(process_group: None) -> None:
    model, batch = sharded(True), batches(1)[0]
    begin_micro_batch(model, False, 'step')
    (model(batch)['loss'] / 64).backward()
    whole = {one.name: one for one in gathered.gathered(model)}
    assert {one.gradient.dtype for one in whole.values()} == {torch.float32}
    first = whole['layers.1.mlp.up_proj.weight'].gradient.clone()
    (model(batch)['loss'] / 64).backward()
    again = {one.name: one for one in gathered.gathered(model)}
    found = again['layers.1.mlp.up_proj.weight']
    assert found.gradient is whole['layers.1.mlp.up_proj.weight'].gradient  # in place
    torch.testing.assert_close(found.gradient, 2 * first)
    assert found.parameter.grad is None


def test_the_model_is_not_kept(process_group: None) -> None:
    model = sharded(True)
    train(model, batches(2))
    weight = next(one.parameter for one in gathered.gathered(model))
    assert find_sum(weight) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert find_sum(weight) is None


def test_frozen_weights_have_none(process_group: None) -> None:
    model = LoRA(rank=2, targets=['q_proj']).apply(built())
    model.lm_head.requires_grad_(True)
    round_frozen(model, torch.bfloat16)
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    shard_model(model, mesh, torch.bfloat16, torch.float32, 'step')
    fuse_accumulation(model, True, CPU, torch.bfloat16, torch.float32, [])
    for index, batch in enumerate(batches(2)):
        begin_micro_batch(model, index == 1, 'step')
        model(batch)['loss'].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert 'lm_head.weight' in trained
    assert all('lora' in name for name in trained - {'lm_head.weight'})


def test_auto_where_no_linear_layer_is_trained(process_group: None) -> None:
    """As with adapters, and with layers in 8 bits: neither the layers' gradients nor the head's."""
    model = LoRA(rank=2).apply(built())
    model.lm_head.requires_grad_(True)
    round_frozen(model, torch.bfloat16)
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    shard_model(model, mesh, torch.bfloat16, torch.float32, 'step')
    said = fuse_accumulation(model, 'auto', torch.device('cuda'), torch.bfloat16, torch.float32, [])
    assert said == 'off: no linear layer has a plain weight that is trained'
    assert not any(isinstance(module, AddingLinear) for module in model.modules())
    model(batches(1)[0])
    head = next(one.parameter for one in gathered.gathered(model) if one.name == 'lm_head.weight')
    assert find_sum(head) is None


def test_auto_where_it_pays(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('internlm_mm.parallel.accumulation._pays', lambda *_: True)
    model = built()
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    shard_model(model, mesh, torch.bfloat16, torch.float32, 'step')
    said = fuse_accumulation(model, 'auto', CPU, torch.bfloat16, torch.float32, [])
    assert said == '14 linear layers, and the loss at the head'
    found = train(model, batches(2))
    for name, want in train(sharded(True), batches(2)).items():
        torch.testing.assert_close(found[name], want, rtol=0, atol=0, msg=name)


def test_when_it_is_off(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    shard_model(model, mesh, torch.bfloat16, torch.float32, 'step')
    half, wide = torch.bfloat16, torch.float32
    assert 'pays on CUDA' in fuse_accumulation(model, 'auto', CPU, half, wide, [])
    gpu = torch.device('cuda')
    for param, reduce in ((half, half), (wide, wide), (half, torch.float64), (wide, torch.float64)):
        said = fuse_accumulation(model, 'auto', gpu, param, reduce, [])
        assert said == 'off: it pays on CUDA, for sums in float32 of gradients in 16 bits'
    why = ['does not go with this', 'nor with that']
    said = fuse_accumulation(model, 'auto', gpu, half, wide, why)
    assert said == 'off: it does not go with this; nor with that'
    with pytest.raises(ValueError, match='fuse_accumulation=True does not go with this; nor with'):
        fuse_accumulation(model, True, CPU, half, wide, why)
    monkeypatch.setattr('internlm_mm.parallel.accumulation.waiting_gradients', lambda _: None)
    with pytest.raises(ValueError, match='does not know the FSDP2 of torch'):
        fuse_accumulation(model, True, CPU, half, wide, [])
    assert not any(isinstance(module, AddingLinear) for module in model.modules())


def gradients(fused: bool, parallel: dict, **options) -> tuple[float, dict]:
    made = strategy(
        kernels=dict(fuse_accumulation=fused),
        parallel=parallel,
        precision=dict(param='float32', reduce='float64'),
        **options,
    )
    made.prepare(dict(MODEL), optim_wrapper=OPTIM)
    own = batches(8)[made.data_rank :: made.data_world_size]
    loss = made.forward_backward(own, 256)['loss'].item()
    found = {}
    for name, parameter in made.model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss, found


@pytest.mark.parametrize(
    ('parallel', 'options'),
    [
        ({'data_shard': 2}, {}),
        *(
            pytest.param(*case, marks=pytest.mark.parallel)
            for case in [
                ({'data_shard': 2}, {'reshard': 'layer', 'recompute': 1.0}),
                ({'data_shard': 2}, {'reshard': 'never', 'recompute': 'selective'}),
                ({'data_shard': 2}, {'offload': True}),
                ({'data_replicate': 2}, {}),
                ({'context': 2}, {}),
                ({'pipeline': 2}, {'pipeline': {'schedule': '1f1b'}}),
            ]
        ),
    ],
    ids=str,
)
def test_gradients_of_every_parameter_on_two_ranks(two_ranks, parallel, options) -> None:
    answers = [two_ranks(gradients, fused, parallel, **options) for fused in (False, True)]
    for (loss, expected), (fused_loss, found) in zip(*answers, strict=True):
        assert fused_loss == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ('parallel', 'options', 'message'),
    [
        ({'tensor': 2}, {}, r'strategy\.parallel\.tensor=2'),
        (
            {'pipeline': 2},
            {'pipeline': {'schedule': 'zbv_zero_bubble'}},
            r"schedule='zbv_zero_bubble'",
        ),
    ],
)
def test_what_it_does_not_go_with(two_ranks, parallel, options, message) -> None:
    options |= {'model_layers': 4} if 'pipeline' in parallel else {}
    for said in two_ranks(refusal, parallel, **options):
        assert said is not None and 'fuse_accumulation=True does not go with' in said
        assert message.replace('\\', '') in said


def refusal(parallel: dict, model_layers: int = 2, **options) -> str | None:
    made = strategy(kernels=dict(fuse_accumulation=True), parallel=parallel, **options)
    try:
        made.prepare(MODEL | {'num_layers': model_layers})
    except ValueError as error:
        return str(error)
    return None
