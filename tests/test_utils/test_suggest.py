"""The end of an error message that proposes a name."""

from pathlib import Path

import pytest

from internlm_mm.utils.suggest import did_you_mean, nearest_path


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


def test_proposes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'data' / 'chat' / 'train').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for wrong, near in (
        ('data/chat/trian', 'data/chat/train'),
        ('data/chta/train', 'data/chat/train'),
        ('data/chta/xyz', 'data/chat'),
        ('dta', 'data'),
        (tmp_path / 'date' / 'chat', tmp_path / 'data' / 'chat'),
    ):
        assert nearest_path(wrong) == f". Did you mean '{near}'?"
    for far in ('data/chat/validation', 'zzz', '/zzzz/data', 'data/chat', '', '.'):
        assert nearest_path(far) == ''
    (tmp_path / 'file').touch()
    assert nearest_path('file/x') == ''
