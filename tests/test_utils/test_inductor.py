"""Options of torch's compiler, by their dotted names, and what it finds out."""

import threading

import pytest
from torch._inductor import cpu_vec_isa

from internlm_mm.utils.inductor import known_options, look_for_vectors


def test_what_this_torch_does_not_know_is_left_out() -> None:
    options = {'triton.no_such_option': 1, 'no_such_group.x': 2, 'cpp.dynamic_threads': True}
    assert known_options(options) == {'cpp.dynamic_threads': True}
    assert known_options({'triton.mix_order_reduction': False})


def test_vectors_are_looked_for_once_and_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def look() -> None:
        seen.append(threading.current_thread())
        begun.set()
        assert may_end.wait(60)
        raise RuntimeError('no compiler')  # is for who compiles

    monkeypatch.setattr(cpu_vec_isa, 'valid_vec_isa_list', look)
    look_for_vectors.cache_clear()
    try:
        thread = look_for_vectors()
        assert begun.wait(60) and thread.is_alive()  # nobody waited for it
        assert look_for_vectors() is thread
        may_end.set()
        thread.join(60)
        assert not thread.is_alive() and seen == [thread]
    finally:
        may_end.set()
        look_for_vectors.cache_clear()
