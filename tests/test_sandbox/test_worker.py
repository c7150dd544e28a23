"""The worker alone, in this Python, without any confinement: what it makes of cells."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm_mm.sandbox import worker

TEXT = 2000


class Alone:
    """A worker as a process, spoken to by the frames that its docstring tells of."""

    def __init__(self) -> None:
        self.control, inner = socket.socketpair()
        self.control.settimeout(20)
        self.process = subprocess.Popen(
            [
                sys.executable,
                '-s',
                '-S',
                worker.__file__,
                str(inner.fileno()),
                str(TEXT),
                '3',
                '999',
            ],
            pass_fds=[inner.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        inner.close()
        assert self.receive() == {'ready': list(sys.version_info[:2])}

    def receive(self) -> dict[str, Any]:
        length = int.from_bytes(self.exactly(4), 'big')
        return json.loads(self.exactly(length))

    def exactly(self, count: int) -> bytes:
        data = b''
        while len(data) < count:
            data += self.control.recv(count - len(data)) or pytest.fail('it hung up')
        return data

    def run(self, code: str, kind: str = 'C') -> dict[str, Any]:
        for part in ((kind + code).encode(), b'token'):
            self.control.sendall(len(part).to_bytes(4, 'big') + part)
        answer = self.receive()
        assert answer.pop('token') == 'token'
        return answer

    def end(self) -> tuple[str, str]:
        """What it printed in all."""
        self.control.close()
        out, err = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return out, err


@pytest.fixture(scope='module')
def alone() -> Iterator[Alone]:
    one = Alone()
    yield one
    one.end()


@pytest.mark.parametrize(
    ('code', 'result'),
    [
        ('1 + 1', '2'),
        ('1 + 1;', None),
        ('1 + 1  # two', '2'),
        ('x = 5', None),
        ('None', None),
        ('x = 5\nx', '5'),
        ('for i in range(3): i', None),
        ('if True:\n    7', None),
        ('"a\\nb"', "'a\\nb'"),
        ('print', '<built-in function print>'),
        ('def f(): return 9\nf()', '9'),
        ('', None),
        ('from __future__ import annotations\n8', '8'),
        ('[y := 5, y ** 2]', '[5, 25]'),
    ],
)
def test_the_value_of_the_last_expression(alone: Alone, code: str, result: str | None) -> None:
    answer = alone.run(code)
    assert (answer['status'], answer['result'], answer['error']) == ('ok', result, None)


def test_what_is_defined_stays(alone: Alone) -> None:
    alone.run('import math\nclass A: pass\nvalue = 3')
    assert alone.run('math.floor(value + 0.5), A.__module__')['result'] == "(3, '__main__')"
    alone.run('value * 7')
    assert alone.run('_')['result'] == '21'
    assert (
        alone.run('import pickle; type(pickle.loads(pickle.dumps(A()))) is A')['result'] == 'True'
    )
    assert alone.run('value', kind='P')['status'] == 'error'  # a canary sees nothing of it


def test_errors_show_the_code_and_nothing_of_ours(alone: Alone) -> None:
    alone.run('def broken():\n    return 1 / 0')
    error = alone.run('x = 1\nbroken()')['error']
    assert error.startswith('Traceback (most recent call last):\n  File "<cell ')
    assert 'broken()' in error and 'return 1 / 0' in error
    assert error.endswith('ZeroDivisionError: division by zero\n') and 'worker' not in error
    error = alone.run('x = (')['error']
    assert 'SyntaxError' in error and 'x = (' in error and 'worker' not in error
    error = alone.run('try: 1/0\nexcept ZeroDivisionError as e: raise KeyError(5) from e')['error']
    assert 'direct cause' in error and 'KeyError: 5' in error


def test_errors_that_cannot_be_shown(alone: Alone) -> None:
    bad = 'class Bad(Exception):\n    def __str__(self): raise ValueError\nraise Bad'
    assert 'Bad' in alone.run(bad)['error']
    assert alone.run('raise ValueError("v" * 10**6)')['error'].count('v') <= TEXT
    assert 'SystemExit' in alone.run('exit(3)')['error']
    assert 'KeyboardInterrupt' in alone.run('raise KeyboardInterrupt')['error']
    broken = 'class R:\n    def __repr__(self): raise RuntimeError("no text")\nR()'
    assert 'no text' in alone.run(broken)['error']


def test_help_and_display(alone: Alone) -> None:
    assert alone.run('help(len)')['status'] == 'ok'
    assert alone.run('display(5, "a")')['result'] is None
    assert alone.run('quit')['status'] == 'ok'
    assert 'EOFError' in alone.run('input()')['error']


FIGURES = """
import sys, types
plt = types.ModuleType('matplotlib.pyplot')
class Figure:
    def savefig(self, file, format): file.write(b'picture')
figures = {1: Figure(), 2: Figure()}
plt.get_fignums = lambda: list(figures)
plt.figure = figures.get
plt.close = lambda which: figures.clear()
sys.modules['matplotlib.pyplot'] = plt
"""


def test_open_figures_are_taken_and_closed(alone: Alone) -> None:
    assert alone.run(FIGURES)['images'] == ['cGljdHVyZQ==', 'cGljdHVyZQ==']
    assert alone.run('len(figures)')['result'] == '0'
    assert alone.run('figures[1] = Figure()\n1 / 0')['images'] == []  # an error shows no figures
    assert alone.run('del sys.modules["matplotlib.pyplot"]')['images'] == []


def test_outputs_of_a_worker() -> None:
    one = Alone()
    one.run('import sys\nprint("out")\nprint("err", file=sys.stderr)\nsys.stdout.write("no end")')
    one.run('import os, sys\nsys.stdout.close()\nos.close(1)')
    one.run('print("after", "\\ud800")')
    assert one.end() == ('out\nno endafter \\ud800\n', 'err\n')


def test_an_interrupt() -> None:
    one = Alone()
    answer = one.run(
        'import os, signal\nkept = 5\ndef deep():\n    os.kill(os.getpid(), signal.SIGINT)\n'
        '    while True: pass\ndeep()'
    )
    assert answer['status'] == 'interrupted'
    assert answer['error'].startswith('Interrupted here:\n') and 'deep()' in answer['error']
    assert 'worker' not in answer['error'] and 'CellInterrupt' not in answer['error']
    assert one.run('kept')['result'] == '5'
    os.kill(one.process.pid, 2)  # between cells it is not listened to
    assert one.run('kept')['result'] == '5'
    one.end()


def test_json_is_right() -> None:
    value = {'a': ['x"\\\n\0é\ud800', None, {'b': ''}], 'c': []}
    assert json.loads(worker._to_json(value)) == value
    worker._to_json(value).encode('ascii')


def test_cells_of_long_ago_are_forgotten() -> None:
    one = Alone()
    one.run('def broken():\n    return 1 / 0')
    assert 'return 1 / 0' in one.run('broken()')['error']
    for _ in range(worker.MOST_CELLS):
        one.run('1')
    assert one.run('broken()')['error'].endswith('ZeroDivisionError: division by zero\n')
    one.end()


def test_it_starts_with_little() -> None:
    """Each module costs a start a millisecond or more."""
    code = f'import sys; exec(open({worker.__file__!r}).read(), {{}}); print(*sys.modules)'
    shown = subprocess.run(
        [sys.executable, '-s', '-S', '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {'re', 'enum', 'typing', 'traceback', 'json', 'ast', 'socket'}.isdisjoint(shown)
    assert Path(worker.__file__).name == 'worker.py'
