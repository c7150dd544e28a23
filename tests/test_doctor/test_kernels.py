"""Which kernels can run, asked of a CPU and of a GPU that is not there."""

from collections.abc import Callable

import pytest
import torch

from internlm_mm.doctor.kernels import examine_kernels
from internlm_mm.parallel.kernels import Kernels, apply_kernels
from internlm_mm.registry import CROSS_ENTROPIES, NORMS
from tests.test_parallel.test_kernels import SIZES, InternLM


def test_on_a_cpu() -> None:
    found = examine_kernels(torch.device('cpu'), torch.float32)
    assert [name for name, reasons in found.items() if not reasons] == [
        'strategy.kernels.norm=fused',
        'strategy.kernels.norm=torch',
        'strategy.kernels.cross_entropy=torch',
    ]
    assert found['strategy.kernels.norm=liger'][0] == 'needs CUDA, not cpu in torch.float32'
    assert "on PyPI is another one; build NVIDIA's" in found['strategy.kernels.norm=apex'][1]
    assert not any('norm=' in reason for reason in found['strategy.kernels.norm=apex'])
    assert 'needs CUDA in half precision' in found['strategy.float8'][0]
    assert "needs NVIDIA's apex, which is not" in found['optim_wrapper.optimizer.type=FusedAdam'][1]


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize(('key', 'registry'), [('norm', NORMS), ('cross_entropy', CROSS_ENTROPIES)])
def test_it_says_what_a_run_would(device: str, key: str, registry) -> None:
    found = examine_kernels(torch.device(device), torch.bfloat16)
    for name in registry.module_dict:
        reasons = found[f'strategy.kernels.{key}={name}']
        try:
            kernels = Kernels(**{key: name})
            apply_kernels(InternLM(**SIZES), kernels, torch.device(device), torch.bfloat16)
            told = ''
        except (ValueError, ImportError) as error:
            told = str(error)
        assert bool(told) == bool(reasons) and all(reason in told for reason in reasons), name


def test_the_other_package_of_that_name(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex is not imported to find out that it is not NVIDIA's."""
    path = write('apex/__init__.py', 'raise SystemExit("was imported")')
    monkeypatch.syspath_prepend(path.parents[1])
    found = examine_kernels(torch.device('cpu'), torch.float32)
    (_, told) = found['optim_wrapper.optimizer.type=FusedAdam']
    assert 'pip uninstall -y apex' in told
