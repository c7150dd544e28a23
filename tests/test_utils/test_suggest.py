"""The end of an error message that proposes a name."""

import pytest

from internlm_mm.utils.suggest import did_you_mean


@pytest.mark.parametrize(
    ('value', 'choices', 'expected'),
    [
        ('num_layer', ['num_heads', 'num_layers'], " Did you mean 'num_layers'?"),
        ('x', ['beta', 'alpha'], ' Valid: alpha, beta.'),
        ('x', [], ''),
        ('q', [f'{i:04}' for i in range(21)], ''),
        (3, [1, 2], ' Valid: 1, 2.'),
    ],
)
def test_proposes(value: object, choices: list, expected: str) -> None:
    assert did_you_mean(value, choices) == expected
