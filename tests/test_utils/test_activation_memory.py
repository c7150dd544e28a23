"""Bytes kept for backward, against the tensors that a walk over autograd's graph finds."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.utils.activation_memory import ActivationMeter


class Net(nn.Module):
    """Named parts, two of which keep the same storage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x)).exp().sum()


def graph_bytes(output: Tensor, model: nn.Module) -> int:
    """Bytes of all storages that nodes of the graph hold, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, todo, storages = set(), [output.grad_fn], {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        held = [getattr(node, name) for name in dir(node) if name.startswith('_saved_')]
        held += [getattr(node, 'saved_tensors', ())]
        for tensors in held:
            for tensor in tensors if isinstance(tensors, (tuple, list)) else [tensors]:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_by_hand() -> None:
    model, rows = Net(), 5
    meter = ActivationMeter(model)
    meter.attach()
    model(torch.randn(rows, 4)).backward()
    meter.detach()
    assert meter.by_module == {
        'first': rows * 4 * 4,  # its input
        'block.0': rows * 8 * 4,  # its result, which is also block.1's input: counted once
        '': rows * 16 * 4,  # the result of exp
    }


@pytest.mark.parametrize('document_lengths', [None, [5, 9, 14]])
def test_a_decoder_against_a_walk_over_the_graph(document_lengths) -> None:
    model = InternLM(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        max_seq_len=64,
    )
    data = RandomTokens(vocab_size=64, seq_len=32, document_lengths=document_lengths)
    batch = collate_rows([data[0], data[1]])
    expected = graph_bytes(model(batch)['loss'], model)
    meter = ActivationMeter(model)
    meter.attach()
    model(batch)
    meter.detach()
    # Where autograd keeps what is also an input of the model, the walk sees it, too.
    assert sum(meter.by_module.values()) == expected > 0
    assert {'layers.0.mlp', 'layers.1.self_attn', 'objective'} <= meter.by_module.keys()


def test_the_forward_that_keeps_most_is_told() -> None:
    model = Net()
    meter = ActivationMeter(model)
    meter.attach()
    for rows in (2, 6, 3):
        model(torch.randn(rows, 4)).backward()
    assert sum(meter.by_module.values()) == 6 * (4 + 8 + 16) * 4
    meter.detach()


def test_what_autograd_lets_go_of_does_not_count() -> None:
    class Forgetful(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)  # its graph is thrown away
            return super().forward(x)

    model = Forgetful()
    meter = ActivationMeter(model)
    meter.attach()
    model(torch.randn(5, 4))
    assert sum(meter.by_module.values()) == 5 * (4 + 8 + 16) * 4
    meter.detach()


def test_a_recomputed_module_keeps_its_input_alone() -> None:
    class Recomputing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.first(x), use_reentrant=False).sum()

    model = Recomputing()
    meter = ActivationMeter(model)
    meter.attach()
    model(torch.randn(5, 4)).backward()
    meter.detach()
    # first's input; its result, kept by the recomputation
    assert sum(meter.by_module.values()) == 5 * (4 + 8) * 4


def test_a_compiled_module_is_one_piece() -> None:
    model = Net()
    x = torch.randn(5, 4)
    model.block.compile(backend='eager')
    model(x)
    meter = ActivationMeter(model)
    compiled = model.block._compiled_call_impl
    with torch.compiler.set_stance('fail_on_recompile'):
        meter.attach()
        model(x).backward()
    assert meter.by_module == {'first': 5 * 4 * 4, 'block': 5 * 8 * 4, '': 5 * 16 * 4}
    meter.detach()
    assert model.block._compiled_call_impl is compiled


def test_nothing_changes_and_nothing_stays_behind() -> None:
    model = Net()
    x = torch.randn(5, 4)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    meter = ActivationMeter(model)
    meter.attach()
    measured = gradients()
    meter.detach()
    for one, two, three in zip(before, measured, gradients(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    found = dict(meter.by_module)
    model(torch.randn(50, 4))
    assert meter.by_module == found


def test_a_failing_forward_leaves_no_saved_tensor_hooks() -> None:
    model = Net()
    meter = ActivationMeter(model)
    meter.attach()
    with pytest.raises(RuntimeError, match='shape'):
        model(torch.randn(5, 3))
    kept = (torch.randn(3, requires_grad=True).exp() * 2).grad_fn.next_functions[0][0]
    assert isinstance(kept._saved_result, Tensor)
    model(torch.randn(5, 4))  # and it counts on
    assert sum(meter.by_module.values()) == 5 * (4 + 8 + 16) * 4
    meter.detach()
