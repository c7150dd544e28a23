"""Products in 8 bits, computed in the wide dtype from rounded operands, which runs on a CPU."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.parallel import float8
from internlm_mm.parallel.float8 import (
    Float8,
    apply_float8,
    check_float8,
    check_partners,
    check_skip,
    rounded_weights,
)
from internlm_mm.parallel.mesh import Layout
from internlm_mm.parallel.place import Techniques, place_model
from internlm_mm.utils.shards import local_tensor
from tests.helpers import tiny_runner
from tests.strategies import OPTIM, strategy

CPU = torch.device('cpu')
MODEL = dict(
    type=InternLM, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2
)
has_torchao = pytest.mark.skipif(
    importlib.util.find_spec('torchao') is None, reason='torchao is not installed'
)
# torchao warns of its own use of torch, and of kernels that it was not built with.
quiet = pytest.mark.filterwarnings('ignore')


def model(**sizes: int) -> InternLM:
    return InternLM(**{k: v for k, v in (MODEL | sizes).items() if k != 'type'})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'recipy': 'x'}, r"strategy\.float8\.recipy='x' is unknown.*'recipe'"),
        ({'recipe': 'tensorwize'}, r"strategy\.float8\.recipe='tensorwize'.*'tensorwise'"),
        ({'recipe': 'rowwise', 'all_gather': True}, r"works with recipe='tensorwise'"),
        ({'recipe': 8}, r'strategy\.float8\.recipe=8\. Valid: rowwise, '),
        (
            {'skip': '*.down_proj'},
            r"float8\.skip='\*\.down_proj': expected a list of globs, as \['",
        ),
        ({'skip': 7}, r'strategy\.float8\.skip=7: expected a list of globs'),
        ({'skip': [3]}, r'strategy\.float8\.skip=\[3\]: expected a list of globs'),
        ({'skip': None}, r'strategy\.float8\.skip=None: expected a list of globs'),
        ({'emulate': 'no'}, r"strategy\.float8\.emulate='no': expected True or False"),
        ({'emulate': None}, r'strategy\.float8\.emulate=None: expected True or False'),
        ({'all_gather': 'maybe'}, r"float8\.all_gather='maybe': expected True, False or None"),
        ({'all_gather': 1}, r'float8\.all_gather=1: expected True, False or None'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_float8(options, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        strategy(float8=options)


def test_options() -> None:
    assert check_float8(None, torch.float64) is None
    assert check_float8({}, torch.bfloat16) == Float8()
    assert Float8().gathers and not Float8(recipe='rowwise').gathers
    assert not Float8(all_gather=False).gathers
    assert check_float8({'all_gather': None, 'skip': ['*.x']}, torch.bfloat16) == Float8(
        skip=('*.x',)
    )
    with pytest.raises(ValueError, match='float64'):
        check_float8({}, torch.float64)


@pytest.mark.parametrize(
    ('pattern', 'near'),
    [
        ('*.dwn_proj', '*.down_proj'),
        ('layers.0', 'layers.0.*'),
        ('layer.1.*', 'layers.1.*'),
        ('down_proj', '*.down_proj'),
    ],
)
def test_a_glob_that_leaves_nothing_out(pattern: str, near: str) -> None:
    options = Float8(skip=('layers.1.*', 'lm_head', pattern), all_gather=False, emulate=True)
    message = rf"skip: '{re.escape(pattern)}' matches no linear layer.*'{re.escape(near)}'"
    with pytest.raises(ValueError, match=message):
        rounded_weights(model(), options)
    with pytest.raises(ValueError, match=message):
        place_model(
            model(), Layout(), 0, None, Techniques(float8=options), CPU
        )  # before torchao is asked for
    check_skip(model(), Float8(skip=('layers.1.*', '*.mlp.*', 'layers.?.self_attn.q_proj')))


def test_techniques_that_it_does_not_go_with() -> None:
    check_partners(1, False)
    with pytest.raises(ValueError, match=r'parallel\.tensor=2'):
        check_partners(2, False)
    with pytest.raises(ValueError, match=r'kernels\.fuse=True'):
        check_partners(1, True)


def test_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'strategy\.float8 needs CUDA in half precision, not cpu'):
        apply_float8(model(), Float8(), CPU, torch.bfloat16, True)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    with pytest.raises(ValueError, match='needs a GPU of sm_89 or newer, not sm_80'):
        apply_float8(model(), Float8(), torch.device('cuda'), torch.bfloat16, True)


def test_a_missing_torchao_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Float8(emulate=True)
    absent = float8.Needs(module='no_such_torchao', install="pip install 'internlm_mm[fp8]'")
    monkeypatch.setattr(float8, '_EMULATED', absent)
    with pytest.raises(ValueError, match=r"not installed: pip install 'internlm_mm\[fp8\]'"):
        apply_float8(model(), needs, CPU, torch.bfloat16, True)


def batches(count: int) -> list:
    rows = RandomTokens(seq_len=16, vocab_size=64, seed=5)
    return [collate_rows([rows[2 * i], rows[2 * i + 1]]) for i in range(count)]


def train(steps: int, float8: dict | None, **options) -> tuple:
    """Losses, gradients' norms and weights of some steps on whatever ranks there are."""
    made = strategy(float8=float8, precision=dict(param='bfloat16'), **options)
    made.prepare(dict(MODEL), optim_wrapper=OPTIM | dict(optimizer=dict(type=AdamW, lr=0.003)))
    losses = []
    for _ in range(steps):
        own = batches(2 * made.data_world_size)[made.data_rank :: made.data_world_size]
        sums = made.forward_backward(own, 2 * made.data_world_size * 32)
        losses.append(sums['loss'].item() / (2 * made.data_world_size * 32))
        made.optim_wrapper.update_params()
    return made, losses


