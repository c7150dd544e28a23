"""Programs that want to be taken for something else. Each test says what the host sees of it."""

import zlib

import pytest

from internlm_mm.sandbox import check_png
from tests.pictures import RIGHT, png
from tests.sandbox_host import SMALL, Host, attack, well

FORGE = """
import os, json, socket, stat, sys

def channel():
    for number in range(3, 200):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                return number
        except OSError:
            pass

def frame(data):
    return len(data).to_bytes(4, 'big') + data

def answer(token, result='forged', **more):
    return frame(json.dumps(dict(token=token, status='ok', result=result, rich={}, images=[],
                                 error=None) | more).encode())
"""


@pytest.mark.parametrize(
    'forged',
    [
        'answer("")',
        pytest.param('answer("0" * 32)', marks=pytest.mark.slow),
        pytest.param('answer(None)', marks=pytest.mark.slow),
        'frame(b"[" * 100_000)',
        'frame(b"not json")',
        pytest.param('frame(b"1" * 100_000)', marks=pytest.mark.slow),
        pytest.param('frame(b"{}")', marks=pytest.mark.slow),
        pytest.param('frame(b"")', marks=pytest.mark.slow),
        '(1 << 31).to_bytes(4, "big")',
        pytest.param('b"\\xff" * 4096', marks=pytest.mark.slow),
        'b"x"',
        'answer("") + answer("")',
    ],
)
def test_an_answer_in_place_of_the_worker(host: Host, forged: str) -> None:
    reply = host.run(f'{FORGE}\nos.write(channel(), {forged})\nwhile True: pass', 1.5)
    assert reply.status == 'killed', reply
    assert reply.result is None and 'forged' not in reply.text
    assert 'protocol' in (reply.error or '') or reply.limit == 'seconds'
    assert host.run('6 * 7').fresh
    well(host)


def test_an_answer_with_the_token_is_for_this_cell_only(host: Host) -> None:
    """Code that reads the channel can answer its own cell, as it could print; never the next."""
    stolen = (
        f'{FORGE}\nnumber = channel()\n'
        'token = os.read(number, 36)[4:].decode()\n'
        'os.write(number, answer(token))\n'
        'while True: pass'
    )
    first = host.run(stolen, 0.2)
    assert first.status in ('ok', 'interrupted', 'killed')
    second = host.run('6 * 7', 0.2)
    if second.status == 'killed':
        assert second.result is None
        second = host.run('6 * 7')
        assert second.fresh
    assert second.result == '42'


def test_an_answer_for_the_next_cell(host: Host) -> None:
    first = host.run(
        f'{FORGE}\nimport threading, time\nnumber = channel()\ndef later():\n'
        '    time.sleep(0.05)\n'
        '    os.write(number, answer("0" * 32))\n'
        'threading.Thread(target=later, daemon=True).start()'
    )
    assert first.ok
    reply = host.run('import time; time.sleep(0.5); 6 * 7', 2)
    assert reply.result is None and reply.status == 'killed' and 'protocol' in reply.text, reply
    well(host)


@pytest.mark.parametrize(
    'code',
    [
        'os.close(channel())',
        pytest.param('os.dup2(os.open("/dev/null", os.O_RDWR), channel())', marks=pytest.mark.slow),
        'os.closerange(0, 200)',
        pytest.param(
            'socket.socket(fileno=channel()).shutdown(socket.SHUT_RDWR)', marks=pytest.mark.slow
        ),
    ],
)
def test_a_channel_that_is_closed(host: Host, code: str) -> None:
    reply = host.run(f'{FORGE}\n{code}', 1.5)
    assert reply.status == 'killed' and reply.state_lost, reply
    assert 'all that was defined is lost' in (reply.error or '')
    assert host.run('6 * 7').fresh


@pytest.mark.parametrize(
    'code',
    [
        'import os; os._exit(0)',
        pytest.param('import os; os._exit(77)', marks=pytest.mark.slow),
        pytest.param('import os; os.abort()', marks=pytest.mark.slow),
        'import ctypes; ctypes.CDLL(None).exit(3)',
        pytest.param('import ctypes; ctypes.string_at(0)', marks=pytest.mark.slow),
        pytest.param('import os; os.execv("/bin/true", ["true"])', marks=pytest.mark.slow),
        'import os; os.execv("/bin/sleep", ["sleep", "60"])',
    ],
)
def test_a_worker_that_ends(host: Host, code: str) -> None:
    reply = host.run(f'print("before")\n{code}', 2)
    assert reply.status == 'killed' and reply.stdout == 'before\n', reply
    assert 'the interpreter ended' in (reply.error or '')
    assert host.run('6 * 7').fresh


def test_a_child_that_comes_to_the_end_of_the_cell(host: Host) -> None:
    reply = host.run('import os\nmine = os.getpid()\nchild = os.fork()\nos.getpid() == mine')
    assert reply.result == 'True' and reply.ok, reply
    well(host)
    reply = host.run('import os\nchild = os.fork()\nif child == 0: raise ValueError\nchild > 0')
    assert reply.result == 'True' and reply.ok, reply
    well(host)


