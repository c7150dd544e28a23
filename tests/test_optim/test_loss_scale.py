import random

import pytest
import torch

from internlm_mm.optim.loss_scale import DynamicLossScale


def test_is_torch_grad_scaler_without_hysteresis() -> None:
    """torch backs off at the first overflow, and starts to count again after each change."""
    options = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=3)
    ours = DynamicLossScale(
        initial=2.0**10, hysteresis=1, minimum=2.0**-30, maximum=2.0**60, **options
    )
    theirs = torch.amp.GradScaler('cpu', init_scale=2.0**10, **options)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs.scale(torch.zeros(1))  # creates the scale lazily
    chance = random.Random(3)
    scales = set()
    for _ in range(200):
        finite = chance.random() < 0.8
        parameter.grad = torch.tensor([1.0 if finite else float('inf')])
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.scale == theirs.get_scale()
        scales.add(ours.scale)
    assert len(scales) > 5  # it went up and down


def test_hysteresis_by_hand() -> None:
    scale = DynamicLossScale(initial=64.0, growth_interval=3, hysteresis=2)
    # (finite?, scale afterwards)
    table = [
        (True, 64),
        (False, 64),  # the first overflow is forgiven
        (True, 64),
        (True, 64),
        (True, 128),  # three in a row: growth, and overflows are forgotten
        (False, 128),  # forgiven again
        (False, 64),
        (False, 32),  # until it grows, every one counts now
        (True, 32),
        (False, 16),
        (True, 16),
        (True, 16),
        (True, 32),
    ]
    for index, (finite, expected) in enumerate(table):
        scale.update(finite)
        assert scale.scale == expected, f'row {index}'


def test_stays_within_its_limits() -> None:
    scale = DynamicLossScale(initial=4.0, growth_interval=1, hysteresis=1, minimum=2.0, maximum=8.0)
    for _ in range(3):
        scale.update(True)
    assert scale.scale == 8.0
    for _ in range(5):
        scale.update(False)
    assert scale.scale == 2.0


def test_state_goes_on_where_it_was() -> None:
    first = DynamicLossScale(initial=64.0, growth_interval=4)
    for finite in (True, False, True, True):
        first.update(finite)
    second = DynamicLossScale(initial=8.0, growth_interval=4)
    second.load_state_dict(first.state_dict())
    for finite in (True, True, False, True, False):
        first.update(finite)
        second.update(finite)
        assert second.scale == first.scale


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'initial': 0.5}, 'minimum=1.0 <= initial=0.5'),
        ({'initial': 2.0**30}, 'maximum=16777216'),
        ({'minimum': 0.0}, '0 < minimum=0.0'),
        ({'growth_interval': 0}, 'growth_interval=0'),
        ({'hysteresis': 0}, 'hysteresis=0'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**options)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match='growth_intervall'):
        DynamicLossScale(growth_intervall=3)
