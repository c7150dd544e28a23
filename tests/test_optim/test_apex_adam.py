"""FusedAdam over a stand-in with apex's documented signature and its way of keeping state."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from internlm_mm.optim import DecayGroupsConstructor, FusedAdam, apex_adam
from tests.helpers import tiny_runner

# As in apex/optimizers/fused_adam.py: steps are counted by the group, moments are made at first
# use, and what reaches the kernel are plain fp32 tensors.
STAND_IN = """
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8,
                 adam_w_mode=True, weight_decay=0., amsgrad=False, set_grad_none=True,
                 capturable=False, master_weights=False):
        if amsgrad:
            raise RuntimeError('FusedAdam does not support the AMSGrad variant.')
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.param_groups_master = None

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None,
             grad_scaler=None):
        if self.param_groups_master is None:
            self.param_groups_master = [[None for p in group['params']]
                                        for group in self.param_groups]
        for group, masters in zip(self.param_groups, self.param_groups_master):
            group['params'][0].device
            if 'step' in group:
                group['step'] += 1
            else:
                group['step'] = 1
            for p, master in zip(group['params'], masters):
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state['exp_avg'] = torch.zeros_like(p.data).float()
                    state['exp_avg_sq'] = torch.zeros_like(p.data).float()
                self.kernel(p.grad.data, p.data, state['exp_avg'], state['exp_avg_sq'], group)

    def kernel(self, g, p, m, v, group):
        for tensor in (g, p, m, v):
            assert type(tensor) is torch.Tensor and tensor.dtype == torch.float32, type(tensor)
            assert tensor.shape == p.shape
        (b1, b2), step, decay = group['betas'], group['step'], group['weight_decay']
        if not self.adam_w_mode:
            g = g + decay * p
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        c1, c2 = (1 - b1 ** step, 1 - b2 ** step) if group['bias_correction'] else (1, 1)
        update = (m / c1) / ((v / c2).sqrt() + group['eps'])
        if self.adam_w_mode:
            update += decay * p
        p.sub_(group['lr'] * update)
