"""Tools found by name, and the desk of one question."""

import time

import pytest

from internlm_mm.agents import Tool, tool
from internlm_mm.evaluation.agent_tools import PYTHON, Desk, find_tool
from internlm_mm.evaluation.programs import Programs


def double(n: int) -> int:
    """Double it."""
    return 2 * n


DOUBLE = tool(double)


def test_tools_are_found() -> None:
    here = f'{__name__}.double'
    for given in (double, DOUBLE, here, f'{__name__}.DOUBLE'):
        found = find_tool(given)
        assert isinstance(found, Tool) and found.name == 'double' and found.function(n=2) == 4
    for wrong, words in (
        (f'{__name__}.dubble', "has no attribute 'dubble'. Did you mean 'double'?"),
        ('no_such_module.f', 'is not found'),
        ('double', 'is not found'),
        (f'{__name__}.__name__', 'is no function'),
    ):
        with pytest.raises(ValueError, match=words):
            find_tool(wrong)


def test_a_desk_tells_what_went_wrong() -> None:
    desk = Desk([DOUBLE], None, 5.0)
    assert desk.call('double', {'n': 4})[0].text == '8'
    assert desk.call('double', {'n': 4})[1] == ''
    assert desk.call('dubble', {'n': 4})[1] == 'unknown_tool'
    assert desk.call('double', {'n': 'x'})[1] == 'schema'
    assert desk.call('python', {'code': '1'})[1] == 'unknown_tool'
    assert 0 < desk.left < 5.0
    desk.close()


def test_time_is_spent_by_all_calls_together() -> None:
    def rest(seconds: float) -> None:
        """Rest."""
        time.sleep(seconds)

    desk = Desk([tool(rest)], None, 0.05)
    assert desk.call('rest', {'seconds': 0.1})[1] == ''
    assert desk.left < 0
    assert desk.call('rest', {'seconds': 0.0})[1] == 'timeout'


def test_an_interpreter_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('internlm_mm.sandbox.sandbox.missing', lambda name: f'no {name} here')
    desk = Desk([PYTHON], Programs(None, 1), 5.0)
    result, kind = desk.call('python', {'code': '1'})
    assert kind == 'sandbox' and result.status == 'error' and 'no sandbox' in result.text
    desk.close()
