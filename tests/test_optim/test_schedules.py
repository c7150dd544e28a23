import math
import warnings

import pytest
import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from internlm_mm.optim import (
    Beta2Schedule,
    HybridZeroOptimWrapper,
    WarmupCosine,
    WarmupStableDecay,
)

PEAK = 3e-4


def wrapper(groups: int = 1, betas: tuple[float, float] = (0.9, 0.95)) -> HybridZeroOptimWrapper:
    parameters = [
        {'params': [nn.Parameter(torch.zeros(2))], 'lr': PEAK / (index + 1)}
        for index in range(groups)
    ]
    return HybridZeroOptimWrapper(torch.optim.AdamW(parameters, betas=betas))


def run(optim: HybridZeroOptimWrapper, schedule, steps: int, key: str = 'lr') -> list:
    """The value each of the first steps trains with."""
    values = []
    for _ in range(steps):
        values.append(optim.param_groups[0][key])
        optim.step()
        schedule.step()
    return values


def test_cosine_at_chosen_steps() -> None:
    optim = wrapper()
    rates = run(optim, WarmupCosine(optim, warmup=4, end=12, min_ratio=0.1), 16)
    assert rates[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK], rel=1e-12)
    assert rates[4] == pytest.approx(PEAK, rel=1e-12)
    assert rates[6] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), rel=1e-12)
    assert rates[8] == pytest.approx(PEAK * 0.55, rel=1e-12)  # half way: between peak and minimum
    assert rates[12:] == pytest.approx([PEAK * 0.1] * 4, rel=1e-12)  # stays there


def test_cosine_is_transformers_after_the_warm_up() -> None:
    optim = wrapper()
    ours = run(optim, WarmupCosine(optim, warmup=5, end=40, min_ratio=0.05), 40)
    theirs_optim = wrapper().optimizer
    theirs_schedule = get_cosine_with_min_lr_schedule_with_warmup(
        theirs_optim, num_warmup_steps=5, num_training_steps=40, min_lr_rate=0.05
    )
    theirs = []
    for _ in range(40):
        theirs.append(theirs_optim.param_groups[0]['lr'])
        theirs_optim.step()
        theirs_schedule.step()
    assert ours[5:] == pytest.approx(theirs[5:], rel=1e-12)
    # Theirs spends step 0 on a rate of 0; ours is theirs one step further.
    assert theirs[0] == 0
    assert ours[:5] == pytest.approx(theirs[1:6], rel=1e-12)


def test_no_warm_up_starts_at_the_peak() -> None:
    optim = wrapper()
    assert run(optim, WarmupCosine(optim, warmup=0, end=10), 1) == [PEAK]


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    optim = wrapper()
    rates = run(optim, WarmupCosine(optim, warmup=100, end=6), 6)
    assert rates == pytest.approx([PEAK * (step + 1) / 100 for step in range(6)], rel=1e-12)


@pytest.mark.parametrize('shape', ['linear', 'sqrt'])
def test_stable_decay_at_chosen_steps(shape: str) -> None:
    optim = wrapper()
    schedule = WarmupStableDecay(optim, warmup=2, decay=4, end=10, min_ratio=0.2, shape=shape)
    rates = run(optim, schedule, 13)
    fall = {
        'linear': [0, 1 / 4, 1 / 2, 3 / 4],
        'sqrt': [0, 1 / 2, math.sqrt(1 / 2), math.sqrt(3 / 4)],
    }
    assert rates[:2] == pytest.approx([PEAK / 2, PEAK], rel=1e-12)
    assert rates[2:7] == pytest.approx([PEAK] * 5, rel=1e-12)
    assert rates[6:10] == pytest.approx([PEAK * (1 - 0.8 * f) for f in fall[shape]], rel=1e-12)
    assert rates[10:] == pytest.approx([PEAK * 0.2] * 3, rel=1e-12)


@pytest.mark.parametrize(('shape', 'theirs_shape'), [('linear', 'linear'), ('sqrt', '1-sqrt')])
def test_stable_decay_is_transformers_after_the_warm_up(shape: str, theirs_shape: str) -> None:
    optim = wrapper()
    ours = run(
        optim, WarmupStableDecay(optim, warmup=3, decay=9, end=30, min_ratio=0.1, shape=shape), 35
    )
    theirs_optim = wrapper().optimizer
    theirs_schedule = get_wsd_schedule(
        theirs_optim,
        num_warmup_steps=3,
        num_decay_steps=9,
        num_training_steps=30,
        decay_type=theirs_shape,
        min_lr_ratio=0.1,
    )
    theirs = []
    for _ in range(35):
        theirs.append(theirs_optim.param_groups[0]['lr'])
        theirs_optim.step()
        theirs_schedule.step()
    assert ours[3:] == pytest.approx(theirs[3:], rel=1e-12)