"""
OFF_GPU = apex_adam._off_gpu
OPTIONS = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def let_it_run_on_cpus() -> None:
    """The stand-in has no kernels. Ranks are processes of their own, which end with the test."""
    apex_adam._off_gpu = lambda params, without_apex: []


def forget_apex() -> None:
    for name in [name for name in sys.modules if name.split('.')[0] == 'apex']:
        del sys.modules[name]


@pytest.fixture
def apex(tmp_path: Path, write: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = write('path/apex/optimizers/__init__.py', STAND_IN).parents[2]
    write('path/apex/__init__.py', '')
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(apex_adam, '_off_gpu', OFF_GPU)  # what it is again afterwards
    let_it_run_on_cpus()
    forget_apex()
    yield folder
    forget_apex()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def step_of(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    module(rows).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_is_adamw(apex: Path) -> None:
    ours, theirs = network(), network()
    wrapper = DecayGroupsConstructor({'optimizer': dict(type='FusedAdam', **OPTIONS)})(ours)
    groups = [
        {'params': [p for p in theirs.parameters() if p.ndim > 1]},
        {'params': [p for p in theirs.parameters() if p.ndim < 2], 'weight_decay': 0.0},
    ]
    other = AdamW(groups, **OPTIONS)
    for number in range(4):
        for group in (*wrapper.param_groups, *other.param_groups):
            group['lr'] = 0.01 / (1 + number)  # as a schedule does
        step_of(ours, wrapper.optimizer, number)
        step_of(theirs, other, number)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            dict(wrapper.optimizer.state[p]), dict(other.state[q]), rtol=1e-5, atol=1e-7
        )


def test_parameters_without_a_gradient_stay(apex: Path) -> None:
    module = network()
    optimizer = FusedAdam(module.parameters(), **OPTIONS)
    before = module[2].weight.detach().clone()
    module[0](torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(module[2].weight, before) and module[2].weight not in optimizer.state
    step_of(module, optimizer, 1)  # and move as soon as they have one
    assert not torch.equal(module[2].weight, before)


@pytest.mark.parametrize('named', [False, True])
def test_groups_that_are_read_once(apex: Path, named: bool) -> None:
    """Generators, of parameters or of pairs with their names."""
    module = network()
    given = module.named_parameters() if named else module.parameters()
    optimizer = FusedAdam([{'params': given}], **OPTIONS)
    (group,) = optimizer.param_groups
    assert group['params'] == list(module.parameters())


def test_groups_of_both_modes(apex: Path) -> None:
    groups = [{'params': [nn.Parameter(torch.ones(2))], 'adam_w_mode': mode} for mode in (0, 1)]
    with pytest.raises(ValueError, match='adam_w_mode must be the same'):
        FusedAdam(groups).step()


# ----------------------------------------------------------------------------- a whole run

CHANGES = dict(
    val_dataloader=None,
    val_cfg=None,
    default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=3),
)


def run(folder: str, kind: str, path: str, **changes) -> dict[str, Tensor]:
    if path not in sys.path:
        sys.path.insert(0, path)
    let_it_run_on_cpus()
    optimizer = dict(type=kind, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    runner = tiny_runner(Path(folder), optim_wrapper__optimizer=optimizer, **CHANGES, **changes)
    runner.train()
    weights = {name: p.detach() for name, p in runner.model.named_parameters()}
    return {n: w.full_tensor() if hasattr(w, 'full_tensor') else w for n, w in weights.items()}


def test_two_ranks_and_a_resume_from_adamw(two_ranks, apex: Path, tmp_path: Path) -> None:
    expected = run(str(tmp_path / 'adamw'), 'AdamW', str(apex))
    found = two_ranks(run, str(tmp_path / 'two'), 'FusedAdam', str(apex),
                      strategy__parallel={'data_shard': 2})  # fmt: skip
    resumed = run(
        str(tmp_path / 'on'), 'FusedAdam', str(apex), resume=str(tmp_path / 'adamw' / 'iter_3')
    )
    back = run(str(tmp_path / 'back'), 'AdamW', str(apex), resume=str(tmp_path / 'two' / 'iter_3'))
    for weights in (*found, resumed, back):
        for name, value in expected.items():
            # Steps where the second moment is tiny turn rounding in gradients into more.
            assert (weights[name] - value).norm() < 2e-3 * value.norm(), name


# -------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ('device', 'has_gpu', 'reason'),
    [
        ('cpu', False, 'needs CUDA, not cpu; '),
        ('cpu', True, 'needs CUDA, not cpu, where strategy.offload=True keeps parameters; '),
        ('meta', False, 'needs CUDA, which is not here; '),
        ('meta', True, ''),
    ],
)
def test_no_apex(device: str, has_gpu: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    parameter = nn.Parameter(torch.ones(2, device=device))
    message = f"^optim_wrapper.optimizer.type='FusedAdam' {reason}needs NVIDIA's apex.*APEX_CUDA"
    for params in ([parameter], [{'params': [parameter]}]):
        with pytest.raises(ImportError, match=message):
            FusedAdam(params)


def test_apex_without_a_gpu(apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex_adam, '_off_gpu', OFF_GPU)
    with pytest.raises(ValueError, match=r"^optim_wrapper\.optimizer.*'FusedAdam' needs CUDA, n"):
        FusedAdam([nn.Parameter(torch.ones(2))])
    FusedAdam([nn.Parameter(torch.ones(2, device='meta'))])  # a rehearsal, for GPUs elsewhere


@pytest.mark.usefixtures('apex')
def test_numbers_out_of_range() -> None:
    for options, message in (
        ({'lr': -1.0}, r'^optim_wrapper\.optimizer\.lr=-1\.0 must not be negative$'),
        ({'betas': (0.9, 2.0)}, r'^optim_wrapper\.optimizer\.betas=\(0\.9, 2\.0\): each must'),
    ):
        with pytest.raises(ValueError, match=message):
            FusedAdam([nn.Parameter(torch.ones(2))], **options)
