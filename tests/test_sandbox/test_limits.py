import dataclasses

import pytest

from internlm_mm.sandbox import Limits


@pytest.mark.parametrize('field', [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize('value', [0, -1, True, '5', None, 1e9, float('nan')])
def test_every_limit_is_a_number_above_zero(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f'{field}='):
        Limits(**{field: value})


def test_what_counts_is_whole() -> None:
    assert Limits(seconds=0.5).seconds == 0.5
    with pytest.raises(ValueError, match=r'memory_mb=100\.5 must be a whole number'):
        Limits(memory_mb=100.5)


@pytest.mark.parametrize(
    ('field', 'value'), [('memory_mb', 10), ('processes', 2), ('open_files', 8)]
)
def test_less_than_a_session_needs(field: str, value: int) -> None:
    with pytest.raises(ValueError, match='at least'):
        Limits(**{field: value})


def test_the_largest_honest_reply_fits() -> None:
    limits = Limits(output_chars=10, images=2, image_mb=1)
    image = (1 << 20) * 4 // 3
    assert limits.reply_bytes > 2 * image + 10 * 12 * 6
