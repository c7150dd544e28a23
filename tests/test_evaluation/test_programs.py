"""Programs in the sandbox, and what becomes of those that go wrong."""

from collections.abc import Iterator

import pytest

from internlm_mm.evaluation.programs import Programs, Run, error_class, run_cells
from internlm_mm.sandbox import Reply, SandboxError


@pytest.fixture
def programs() -> Iterator[Programs]:
    one = Programs({'limits': {'seconds': 1.0}}, sessions=4)
    try:
        one.check()
    except ValueError as error:
        pytest.skip(str(error))
    yield one
    one.close()


def test_cells_go_on_where_others_ended(programs: Programs) -> None:
    assert run_cells(programs, ['x = 6', 'print(1)', 'x * 7']) == Run('', '42', '42')
    assert run_cells(programs, ['x']).error == 'name_error'  # a session of its own
    failed = run_cells(programs, ['def f():\n    assert 1 == 2, "no\\nnever"', 'f()', '1'])
    assert failed.error == 'assertion' and failed.result == '' and 'never' in failed.text
    assert run_cells(programs, ['x = 1', 'while True: pass']).error == 'timeout'
    assert run_cells(programs, ['import os; os._exit(0)', '1']).error == 'killed'
    assert run_cells(programs, ['#' * 300_000]).error == 'code_kb'


def test_sessions_end_with_the_task(programs: Programs) -> None:
    session = programs.session()
    assert session.run('1').ok
    programs.close()
    with pytest.raises(SandboxError, match='closed'):
        session.run('1')
    assert run_cells(programs, ['2']).result == '2'  # opens it again


@pytest.mark.parametrize(
    ('reply', 'kind'),
    [
        (Reply('error', error='Traceback\n  File\n    x\nAssertionError'), 'assertion'),
        (Reply('error', error='Traceback\n  File\n    x\nAssertionError: a\nb'), 'assertion'),
        (Reply('error', error='  File\n    x\n    ^\nSyntaxError: invalid syntax'), 'syntax'),
        (Reply('error', error='  File\nIndentationError: unexpected indent'), 'syntax'),
        (
            Reply('error', error="Traceback\n  File\nModuleNotFoundError: No module 'x'"),
            'no_module',
        ),
        (Reply('error', error="Traceback\n  File\nKeyError: 'AssertionError'"), 'raised'),
        (Reply('error', error='Traceback\n  File\nMemoryError'), 'memory_mb'),
        (Reply('error'), 'raised'),
        (Reply('interrupted', limit='cpu_seconds'), 'timeout'),
        (Reply('killed', limit='memory_mb'), 'memory_mb'),
        (Reply('killed'), 'killed'),
    ],
)
def test_classes(reply: Reply, kind: str) -> None:
    assert error_class(reply) == kind


def test_settings_that_are_none() -> None:
    for settings, words in (
        ({'limit': {}}, "sandbox.limit is unknown. Did you mean 'limits'?"),
        ({'limits': {'second': 1}}, "sandbox.limits.second is unknown. Did you mean 'seconds'?"),
        ({'limits': {'seconds': 0}}, 'sandbox.limits.seconds=0'),
    ):
        with pytest.raises(ValueError) as refused:
            Programs(settings, 1)
        assert words in str(refused.value)
    with pytest.raises(ValueError, match="backend='bubblwrap'"):
        Programs({'backend': 'bubblwrap'}, 1).check()


def test_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('internlm_mm.sandbox.sandbox.missing', lambda name: f'no {name} here')
    programs = Programs(None, 1)
    with pytest.raises(ValueError, match=r'(?s)need a sandbox.*no bubblewrap here.*Install'):
        programs.check()
    assert run_cells(programs, ['1']).error == 'sandbox'
