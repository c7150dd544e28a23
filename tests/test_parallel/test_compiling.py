"""Layers that are compiled: gradients, what is computed again, and what the compiler is told."""

from collections import Counter

import pytest
import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from internlm_mm.parallel import compiling
from internlm_mm.parallel.compiling import compile_layers
from internlm_mm.parallel.recompute import recompute_layers, recomputed_layers
from tests.test_parallel.test_recompute import BATCH, gradients, model


# Dynamo looks for gradients everywhere.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
@pytest.mark.slow
def test_a_share_of_compiled_layers() -> None:
    _, expected, _ = gradients(model())
    calls = {}
    for recompute in (0.0, 1.0):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = model()
        assert recompute_layers(module, recompute, compiled=True) == 4 * recompute
        compile_layers(module, recompute, 'aot_eager_decomp_partition')
        _, found, _ = gradients(module)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
        with torch.profiler.profile() as profile:
            module(BATCH)['loss'].backward()
        calls[recompute] = Counter(event.name for event in profile.events())
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
        assert not torch._dynamo.utils.counters['graph_break']
    none, whole = calls[0.0], calls[1.0]
    assert whole['aten::mm'] == none['aten::mm'] + 4 * 2  # gate and up, and not the last product
    assert whole['aten::addmm'] == none['aten::addmm'] * 2


# Dynamo looks for gradients everywhere.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager_decomp_partition', 'inductor'])
def test_selective_of_compiled_layers(backend: str) -> None:
    _, expected, _ = gradients(model())
    kept, calls = {}, {}
    for recompute in (0.0, 'selective'):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = model()
        assert recompute_layers(module, recompute, compiled=True) == (4 if recompute else 0)
        assert recomputed_layers(module) == (0, 4)
        compile_layers(module, recompute, backend)
        _, found, kept[recompute] = gradients(module)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
        module.zero_grad()
        before = torch._dynamo.utils.counters['stats']['unique_graphs']
        with torch.profiler.profile() as profile:
            module(BATCH)['loss'].backward()
        calls[recompute] = Counter(event.name for event in profile.events())
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before == 1
    for name in ('aten::mm', 'aten::addmm', 'aten::_scaled_dot_product_flash_attention_for_cpu'):
        assert calls['selective'][name] == calls[0.0][name] > 0
    # Outputs of two norms and of the gate; 2 rows of 16 tokens in float64.
    assert kept[0.0] - kept['selective'] >= 4 * 2 * 16 * (16 + 16 + 24) * 8


# Dynamo looks for gradients everywhere.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
@pytest.mark.slow
@pytest.mark.parametrize('recompute', [0.0, 'selective'])
@pytest.mark.parametrize('turns', [False, True])
def test_what_layers_in_bytes_are_told_holds_for_both_passes(
    recompute: float | str, turns: bool
) -> None:
    _, expected, _ = gradients(model(1))
    seen = []
    with config.patch(
        {
            'post_grad_custom_post_pass': lambda graph: seen.append(
                (
                    config.triton.mix_order_reduction,
                    isinstance(config.post_grad_custom_pre_pass, compiling._InTurn),
                )
            ),
            'triton.mix_order_reduction': True,
            'fx_graph_cache': False,
        }
    ):
        torch._dynamo.reset()
        module = model(1)
        compile_layers(module, recompute, turns=turns)
        _, found, _ = gradients(module)
    assert seen == [(not turns, turns)] * 2  # forward and backward
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_layers_share_a_compiler() -> None:
    """Another function would be another program to dynamo."""
    told = compiling._compiler('inductor', False, False, True)
    assert callable(told) and told is compiling._compiler('inductor', False, False, True)
    assert compiling._compiler('inductor', False, False, False) == 'inductor'


def test_passes_run_in_turn_and_are_known_by_all_of_them() -> None:
    seen: list[str] = []

    class Pass(CustomGraphPass):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, graph: fx.Graph) -> None:
            seen.append(self.name)

        def uuid(self) -> bytes:
            return self.name.encode()

    both = compiling._InTurn(Pass('a'), Pass('b'))
    both(fx.Graph())
    assert seen == ['a', 'b']
    assert len({both.uuid(), compiling._InTurn(Pass('b'), Pass('a')).uuid(), b''}) == 3
