"""Sessions as chats use them, by the first backend that this machine has."""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from internlm_mm.sandbox import Limits, Sandbox, SandboxError, Session


@pytest.fixture(scope='module')
def sandbox() -> Iterator[Sandbox]:
    try:
        box = Sandbox(limits=Limits(seconds=5, grace_seconds=1.5, code_kb=4), spare=1)
    except SandboxError as error:
        pytest.skip(str(error))
    with box:
        yield box


@pytest.fixture
def session(sandbox: Sandbox) -> Iterator[Session]:
    with sandbox.session() as one:
        yield one


def test_a_chat(session: Session) -> None:
    assert session.run('x = 17 * 23').text == ''
    reply = session.run('print("so")\nx')
    assert (reply.stdout, reply.result, reply.status) == ('so\n', '391', 'ok')
    assert reply.text == 'so\n391' and not reply.fresh and 0 < reply.elapsed < 5
    reply = session.run('undefined')
    assert not reply.ok and 'NameError' in reply.text and not reply.state_lost
    assert session.run('import os; os.getcwd(); open("f", "w").write("kept")').result == '4'
    assert session.run('open("f").read()').result == "'kept'"


def test_sessions_know_nothing_of_each_other(sandbox: Sandbox) -> None:
    with sandbox.session() as one, sandbox.session() as two:
        one.run('secret = 5\nopen("file", "w").write("secret")')
        assert 'NameError' in two.run('secret').text
        assert 'FileNotFoundError' in two.run('open("file")').text
        where = one.run('import os; os.getcwd()').result or ''
        assert 'Error' in two.run(f'open({where} + "/file")').text
        assert one.run('secret').result == '5'


def test_a_session_whose_interpreter_was_killed(session: Session) -> None:
    session.run('x = 5')
    reply = session.run('import os; os._exit(1)')
    assert reply.state_lost and not session.alive
    reply = session.run('x')
    assert reply.fresh and 'NameError' in reply.text and 'restarted' in reply.text
    assert not session.run('1').fresh


def test_code_that_is_too_long_and_no_time(session: Session) -> None:
    with pytest.raises(ValueError, match='code_kb=4'):
        session.run('#' * 5000)
    for seconds in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='seconds='):
            session.run('1', seconds=seconds)
    assert session.run('1').result == '1'


def test_from_many_threads(session: Session) -> None:
    """One at a time; and a session lives on after the thread in which it was made."""
    results: list[str | None] = []
    session.run('n = 0')

    def work() -> None:
        for _ in range(5):
            results.append(session.run('n += 1\nn').result)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, filter(None, results))) == list(range(1, 21))


def test_made_in_a_thread_that_ends(sandbox: Sandbox) -> None:
    made: list[Session] = []
    for _ in range(2):  # the second is no spare: it is started by this call
        thread = threading.Thread(target=lambda: made.append(sandbox.session()))
        thread.start()
        thread.join()
    time.sleep(0.1)
    for one in made:
        assert one.run('6 * 7').result == '42'
        one.close()


def test_an_interpreter_that_is_idle(session: Session) -> None:
    session.run('x = 5')
    assert not session.rest(60) and session.alive
    assert session.rest(0) and not session.alive
    assert not session.rest(0)
    reply = session.run('"x" in globals()')
    assert reply.result == 'False' and reply.fresh


def test_a_session_that_is_closed(sandbox: Sandbox) -> None:
    session = sandbox.session()
    session.close()
    session.close()
    with pytest.raises(SandboxError, match='closed'):
        session.run('1')


# Where the interpreter has opened a file and not yet entered its `with`, nobody closes it.
@pytest.mark.filterwarnings('ignore:unclosed:ResourceWarning')
def test_ctrl_c_in_the_host_ends_the_cell(session: Session) -> None:
    session.run('x = 5')
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.run('while True: pass')
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not session.alive
    assert session.run('"x" in globals()').fresh


def test_signals_that_a_cell_has_blocked(session: Session) -> None:
    session.run('import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64)); x = 5')
    assert session.run('while True: pass', 0.1).status == 'interrupted'
    assert session.run('x').result == '5'


def test_an_error_whose_text_never_ends(session: Session) -> None:
    session.run('class E(Exception):\n    def __str__(self):\n        while True: pass\nx = 5')
    reply = session.run('raise E', 0.2)
    assert reply.status == 'interrupted' and reply.timed_out and 'raise E\nE: ' in reply.text
    assert session.run('x').result == '5'


def test_an_alarm_ends_with_its_cell(session: Session) -> None:
    session.run('import signal; x = 5; signal.setitimer(signal.ITIMER_REAL, 0.05)')
    time.sleep(0.1)
    assert session.run('import time; time.sleep(0.1); x').result == '5'


def test_beside_a_thousand_open_files(sandbox: Sandbox) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = len(os.listdir('/proc/self/fd')) + 1400
    if hard[1] < enough:
        pytest.skip('this process may not open so many files')
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard[1]))
    held = []
    try:
        while len(held) < 1100:
            held.append(os.open('/dev/null', os.O_RDONLY))
        for _ in range(2):
            with sandbox.session() as one:
                assert one.run('6 * 7').result == '42'
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)


def test_a_cell_that_is_interrupted_from_outside_keeps_the_state(session: Session) -> None:
    session.run('x = 5')
    session.interrupt()  # of no cell
    assert session.run('x').result == '5'
    timer = threading.Timer(0.3, session.interrupt)
    timer.start()
    reply = session.run('import time\nx = 6\ntime.sleep(60)')
    timer.join()
    assert (reply.status, reply.limit, reply.timed_out) == ('interrupted', 'asked', False)
    assert 'asked to stop the cell' in reply.text and reply.elapsed < 4
    assert session.run('x').result == '6'


def test_closing_what_runs_in_a_handler_of_signals(sandbox: Sandbox) -> None:
    """As one of SIGTERM does: the main thread has the session just then."""
    session = sandbox.session()
    before = signal.signal(signal.SIGALRM, lambda number, frame: session.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(SandboxError, match='closed while its cell ran'):
            session.run('while True: pass')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(SandboxError, match='closed'):
        session.run('1')
    with sandbox.session() as other:
        assert other.run('6 * 7').result == '42'


def test_closing_what_runs_in_another_thread(sandbox: Sandbox) -> None:
    session = sandbox.session()
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(session.run('import time; time.sleep(60)', 60))
    )
    thread.start()
    time.sleep(0.2)
    session.close()
    thread.join(timeout=20)
    assert [reply.limit for reply in replies] == ['asked'] and not session.alive
