"""Weights that are turned in backward: the same bits, and no copy of a weight is kept for it."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.autograd.graph import saved_tensors_hooks

from internlm_mm.engine.rehearse_memory import model_sizes
from internlm_mm.parallel import compiling, float8
from internlm_mm.parallel.compiling import compile_layers
from internlm_mm.parallel.float8 import RECIPES, Float8, apply_float8
from internlm_mm.parallel.late_turns import LateTurns, later
from internlm_mm.planner.activations import layer_bytes
from internlm_mm.planner.sizes import RunSizes
from tests.test_parallel.test_float8 import has_torchao, model, quiet, train
from tests.test_parallel.test_recompute import BATCH, run_forward


class Nothing(CustomGraphPass):
    """A pass that changes nothing."""

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> bytes:
        return b'nothing'


def in_bytes(**sizes: int) -> nn.Module:
    """A model with weights in 8 bits, as FSDP2 hands them to its layers."""
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.float8_training_tensor import (
        GemmInputRole,
        hp_tensor_and_scale_to_float8,
    )

    torch.manual_seed(3)
    module = model(**sizes).to(torch.bfloat16)
    apply_float8(module, Float8(), torch.device('cpu'), torch.bfloat16, False)
    for linear in module.modules():
        if isinstance(linear, Float8Linear):
            weight = linear.weight.detach()
            rounded = hp_tensor_and_scale_to_float8(
                weight,
                (448 / weight.abs().max().double()).float(),
                torch.float8_e4m3fn,
                linear.linear_mm_config,
                GemmInputRole.WEIGHT,
            )
            linear.weight = nn.Parameter(rounded)
    return module


def step(recompute: float | str) -> tuple[dict[str, Tensor | None], int]:
    """Gradients of a step, and how many bytes of copies of weights forward kept."""
    torch._dynamo.reset()
    module = in_bytes()
    compile_layers(module, recompute, turns=True)
    weights = {
        parameter._data.untyped_storage().data_ptr()
        for parameter in module.parameters()
        if hasattr(parameter, '_data')
    }
    sizes = {tuple(sorted(p.shape)) for p in module.parameters() if hasattr(p, '_data')}
    copies = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.itemsize == 1 and tuple(sorted(tensor.shape)) in sizes:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                copies[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), config.patch(fx_graph_cache=False):
        loss = module(BATCH)['loss']
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {'loss': loss.detach(), **gradients}, sum(copies.values())


@has_torchao
@quiet
@pytest.mark.slow
@pytest.mark.parametrize('recompute', [0.0, 'selective'])
def test_bits_stay_and_no_copy_is_kept(
    monkeypatch: pytest.MonkeyPatch, recompute: float | str
) -> None:
    monkeypatch.setattr(float8, 'float8_obstacles', lambda *_args, **_options: [])
    found, copies = step(recompute)
    compiling._compiler.cache_clear()
    monkeypatch.setattr(compiling, 'LateTurns', Nothing)
    plain, before = step(recompute)
    compiling._compiler.cache_clear()
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or torch.equal(found[name], value), name
    assert copies == 0 < before


def compiled_losses(late: bool, reshard: str) -> list[float]:
    """Of some steps with weights that FSDP2 gathers in 8 bits, on the ranks that there are."""
    patch = pytest.MonkeyPatch()
    torch._dynamo.reset()
    compiling._compiler.cache_clear()
    with patch.context() as changed, config.patch(fx_graph_cache=False):
        changed.setattr(float8, 'float8_obstacles', lambda *_args, **_options: [])
        if not late:
            changed.setattr(compiling, 'LateTurns', Nothing)
        _, losses = train(4, {}, compile=True, reshard=reshard)
    compiling._compiler.cache_clear()
    return losses


@has_torchao
@quiet
@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize('reshard', ['step', 'layer'])
def test_gathered_weights_are_turned_late(two_ranks, reshard: str) -> None:
    assert two_ranks(compiled_losses, True, reshard) == two_ranks(compiled_losses, False, reshard)


@pytest.mark.slow
def test_a_graph_without_backward_is_left_alone() -> None:
    def turned(matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()

    matrix = torch.randn(16, 32).to(torch.float8_e4m3fn)
    torch._dynamo.reset()
    with config.patch(joint_custom_pre_pass=LateTurns(), fx_graph_cache=False), torch.no_grad():
        found = torch.compile(turned)(matrix)
    assert torch.equal(found.view(torch.uint8), turned(matrix).view(torch.uint8))


def test_what_comes_later_is_a_copy() -> None:
    matrix, gradient = torch.randn(3, 2), torch.randn(())
    assert torch.equal(later(matrix, gradient), matrix)
    torch.library.opcheck(later, (matrix, gradient))


def test_the_cache_of_compiled_graphs_knows_the_pass() -> None:
    assert LateTurns().uuid() == LateTurns().uuid() != b''


def kept_in_forward(module: nn.Module) -> int:
    """Bytes of a step's activations that a compiled model in 8 bits keeps, masks with them."""
    torch._dynamo.reset()
    compile_layers(module, 0.0, turns=True)
    with config.patch(fx_graph_cache=False):
        return run_forward(module)[1]


def rounding(num_layers: int, recipe: str) -> nn.Module:
    """A model whose layers round operands, and compute in bf16."""
    torch.manual_seed(3)
    module = model(num_layers=num_layers).to(torch.bfloat16)
    options = Float8(recipe=recipe, emulate=True)
    apply_float8(module, options, torch.device('cpu'), torch.bfloat16, False)
    return module


def planned(rounded: bool) -> int:
    """What a layer keeps, as the planner says."""
    run = RunSizes(
        seq_len=16,
        micro_batch_size=2,
        micro_batches=1,
        stages=((0,),),
        param_bytes=2,
        compiled=True,
        rounded=rounded,
        mask=2,
    )
    return layer_bytes(model_sizes(model()), run)


@has_torchao
@quiet
@pytest.mark.slow
def test_what_a_layer_keeps_is_what_the_planner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in backward lets the compiler compute norms and gates again, as if selective."""
    monkeypatch.setattr(float8, 'float8_obstacles', lambda *_args, **_options: [])
    found = kept_in_forward(in_bytes(num_layers=3)) - kept_in_forward(in_bytes(num_layers=2))
    assert 0 <= found - planned(True) <= 64  # a scale for each rounded matrix


@has_torchao
@quiet
@pytest.mark.slow
@pytest.mark.parametrize('recipe', RECIPES)
def test_what_recipes_keep_is_what_the_planner_says(recipe: str) -> None:
    rounded = Float8(recipe=recipe).rounds_inputs_again
    found = kept_in_forward(rounding(3, recipe)) - kept_in_forward(rounding(2, recipe))
    assert 0 <= found - planned(rounded) <= 64
    assert planned(False) - planned(True) == 32 * 2 * (2 * 32 + 48)
