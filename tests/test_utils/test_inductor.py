"""Options of torch's compiler, by their dotted names."""

from internlm_mm.utils.inductor import known_options


def test_what_this_torch_does_not_know_is_left_out() -> None:
    options = {'triton.no_such_option': 1, 'no_such_group.x': 2, 'cpp.vec_isa_ok': True}
    assert known_options(options) == {'cpp.vec_isa_ok': True}
    assert known_options({'triton.mix_order_reduction': False})
