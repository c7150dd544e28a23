"""What can be said of options before there is a process group."""

import re
from types import SimpleNamespace

import pytest
import torch

from internlm_mm.optim.loss_scale import DynamicLossScale
from internlm_mm.parallel.options import (
    by_iteration,
    check_dist_cfg,
    check_loss_scale,
    check_options,
)
from internlm_mm.utils.config import parse_cfg_options


@pytest.mark.parametrize(
    ('precision', 'expected'),
    [
        (None, (torch.float32, torch.float32)),
        ({}, (torch.float32, torch.float32)),
        ({'param': 'bfloat16'}, (torch.bfloat16, torch.float32)),
        ({'reduce': 'bfloat16', 'param': 'bfloat16'}, (torch.bfloat16, torch.bfloat16)),
        ({'param': 'float64', 'reduce': 'float64'}, (torch.float64, torch.float64)),
    ],
    ids=str,
)
def test_precision(precision, expected) -> None:
    assert check_options(precision, 'step') == expected


@pytest.mark.parametrize('reshard', ['never', 'step', 'layer'])
def test_reshard(reshard: str) -> None:
    check_options(None, reshard)


@pytest.mark.parametrize(
    ('precision', 'reshard', 'message'),
    [
        (None, 'steps', r"strategy\.reshard='steps'.*'step'"),
        (None, True, r'strategy\.reshard=True.*layer, never, step'),
        ({'reduced': 'float32'}, 'step', r"strategy\.precision\.reduced='float32'.*'reduce'"),
        ({'param': 'float23'}, 'step', r"strategy\.precision\.param.*'float23'"),
        ({'reduce': 'int32'}, 'step', r"strategy\.precision\.reduce.*'int32'"),
    ],
    ids=str,
)
def test_wrong_options(precision, reshard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(precision, reshard)


def test_options_of_the_process_group() -> None:
    check_dist_cfg({})
    check_dist_cfg({'backend': 'gloo', 'timeout': 60})
    with pytest.raises(ValueError, match=r"env_cfg\.dist_cfg\.backnd='nccl'.*'backend'"):
        check_dist_cfg({'backnd': 'nccl'})


def test_fp16_wants_a_loss_scale() -> None:
    unscaled, scaled = SimpleNamespace(loss_scale=None), SimpleNamespace(loss_scale=object())
    for wrapper in (unscaled, object()):
        with pytest.raises(ValueError, match=r"'float16' needs optim_wrapper\.loss_scale") as told:
            check_loss_scale(torch.float16, wrapper)
        # What it says for the command line is what `dict()` means.
        (option,) = re.findall(r'command line (\S+);', str(told.value))
        (value,) = parse_cfg_options([option]).values()
        assert option.startswith('optim_wrapper.loss_scale.initial=')
        assert DynamicLossScale(initial=value) == DynamicLossScale()
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            check_loss_scale(dtype, wrapper)
    check_loss_scale(torch.float16, scaled)


def test_schedulers_count_iterations() -> None:
    built = object()
    found = by_iteration([{'type': 'ConstantLR'}, built, {'type': 'x', 'by_epoch': False}])
    assert found == [{'by_epoch': False, 'type': 'ConstantLR'}, built,
                     {'by_epoch': False, 'type': 'x'}]  # fmt: skip
    assert by_iteration({'type': 'ConstantLR'}) == found[:1]
    with pytest.raises(ValueError, match=r'param_scheduler\.1\.by_epoch=True'):
        by_iteration([{}, {'by_epoch': True}])
