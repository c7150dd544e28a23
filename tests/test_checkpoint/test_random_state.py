import json
import random

import numpy as np
import pytest
import torch

from internlm_mm.checkpoint.random_state import random_state, set_random_state


def draws() -> list[float]:
    """Numbers of every kind: those that generators keep half of for later, too."""
    return [
        random.random(),
        random.gauss(0, 1),  # makes two and keeps one
        *np.random.rand(3).tolist(),
        np.random.normal(),  # keeps one
        *torch.rand(3).tolist(),
        torch.randn(1).item(),
    ]


@pytest.mark.parametrize('already', range(4))
def test_generators_go_on_where_they_were(already: int) -> None:
    for _ in range(already):
        draws()
    state = random_state()
    expected = [draws() for _ in range(5)]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    draws()
    set_random_state(state)
    assert [draws() for _ in range(5)] == expected


def test_the_state_is_bytes_without_pickle() -> None:
    state = random_state()
    for name, value in state.items():
        assert value.dtype == torch.uint8 and value.ndim == 1, name
    json.loads(bytes(state['python'].tolist()))


def test_reading_the_state_draws_nothing() -> None:
    random_state()
    first = draws()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert draws() == first  # conftest seeds with 0, too
