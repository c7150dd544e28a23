import pytest
import torch
from torch import nn

from internlm_mm.models import InternLM
from internlm_mm.ops.attention import reference_attention, sdpa_attention
from internlm_mm.parallel.attention import apply_attention

CPU = torch.device('cpu')


def model() -> InternLM:
    return InternLM(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2)


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
    with pytest.raises(ValueError, match=r"attention='spda' is unknown.*sdpa"):
        apply_attention(model(), 'spda', CPU, torch.float32)


def test_a_backend_that_cannot_run_here() -> None:
    with pytest.raises(ValueError, match='needs CUDA in half precision'):
        apply_attention(model(), 'varlen', CPU, torch.float32)


def test_a_model_without_attention_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    apply_attention(module, 'auto', CPU, torch.float32)
    assert not hasattr(module, 'attend')