@has_torchao
@quiet
@pytest.mark.parametrize('recipe', float8.RECIPES)
def test_which_layers(recipe: str) -> None:
    module = model(intermediate_size=56)  # which 16 does not divide
    names = [name for name, _ in module.named_parameters()]
    text = apply_float8(module, Float8(recipe=recipe, emulate=True), CPU, torch.bfloat16, False)
    assert text == f'{recipe}, 8 linear layers, 6 left as they are'
    kinds = {name: type(m).__name__ for name, m in module.named_modules() if hasattr(m, 'weight')}
    assert kinds['lm_head'] == kinds['layers.0.mlp.up_proj'] == 'Linear'
    assert kinds['layers.1.self_attn.o_proj'] == 'Float8Linear'
    assert [name for name, _ in module.named_parameters()] == names
    with pytest.raises(ValueError, match='no linear layer'):
        apply_float8(model(), Float8(skip=('*',), emulate=True), CPU, torch.bfloat16, False)


def test_which_weights_are_gathered_in_8_bits() -> None:
    names = {name for name, _ in model().named_parameters()}
    wide = {name for name in names if '_proj.weight' in name}
    assert rounded_weights(model(), Float8()) == wide and len(wide) == 14
    assert rounded_weights(model(), Float8(skip=('layers.0.*',))) == {
        name for name in wide if name.startswith('layers.1.')
    }
    uneven = rounded_weights(model(intermediate_size=56), Float8())  # which 16 does not divide
    assert uneven == {name for name in wide if 'self_attn' in name}
    for options in (None, Float8(recipe='rowwise'), Float8(all_gather=False)):
        assert rounded_weights(model(), options) == frozenset()


@has_torchao
@quiet
def test_layers_can_be_left_out() -> None:
    module = model()
    options = Float8(skip=('layers.0.*', '*.down_proj'), emulate=True)
    text = apply_float8(module, options, CPU, torch.bfloat16, False)
    assert text == 'tensorwise, 6 linear layers, 8 left as they are'
    assert type(module.layers['0'].mlp.up_proj) is nn.Linear


@pytest.fixture
def no_group_left_behind():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def check_training(recipe: str, reshard: str) -> tuple[list[float], list[float]]:
    """The loss follows bf16's, and the checkpoint's view of the weights is the plain one."""
    options = dict(recipe=recipe, emulate=True)
    made, rounded = train(4, options, reshard=reshard)
    plain, losses = train(4, None, reshard=reshard)
    state, expected = made.model_state_dict(), plain.model_state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert type(local_tensor(tensor)) is type(tensor.to_local()) is Tensor, name
        assert tensor.shape == expected[name].shape and tensor.dtype == torch.float32
        assert tensor.placements == expected[name].placements
    return rounded, losses


@has_torchao
@quiet
@pytest.mark.parametrize('reshard', ['step', 'layer', 'never'])
@pytest.mark.parametrize('recipe', ['tensorwise', 'rowwise'])
def test_training_on_two_ranks(two_ranks, recipe: str, reshard: str) -> None:
    for rounded, losses in two_ranks(check_training, recipe, reshard):
        assert rounded != losses
        # Operands have 3 bits of mantissa; their errors cancel over 32 to 48 summands.
        assert rounded == pytest.approx(losses, rel=0.02)


def losses_of(rounded: bool, **options) -> list[float]:
    return train(4, dict(emulate=True) if rounded else None, **options)[1]