def test_a_stable_run_can_be_prolonged_from_its_plateau() -> None:
    short = wrapper()
    schedule = WarmupStableDecay(short, warmup=2, decay=4, end=10)
    run(short, schedule, 5)
    state = schedule.state_dict()

    longer = wrapper()
    prolonged = WarmupStableDecay(longer, warmup=2, decay=4, end=20)
    prolonged.load_state_dict(state)
    rest = run(longer, prolonged, 15)

    straight = wrapper()
    assert rest == run(straight, WarmupStableDecay(straight, warmup=2, decay=4, end=20), 20)[5:]


def test_beta2_rises_from_its_initial_value() -> None:
    optim = wrapper(betas=(0.9, 0.95))
    betas = run(optim, Beta2Schedule(optim, exponent=0.8), 200, 'betas')
    assert all(beta1 == 0.9 for beta1, _ in betas)
    # 1 - n ** -0.8 passes 0.95 where n = 20 ** (1 / 0.8) = 42.3
    assert [beta2 for _, beta2 in betas[:42]] == [0.95] * 42
    for step in (42, 43, 99, 199):
        assert betas[step][1] == pytest.approx(1 - math.exp(-0.8 * math.log(step + 1)), rel=1e-12)
    assert betas[99][1] == pytest.approx(0.974881135684904, rel=1e-12)  # 1 - 10 ** -1.6


def test_beta2_stays_where_it_is_at_the_end() -> None:
    optim = wrapper(betas=(0.9, 0.5))
    betas = run(optim, Beta2Schedule(optim, exponent=1.0, end=4), 7, 'betas')
    # max(1 / 2, 1 - 1 / step), steps counted from 1
    assert [beta2 for _, beta2 in betas] == [0.5, 0.5, 1 - 1 / 3, 0.75, 0.75, 0.75, 0.75]


def test_beta2_with_exponent_0_is_left_alone() -> None:
    optim = wrapper(betas=(0.9, 0.95))
    assert run(optim, Beta2Schedule(optim, exponent=0.0), 5, 'betas') == [(0.9, 0.95)] * 5


def make(name: str, optim: HybridZeroOptimWrapper):
    return {
        'cosine': lambda: WarmupCosine(optim, warmup=3, end=17, min_ratio=0.1),
        'wsd': lambda: WarmupStableDecay(optim, warmup=3, decay=6, end=17),
        'beta2': lambda: Beta2Schedule(optim, exponent=0.9),
    }[name]()


@pytest.mark.parametrize('name', ['cosine', 'wsd', 'beta2'])
@pytest.mark.parametrize('position', [0, 1, 3, 12, 16, 30])
def test_jumping_to_a_step_is_stepping_there(name: str, position: int) -> None:
    key = 'betas' if name == 'beta2' else 'lr'
    walked = wrapper()
    schedule = make(name, walked)
    run(walked, schedule, position)
    jumped = wrapper()
    other = make(name, jumped)
    other.load_state_dict(schedule.state_dict())
    assert jumped.param_groups[0][key] == walked.param_groups[0][key]
    assert run(jumped, other, 5, key) == run(walked, schedule, 5, key)


def test_the_state_is_two_integers_so_that_the_config_rules_after_a_resume() -> None:
    optim = wrapper()
    schedule = make('cosine', optim)
    run(optim, schedule, 7)
    assert schedule.state_dict() == {'last_step': 7, '_global_step': 7}


def test_every_group_keeps_its_share_of_the_peak() -> None:
    optim = wrapper(groups=3)
    schedule = WarmupCosine(optim, warmup=0, end=10, min_ratio=0.0)
    run(optim, schedule, 5)
    assert [group['lr'] for group in optim.param_groups] == pytest.approx(
        [PEAK / 2, PEAK / 4, PEAK / 6], rel=1e-12
    )


def test_a_first_step_that_was_skipped_raises_no_warning() -> None:
    optim = wrapper()
    schedule = make('cosine', optim)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        schedule.step()  # the optimizer made no step, as with the first overflow of fp16
        optim.step()
        schedule.step()
    assert optim.param_groups[0]['lr'] == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda o: WarmupCosine(o, warmup=-1, end=9), 'warmup=-1'),
        (lambda o: WarmupStableDecay(o, warmup=-2, decay=1, end=9), 'warmup=-2'),
        (
            lambda o: WarmupStableDecay(o, warmup=2, decay=10, end=9),
            r'decay=10 must lie in \[1, 9\]',
        ),
        (lambda o: WarmupStableDecay(o, warmup=2, decay=0, end=9), 'decay=0'),
        (
            lambda o: WarmupStableDecay(o, warmup=2, decay=3, end=9, shape='cosine'),
            "shape='cosine'",
        ),
        (lambda o: Beta2Schedule(o, exponent=-0.5), 'exponent=-0.5'),
        (lambda o: WarmupCosine(o, warmup=1, end=9, by_epoch=True), 'by_epoch=True'),
    ],
)
def test_bad_options(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(wrapper())
