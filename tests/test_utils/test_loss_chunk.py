import pytest

from internlm_mm.utils.loss_chunk import loss_chunk


@pytest.mark.parametrize('in_place', [True, False])
def test_a_config_decides(in_place: bool) -> None:
    assert loss_chunk(7, in_place) == 7


def test_what_a_kernel_saves_is_used() -> None:
    # Logits, their fp32 copy and the gradient against logits alone.
    assert loss_chunk(None, True) * 2 == loss_chunk(None, False) * (2 + 4 + 2)
