from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.parallel.recompute import (
    check_recompute,
    kept_operations,
    recompute_layers,
    recomputed_layers,
)

BATCH = collate_rows(
    [RandomTokens(vocab_size=40, seq_len=16, document_lengths=[4, 7])[i] for i in range(2)]
)


def model(num_layers: int = 4) -> InternLM:
    torch.manual_seed(2)
    return InternLM(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=num_layers, num_heads=2
    ).double()


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Its memory, also where it stands around another tensor, as torchao's do."""
    return getattr(tensor, '_data', tensor).untyped_storage()


def run_forward(module: nn.Module) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes of activations that forward kept."""
    kept = {}
    weights = {storage_of(p).data_ptr() for p in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return module(BATCH)['loss'], sum(kept.values())


def gradients(module: nn.Module) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and the bytes of activations that forward kept."""
    loss, kept = run_forward(module)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in module.named_parameters()}, kept


@pytest.mark.parametrize('fraction', [0.25, 0.5, 1.0])
def test_gradients_are_equal_and_less_is_kept(fraction: float) -> None:
    loss, expected, memory = gradients(model())
    module = model()
    assert recompute_layers(module, fraction) == 4 * fraction
    again, found, less = gradients(module)
    assert again == loss
    assert found.keys() == expected.keys()  # names stay
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert less < memory * (1 - 0.7 * fraction)


def test_the_first_layers_are_chosen() -> None:
    module = model()
    recompute_layers(module, 0.5)
    assert ['forward' in vars(layer) for layer in module.layers.values()] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ('layers', 'fraction', 'chosen'),
    [(4, 0.0, 0), (3, 0.3, 1), (32, 0.1, 3), (1, 0.5, 1), (2, 0.1, 1)],
)
def test_shares_are_rounded(layers: int, fraction: float, chosen: int) -> None:
    assert recompute_layers(model(layers), fraction) == chosen


@pytest.mark.parametrize('fraction', [-0.1, 1.1, float('nan')])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=r'strategy\.recompute=.* between 0 and 1'):
        recompute_layers(model(), fraction)


def test_a_model_without_layers() -> None:
    assert recompute_layers(nn.Linear(2, 2), 0.0) == 0
    with pytest.raises(ValueError, match='Linear has no `layers`'):
        recompute_layers(nn.Linear(2, 2), 0.5)


# --------------------------------------------------------------------------------- selective


def test_selective_keeps_products_and_has_equal_gradients() -> None:
    loss, expected, memory = gradients(model())
    module = model()
    assert recompute_layers(module, 'selective') == 4
    assert recomputed_layers(module) == (0, 4)  # not their products, whose arithmetic counts
    again, found, less = gradients(module)
    assert again == loss
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert less < memory


class Count(TorchDispatchMode):
    """How often operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def calls_of(recompute: float | str) -> Counter[str]:
    module = model()
    recompute_layers(module, recompute)
    with Count() as count:
        module(BATCH)['loss'].backward()
    return count.calls


def test_selective_computes_no_product_twice() -> None:
    none, selective, whole = calls_of(0.0), calls_of('selective'), calls_of(1.0)
    attention = 'aten::_scaled_dot_product_flash_attention_for_cpu'
    assert none[attention] == selective[attention] == 4 < whole[attention]
    for name in ('aten::mm', 'aten::addmm'):
        assert none[name] == selective[name] < whole[name]
    assert none['aten::silu'] < selective['aten::silu'] == whole['aten::silu']


def test_operations_are_torchs() -> None:
    names = {operation.name() for operation in kept_operations()}
    assert {'aten::mm', 'aten::addmm', 'torch_attn::_varlen_attn'} <= names


# ------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize(
    ('recompute', 'message'),
    [
        ('selectiv', r"strategy\.recompute='selectiv'.*Did you mean 'selective'"),
        ({'budget_gb': 60}, r"recompute\.budget_gb=60 is unknown.*'budget_gib'"),
        ({}, r'budget_gib=None: expected GiB'),
        ({'budget_gib': 0}, r'budget_gib=0: expected GiB'),
        ({'budget_gib': '60'}, r"budget_gib='60': expected GiB"),
        ({'budget_gib': 60}, r'the runner decides what a budget means'),
    ],
)
def test_other_words_and_budgets(recompute, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recompute_layers(model(), recompute)


def test_a_budget_that_is_right() -> None:
    assert check_recompute({'budget_gib': 60}) is None
    assert (check_recompute(0.5), check_recompute('selective')) == (0.5, 'selective')