@has_torchao
@quiet
@pytest.mark.parametrize(
    'options',
    [
        {'parallel': {'data_replicate': 2}},
        {'parallel': {'pipeline': 2}},
        {'parallel': {'context': 2}},
        {'offload': True},
        {'recompute': 1.0},
    ],
    ids=str,
)
def test_what_it_goes_with(two_ranks, options: dict) -> None:
    answers = [two_ranks(losses_of, rounded, **options) for rounded in (True, False)]
    for rounded, losses in zip(*answers, strict=True):
        assert rounded != losses and rounded == pytest.approx(losses, rel=0.02)


@has_torchao
@quiet
def test_training_in_one_process(no_group_left_behind) -> None:
    rounded, losses = check_training('tensorwise', 'step')
    assert rounded != losses and rounded == pytest.approx(losses, rel=0.02)


def scales_of(module: nn.Module) -> list[Tensor | None]:
    weights = [m.weight for m in module.modules() if type(m).__name__ == 'Float8Linear']
    return [weight._local_tensor._precomputed_scale for weight in weights]


def check_scales() -> tuple[bool, bool, bool]:
    made, _ = train(1, dict(emulate=True))
    scales = scales_of(made.model)
    wholes = [
        p.full_tensor().abs().max().item()
        for name, p in made.model_state_dict().items()
        if name.endswith('_proj.weight')
    ]
    precomputed = all(
        scale is not None and scale.item() == pytest.approx(448 / whole, rel=1e-6)
        for scale, whole in zip(scales, wholes, strict=True)
    )
    forgotten = scales_of(made.model) == [None] * len(scales)
    # What is written into the checkpoint's view is what is gathered.
    for tensor in made.model_state_dict().values():
        tensor.to_local().mul_(0)
    zero = all(local_tensor(p).abs().max().item() == 0 for p in made.model.parameters())
    return precomputed, forgotten, zero


@has_torchao
@quiet
def test_scales_are_of_whole_weights_and_are_forgotten_when_weights_may_change(two_ranks) -> None:
    assert two_ranks(check_scales) == [(True, True, True)] * 2


def steps_with_and_without_scales(precompute: bool) -> list[float]:
    made, _ = train(1, dict(emulate=True))
    losses = []
    for _ in range(2):
        if not precompute:
            made.model_state_dict()  # forgets them
        losses.append(made.forward_backward(batches(1), 32)['loss'].item())
        made.optim_wrapper.update_params()
    return losses


@has_torchao
@quiet
def test_scales_found_after_the_update_are_those_found_while_gathering(two_ranks) -> None:
    """So a step after a checkpoint, which forgets them, is the step it would have been."""
    assert two_ranks(steps_with_and_without_scales, True) == two_ranks(
        steps_with_and_without_scales, False
    )


@has_torchao
@quiet
def test_parameters_stay_sharded_masters(no_group_left_behind) -> None:
    made, _ = train(0, dict(emulate=True))
    weight = made.model.layers['0'].mlp.up_proj.weight
    assert isinstance(weight, DTensor) and weight.dtype == torch.float32
    assert hasattr(weight._local_tensor, 'fsdp_pre_all_gather')
    assert type(local_tensor(weight)) is Tensor


# ------------------------------------------------------------------------------- a whole run


def run(folder: str, rounded: bool, **changes) -> tuple[dict[str, Tensor], list[str]]:
    """Six steps with a checkpoint after three."""
    runner = tiny_runner(
        Path(folder),
        val_dataloader=None,
        val_cfg=None,
        default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=3),
        strategy__precision=dict(param='bfloat16'),
        strategy__float8=dict(emulate=True) if rounded else None,
        **changes,
    )
    runner.train()
    state = runner.strategy.model_state_dict()
    return {k: v.full_tensor() for k, v in state.items()}, sorted(runner.model.state_dict())


@has_torchao
@quiet
def test_checkpoints_know_nothing_of_it(two_ranks, tmp_path: Path) -> None:
    halves = dict(strategy__parallel={'data_shard': 2})
    ((whole, names), _) = two_ranks(run, str(tmp_path / 'whole'), True, **halves)
    middle = str(tmp_path / 'whole' / 'iter_3')
    ((resumed, _), _) = two_ranks(run, str(tmp_path / 'on'), True, resume=middle, **halves)
    ((plain, plain_names), _) = two_ranks(
        run, str(tmp_path / 'plain'), False, resume=middle, **halves
    )
    assert names == plain_names == sorted(whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
        torch.testing.assert_close(plain[name], value, rtol=0.2, atol=0.05)
    assert any(not torch.equal(plain[name], value) for name, value in whole.items())
