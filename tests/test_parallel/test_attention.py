from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from internlm_mm.models import InternLM
from internlm_mm.ops.attention import needs_mask, reference_attention, sdpa_attention
from internlm_mm.ops.attention_choice import PREFERRED, choose_attention
from internlm_mm.parallel.attention import (
    apply_attention,
    check_packed_rows,
    check_shared_attention,
)
from internlm_mm.registry import ATTENTIONS

CPU = torch.device('cpu')


def model() -> InternLM:
    return InternLM(vocab_size=8, hidden_size=16, intermediate_size=8, num_layers=2, num_heads=2)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('auto', sdpa_attention), ('sdpa', sdpa_attention), ('reference', reference_attention)],
)
def test_every_layer_gets_the_backend(name: str, expected) -> None:
    module = model()
    for layer in module.layers.values():
        layer.self_attn.attend = None
    text = apply_attention(module, name, CPU, torch.float32)
    assert [layer.self_attn.attend for layer in module.layers.values()] == [expected, expected]
    assert text.startswith(expected.__name__.removesuffix('_attention') + ': ')


def test_auto_on_a_gpu_decides_by_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on the GPU here: the two backends are replaced by markers."""
    module = model()
    called = []
    monkeypatch.setattr(
        'internlm_mm.parallel.attention.ATTENTIONS',
        {
            'cudnn': lambda q, k, v, documents: called.append('dense'),
            'varlen': lambda q, k, v, documents: called.append('packed'),
        },
    )
    text = apply_attention(module, 'auto', torch.device('cuda'), torch.bfloat16)
    attend = module.layers['1'].self_attn.attend
    attend(None, None, None, None)
    attend(None, None, None, 'documents')
    assert called == ['dense', 'packed']
    assert 'cudnn' in text and 'packed rows varlen' in text


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"strategy.attention='spda' is unknown.*sdpa"):
        apply_attention(model(), 'spda', CPU, torch.float32)


def test_a_backend_that_cannot_run_here() -> None:
    with pytest.raises(ValueError, match='needs CUDA in half precision'):
        apply_attention(model(), 'varlen', CPU, torch.float32)


def test_a_model_without_attention_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    apply_attention(module, 'auto', CPU, torch.float32)
    assert not hasattr(module, 'attend')


def with_context(name: str, exchange: str) -> tuple[str, bool]:
    module = model()
    axis = init_device_mesh('cpu', (2,), mesh_dim_names=('context',))
    text = apply_attention(module, name, CPU, torch.float32, axis, exchange)
    attends = {layer.self_attn.attend for layer in module.layers.values()}
    return text, len(attends) == 1 and not needs_mask(attends.pop())


@pytest.mark.parametrize('name', ['auto', 'sdpa'])
def test_ranks_that_share_a_sequence_gather_keys_and_values(two_ranks, name: str) -> None:
    for text, is_set in two_ranks(with_context, name, 'all_gather'):
        assert text == 'sdpa, keys and values by all_gather over 2 ranks'
        assert is_set  # and the mask of whole rows, which is not this rank's, is not built


@pytest.mark.parametrize(
    ('name', 'exchange', 'message'),
    [
        ('reference', 'all_gather', r"attention='reference' does not work .*context=2: use 'auto'"),
        ('cudnn', 'all_gather', r"attention='cudnn' does not work with strategy.parallel.context"),
        ('varlen', 'all_gather', 'needs CUDA in half precision, not cpu'),
        ('auto', 'all_gathr', r"strategy\.context_attention='all_gathr'.*'all_gather'"),
    ],
)
def test_attention_that_cannot_be_shared(name: str, exchange: str, message: str) -> None:
    axis = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match=message):
        apply_attention(model(), name, CPU, torch.float32, axis, exchange)


def test_the_width_of_heads_is_looked_up_in_the_model() -> None:
    module = InternLM(vocab_size=8, hidden_size=24, intermediate_size=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match='a multiple of 32, not 12'):
        apply_attention(module, 'flash4', CPU, torch.float32)


def test_packed_rows_for_a_backend_of_dense_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"strategy\.attention='cudnn' takes one document a row, train_dataloader\.dataset "
        "packs several: use 'varlen', or 'auto'",
    ):
        check_packed_rows('cudnn', 2, 'train_dataloader')
    check_packed_rows('cudnn', 1, 'train_dataloader')
    for name in ('auto', 'varlen', 'sdpa', 'flash4'):
        check_packed_rows(name, 2, 'train_dataloader')


def test_auto_for_a_shared_sequence_is_a_kernel_that_serves_parts(monkeypatch) -> None:
    """Whatever is faster for whole rows."""
    monkeypatch.setitem(ATTENTIONS.module_dict, 'mine', lambda q, k, v, documents: q)
    monkeypatch.setitem(PREFERRED, True, ('mine', 'varlen'))
    gpu = torch.device('cuda')
    assert choose_attention('auto', gpu, torch.bfloat16, True)[0] == 'mine'
    for exchange in ('ring', 'all_gather'):
        assert check_shared_attention('auto', gpu, torch.bfloat16, 2, exchange, 64) == 'varlen'
    assert check_shared_attention('auto', gpu, torch.bfloat16, 2, 'all_gather', 20) == 'sdpa'
    with pytest.raises(ValueError, match="'ring' needs CUDA"):
        check_shared_attention('auto', gpu, torch.float32, 2, 'ring', 64)
