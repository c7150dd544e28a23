"""What a worker must prove before it gets a cell. Sessions are tested in test_session.py."""

import dataclasses
from pathlib import Path

import pytest

from internlm_mm.sandbox import Limits, Sandbox, SandboxError
from internlm_mm.sandbox.process import StartError
from internlm_mm.sandbox.runner import LiveWorker


@pytest.fixture(scope='module')
def box():
    try:
        one = Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    with one:
        yield one


def start(box: Sandbox, **changes: object) -> LiveWorker:
    command = dataclasses.replace(box._command(box.backend), **changes)
    return LiveWorker(command, Limits(), box._groups, box._traps)


def test_a_worker_stands_still_until_it_is_asked(box: Sandbox) -> None:
    worker = start(box)
    try:
        state = Path(f'/proc/{worker.processes.worker}/stat').read_text().rpartition(') ')[2][0]
        assert state == 'T' and worker.alive and 0 < worker.start_seconds < 20
        worker.begin_cell()
        assert worker.look() is None and worker.over_limit() is None and worker.ran_out() is None
    finally:
        worker.end()
        worker.end()


def test_variables_of_the_host_are_found(box: Sandbox) -> None:
    with pytest.raises(StartError, match='variables of the host are seen'):
        start(box, variables=frozenset({'PATH'}))


def test_a_program_that_is_no_worker(box: Sandbox) -> None:
    with pytest.raises(StartError, match='the interpreter ended at its start'):
        start(box, arguments=lambda *_: ['/bin/true'])
    with pytest.raises(StartError, match='never heard of it'):
        start(box, arguments=lambda *_: ['/bin/sh', '-c', 'echo never heard of it >&2'])
    with pytest.raises(StartError):
        start(box, arguments=lambda life, control, code: ['/bin/sh', '-c', f'echo hi >&{control}'])
