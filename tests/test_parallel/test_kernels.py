"""Which kernels end up on which seam, and what is refused."""

import pytest
import torch
from torch import nn

from internlm_mm.models import InternLM, Qwen3
from internlm_mm.ops import linear_cross_entropy, project
from internlm_mm.ops.rms_norm import fused_rms_norm, rms_norm
from internlm_mm.parallel.fuse import project_at_once
from internlm_mm.parallel.kernels import Kernels, apply_kernels, check_kernels
from internlm_mm.registry import CROSS_ENTROPIES, NORMS
from tests.test_parallel.test_strategy import MODEL, strategy

CPU = torch.device('cpu')
SIZES = {k: v for k, v in MODEL.items() if k != 'type'}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'norms': 'torch'}, r"strategy\.kernels\.norms='torch' is unknown.*'norm'"),
        ({'norm': 'tirch'}, r"strategy\.kernels\.norm='tirch'.*'torch'"),
        ({'cross_entropy': 'ligar'}, r"kernels\.cross_entropy='ligar'.*'liger'"),
        ({'fuse': 'yes'}, r"kernels\.fuse='yes': expected True or False"),
        (
            {'fuse': True, 'fuse_accumulation': True},
            r'does not go with strategy\.kernels\.fuse=True',
        ),
        ({'norm': 3}, r'strategy\.kernels\.norm=3\. Valid: apex, fused, liger, torch\.'),
        ({'norm': None}, r'strategy\.kernels\.norm=None\. Valid: '),
        ({'cross_entropy': [1]}, r'strategy\.kernels\.cross_entropy=\[1\]\. Valid: liger, torch'),
        ({'fuse': True, 'fuse_accumulation': 1}, r'fuse_accumulation=1: expected True, False or'),
        ({'fuse_accumulation': 0}, r'fuse_accumulation=0: expected True, False or'),
        ({'fuse': 1}, r'kernels\.fuse=1: expected True or False'),
        ({'fuse_accumulation': 'on'}, r"fuse_accumulation='on': expected True, False or 'auto'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernels(options)
    with pytest.raises(ValueError, match=message):
        strategy(kernels=options)


def test_nothing_changes_by_default() -> None:
    module = InternLM(**SIZES)
    apply_kernels(module, check_kernels(None), CPU, torch.float32)
    assert module.norm.norm is rms_norm
    assert module.objective.cross_entropy is linear_cross_entropy
    assert module.layers['0'].mlp.project is project


def test_every_seam_is_set() -> None:
    module = Qwen3(**SIZES, num_kv_heads=2, head_dim=8)  # which has norms inside attention
    apply_kernels(module, Kernels(norm='fused', fuse=True), CPU, torch.float32)
    layer = module.layers['1']
    norms = [module.norm, layer.input_layernorm, layer.self_attn.q_norm]
    assert all(norm.norm is fused_rms_norm for norm in norms)
    assert isinstance(module.norm, nn.Module)  # and not the function, whose name it has
    assert layer.self_attn.project is layer.mlp.project is project_at_once


def test_kernels_that_cannot_run_here() -> None:
    with pytest.raises(ValueError, match=r"norm='liger' needs CUDA, not cpu.*not installed: pip"):
        apply_kernels(InternLM(**SIZES), Kernels(norm='liger'), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"cross_entropy='liger' needs CUDA"):
        apply_kernels(InternLM(**SIZES), Kernels(cross_entropy='liger'), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"norm='fused' does not go with .*tensor=2"):
        apply_kernels(InternLM(**SIZES), Kernels(norm='fused'), CPU, torch.float32, 2)
    with pytest.raises(ImportError, match=r"norm='apex' needs NVIDIA's apex"):
        apply_kernels(InternLM(**SIZES), Kernels(norm='apex'), torch.device('cuda'), torch.float16)
    with pytest.raises(
        ValueError, match=r"norm='apex' needs CUDA, .*on PyPI is another one; build"
    ) as told:
        apply_kernels(InternLM(**SIZES), Kernels(norm='apex'), CPU, torch.float32)
    assert str(told.value).count('strategy.kernels.norm') == 1


def test_a_model_without_the_seam() -> None:
    with pytest.raises(ValueError, match='Linear has no seam `norm`'):
        apply_kernels(nn.Linear(2, 2), Kernels(norm='fused'), CPU, torch.float32)


def test_a_plug_in_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(hidden, weight, labels, label_smoothing=0.0, chunk=1024):
        return linear_cross_entropy(hidden, weight, labels, label_smoothing, chunk)[0], None

    monkeypatch.setitem(CROSS_ENTROPIES.module_dict, 'mine', loss)
    monkeypatch.setitem(NORMS.module_dict, 'mine', rms_norm)
    module = InternLM(**SIZES)
    kernels = check_kernels({'norm': 'mine', 'cross_entropy': 'mine'})
    apply_kernels(module, kernels, CPU, torch.float32)
    assert module.objective.cross_entropy is loss
    stage = InternLM(**SIZES)
    stage.lm_head = None  # as a stage of a pipeline that is not the last
    apply_kernels(stage, kernels, CPU, torch.float32)
    assert stage.objective.cross_entropy is linear_cross_entropy


@pytest.mark.parametrize('objective', ['SimPO', 'PairwiseReward'])
def test_a_loss_that_an_objective_does_not_have(objective: str, monkeypatch) -> None:
    monkeypatch.setitem(CROSS_ENTROPIES.module_dict, 'other', lambda *arguments: None)
    module = InternLM(**SIZES, objective=dict(type=objective))
    with pytest.raises(ValueError, match=r"cross_entropy='other': InternLM has no seam"):
        apply_kernels(module, Kernels(cross_entropy='other'), CPU, torch.float32)