def test_what_it_replaces_in_the_worker(host: Host) -> None:
    host.run(
        'import sys, builtins\n'
        'frame = sys._getframe()\n'
        'while frame.f_back: frame = frame.f_back\n'
        'for name in list(frame.f_globals):\n'
        '    if not name.startswith("__"): frame.f_globals[name] = None\n'
    )
    reply = host.run('6 * 7')
    assert reply.result == '42' or reply.status == 'killed'
    well(host)


def test_streams_that_are_closed_or_replaced(host: Host) -> None:
    host.run('import sys, os\nsys.stdout.close()\nsys.stderr = None\nos.close(1); os.close(2)')
    reply = host.run('import sys\nprint("out")\nprint("err", file=sys.stderr)\n6 * 7')
    assert (reply.stdout, reply.stderr, reply.result) == ('out\n', 'err\n', '42'), reply
    reply = host.run('import sys\nsys.stdout = 5\nsys.__stdout__ = None\n7')
    assert reply.result == '7'
    assert host.run('print("again")').stdout == 'again\n'


def test_characters_of_all_kinds(host: Host) -> None:
    text = 'a\\0b\\x1b[2J\\ud800\\udfff\\U0001f600é\\r\\n'
    reply = host.run(f'print("{text}")\n"{text}"')
    assert reply.stdout == 'a\0b\x1b[2J\\ud800\\udfff😀é\r\n\n'
    reply.text.encode('utf-8')
    reply = host.run('import sys\nsys.stdout.buffer.write(bytes(range(256)))\nsys.stdout.flush()')
    assert len(reply.stdout) >= 256 and '\ufffd' in reply.stdout
    reply = host.run('class Odd:\n    def __repr__(self): return "\\ud800"\nOdd()')
    assert reply.result == '?'
    assert host.run('raise ValueError("\\ud800")').error is not None


def test_code_that_is_none(host: Host) -> None:
    for code in ('x = (', 'a\0b', '\ud800', 'return 5', 'await x', '\t1\n 2'):
        reply = host.run(code)
        assert reply.status == 'error' and 'Error' in (reply.error or ''), (code, reply)
    for code in ('', '\n', '# nothing', 'pass'):
        assert host.run(code).ok


SHOWN = 'class Picture:\n    def _repr_png_(self): return {data}\nPicture()'


def test_an_image(host: Host) -> None:
    reply = host.run(SHOWN.format(data=repr(RIGHT)))
    assert reply.images == (RIGHT,)
    assert check_png(RIGHT, 1 << 20, 1 << 20) == (4, 3)


@pytest.mark.parametrize(
    'image',
    [
        png(100_000, 100_000, zlib.compress(bytes(1000))),
        png(4, 3, zlib.compress(bytes(100_000_000))),
        png(4, 3, b'no pixels'),
        RIGHT + b'<script>',
        RIGHT[:-1],
        b'<svg onload="alert(1)"/>',
        b'',
    ],
    ids=['huge', 'bomb', 'pixels', 'behind', 'cut', 'svg', 'empty'],
)
def test_an_image_that_is_none(host: Host, image: bytes) -> None:
    reply = host.run(SHOWN.format(data=repr(image)))
    assert reply.images == () and 'left out' in reply.notes[0], reply
    assert reply.ok


def test_images_without_end(host: Host) -> None:
    reply = host.run(f'{SHOWN.format(data=repr(RIGHT))}\nfor _ in range(100): display(Picture())')
    assert len(reply.images) == SMALL.images and reply.notes
    reply = host.run(SHOWN.format(data='b"x" * 10**7'))
    assert reply.images == () and 'too large' in reply.stderr
    reply = attack(host, f'{FORGE}\n' + 'import sys\nworker = sys.displayhook.__self__\n'
                   'worker.images.extend(["eA=="] * 50)')  # fmt: skip
    assert reply.images == () and len(reply.notes) <= SMALL.images + 1


def test_forms_of_a_value(host: Host) -> None:
    reply = host.run(
        'class Rich:\n    def _repr_html_(self): return "<b>5</b>"\n'
        '    def _repr_latex_(self): return 5\n    def _repr_markdown_(self): raise ValueError\n'
        '    def __repr__(self): return "five"\nRich()'
    )
    assert reply.result == 'five' and reply.rich == {'text/html': '<b>5</b>'}
    reply = host.run('class Any:\n    def __getattr__(self, name): return lambda: "x"\nAny()')
    assert reply.rich == {} and reply.ok


@pytest.mark.parametrize(
    ('method', 'kind', 'lie'),
    [
        ('__repr__', 'str', 'def __getitem__(self, key): return Odd()'),
        ('_repr_html_', 'str', 'def __len__(self): return 1'),
        ('_repr_html_', 'str', 'def __str__(self): raise ValueError'),
        ('_repr_png_', 'bytes', 'def __len__(self): return 1'),
    ],
)
def test_forms_that_lie(host: Host, method: str, kind: str, lie: str) -> None:
    """A text or picture of a class of its own says what it likes of itself."""
    host.run('kept = 5')
    honest = 'x' * 9 if kind == 'str' else b'x' * 9
    reply = host.run(
        'class Odd:\n    def __str__(self):\n        while True: pass\n'
        f'class Lie({kind}):\n    {lie}\n'
        f'class Value:\n    def {method}(self): return Lie({honest!r})\n'
        'Value()'
    )
    assert reply.ok and reply.images == (), reply
    assert host.run('kept').result == '5'
