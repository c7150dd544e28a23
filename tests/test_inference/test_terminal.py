"""The terminal, without a terminal."""

import builtins
import io

import pytest

from internlm_mm.inference import Sampling
from internlm_mm.inference.terminal import complete, interact


class Echo:
    """Continues every prompt with itself, backwards; refuses the empty one."""

    def stream(self, prompt, sampling):
        if not prompt:
            raise ValueError('a prompt is empty')
        yield from reversed(prompt)


def test_complete():
    out = io.StringIO()
    complete(Echo(), 'abc', Sampling(), out)
    assert out.getvalue() == 'abccba\n'


def test_nothing_is_written_for_a_prompt_that_fails():
    out = io.StringIO()
    with pytest.raises(ValueError, match='empty'):
        complete(Echo(), '', Sampling(), out)
    assert out.getvalue() == ''


@pytest.mark.parametrize('end', [EOFError, KeyboardInterrupt])
def test_interact_goes_on_after_an_error_and_leaves_at_the_end(monkeypatch, capsys, end):
    lines = iter(['ab', '', 'cd'])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise end from None

    monkeypatch.setattr(builtins, 'input', read)
    interact(Echo(), Sampling())
    printed = capsys.readouterr()
    assert 'abba\n' in printed.out and 'cddc\n' in printed.out
    assert printed.err == 'error: a prompt is empty\n'
