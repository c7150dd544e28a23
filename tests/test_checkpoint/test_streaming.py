"""Models that run without their weights being in memory together."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from internlm_mm.checkpoint.hf_import import fill_model
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.checkpoint.streaming import hf_model, shared_parameters, streamed
from internlm_mm.models import InternLM
from tests.forms import build, weights_of
from tests.large_checkpoint import export_peak, write_checkpoint

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, max_seq_len=32
)
IDS = torch.arange(20).reshape(2, 10)


def on_meta() -> InternLM:
    with torch.device('meta'):
        return InternLM(**SIZES).eval()


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.3
        for name, p in on_meta().named_parameters()
    }


@torch.inference_mode()
def test_the_logits_are_those_of_the_whole_model(weights: dict[str, Tensor]) -> None:
    expected = fill_model(on_meta(), weights, 'cpu', torch.float32).logits(IDS)
    model = on_meta()
    with streamed(model, weights):
        assert torch.equal(model.logits(IDS), expected)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.inference_mode()
def test_one_module_s_weights_are_there_at_a_time(weights: dict[str, Tensor]) -> None:
    model, asked, most = on_meta(), [], 0

    class Counting(dict):
        def __getitem__(self, name: str) -> Tensor:
            nonlocal most
            asked.append(name)
            there = sum(not parameter.is_meta for parameter in model.parameters())
            most = max(most, there + 1)
            return super().__getitem__(name)

    with streamed(model, Counting(weights)):
        model.logits(IDS)
    assert most == 2  # weight and bias of a projection
    assert sorted(asked) == sorted(weights)  # each once


@torch.inference_mode()
def test_transformers_model_of_a_folder(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    export_hf(on_meta(), weights, tmp_path / 'hf', dtype='float32', max_shard_bytes=20_000)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32)(IDS)
    model, stored = hf_model(tmp_path / 'hf')
    assert all(parameter.is_meta for parameter in model.parameters())
    with streamed(model, stored):
        assert torch.equal(model(IDS, use_cache=False).logits, expected.logits)


@torch.inference_mode()
@pytest.mark.parametrize('name', ['Qwen3-tied', 'Llama-3'])
def test_a_head_that_is_the_embedding(name: str) -> None:
    """Its table is read once for each of the two, and given up after both."""
    model, asked = build(name), []
    state = weights_of(model)
    expected = fill_model(build(name), state, 'cpu', torch.float32).logits(IDS)

    class Counting(dict):
        def __getitem__(self, key: str) -> Tensor:
            asked.append(key)
            assert all(parameter.is_meta for parameter in model.parameters())
            return super().__getitem__(key)

    with streamed(model, Counting(state)):
        assert torch.equal(model.logits(IDS), expected)
    assert asked.count('embed_tokens.weight') == 2
    assert sorted(set(asked)) == sorted(state)


class Shared(nn.Module):
    """One parameter under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_a_parameter_with_several_names() -> None:
    """As transformers ties: filled it is one again, and streamed it is read by its first name."""
    with torch.device('meta'):
        model, other = Shared(), Shared()
    names = {'second.weight': 'first.weight', 'third.weight': 'first.weight'}
    assert shared_parameters(model) == names
    state = {'first.weight': torch.randn(3, 3)}
    fill_model(other, state, 'cpu', torch.float32)
    assert other.third.weight is other.second.weight is other.first.weight
    x = torch.randn(2, 3)
    expected = x @ torch.linalg.matrix_power(state['first.weight'].T, 3)
    torch.testing.assert_close(other(x), expected)
    with streamed(model, state):
        torch.testing.assert_close(model(x), expected)
    assert shared_parameters(model) == names


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(num_hidden_layers=4), r"'model\.layers\.3\..*' has shape None in the files"),
        (dict(num_hidden_layers=2), r"'model\.layers\.2\..*in the files and None"),
        (dict(vocab_size=65), r"'model\.embed_tokens\.weight' has shape \[64, 32\] in the files"),
        (dict(attention_bias=False), r'q_proj\.bias.* and None in LlamaForCausalLM'),
    ],
)
def test_a_folder_whose_config_does_not_fit(
    tmp_path: Path, weights: dict[str, Tensor], change: dict, message: str
) -> None:
    export_hf(on_meta(), weights, tmp_path / 'hf', verify=False)
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        hf_model(tmp_path / 'hf')


def test_modules_without_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.0))
    with streamed(model, {}):
        assert torch.equal(model(torch.ones(2)), torch.ones(2))


@pytest.mark.slow
def test_memory_of_an_export_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Four times the layers; docs/en/export.md has the same of a 2B model."""
    sizes = dict(
        vocab_size=4000, hidden_size=1536, intermediate_size=4096, num_heads=12, max_seq_len=64
    )
    peaks, weights = {}, {}
    for layers in (3, 12):
        path = tmp_path / str(layers) / 'iter_1'
        weights[layers] = 4 * write_checkpoint(path, 4, num_layers=layers, **sizes)
        peaks[layers] = export_peak(path, tmp_path / f'hf_{layers}')
    growth = peaks[12] - peaks[3]
    # Far less than the weights that are added, of which even a copy in bfloat16 would be a half.
    assert growth < 0.1 * (weights[12] - weights[3]), (peaks, weights)
    assert peaks[12] < 1.15 * peaks[3]
