"""Runs inside the sandbox, in its Python: executes cells and describes what came of them.

Not imported by the host, which sends a compiled copy inside. Only the standard library is there,
and as little of it as can be is imported before the first cell: hence modules that are built in.

Frames on the control channel are a length of four bytes and as many bytes. A cell is a frame of one
letter and code. Behind it follows a token, which is read when the code is done and sent back: code
that answers in our place finds none in our memory.
"""

from __future__ import annotations

import _ast
import _json
import _signal
import _warnings
import binascii
import builtins
import io
import os
import resource
import sys
from types import FrameType, FunctionType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_CELLS = 200  # whose lines are shown in tracebacks
ONLY_AST = 0x400  # ast.PyCF_ONLY_AST
WALL = 0x40000000  # also children whose end sends no signal
RICH = {
    '_repr_html_': 'text/html',
    '_repr_markdown_': 'text/markdown',
    '_repr_latex_': 'text/latex',
    '_repr_svg_': 'image/svg+xml',
}


class CellInterrupt(BaseException):
    """Raised in a cell that went over a limit."""


class Worker:
    """One interpreter of one session.

    Args:
        control: Channel to the host.
        most_text: Characters of a result and of an error that are sent.
        most_images: Images of a cell that are sent.
        most_image_bytes: Size of the largest.
    """

    def __init__(
        self, control: int, most_text: int, most_images: int, most_image_bytes: int
    ) -> None:
        self.control = control
        self.most_text = most_text
        self.most_images = most_images
        self.most_image_bytes = most_image_bytes
        self.process = os.getpid()
        self.running = False
        self.number = 0
        self.cells: dict[str, str] = {}
        self.images: list[str] = []
        self.shown: tuple[Any] | None = None
        self.outputs = (os.dup(1), os.dup(2))
        os.set_inheritable(control, False)
        os.register_at_fork(after_in_child=self._leave_control)
        self.main = _main_module()
        builtins.display = self.display  # type: ignore[attr-defined]

    def serve(self) -> None:
        """Run cells until the host hangs up."""
        self._send(f'{{"ready": {list(sys.version_info[:2])}}}')
        while True:
            request = self._receive()
            kind, code = request[:1], request[1:].decode('utf-8', 'replace')
            if kind == b'C':
                self.number += 1
                answer = self.run(code, f'<cell {self.number}>', self.main)
            else:
                answer = self.run(code, '<canary>', _main_module())
            if os.getpid() != self.process:
                os._exit(0)  # a child that the cell made and that came to the cell's end
            answer['token'] = self._receive().decode('ascii', 'replace')
            self._send(_to_json(answer))

    def run(self, code: str, name: str, module: ModuleType) -> dict[str, Any]:
        """Execute one cell."""
        try:
            return self._run(code, name, module.__dict__)
        except CellInterrupt:  # in the moment in which the cell was done
            self.running = False
            return {
                'status': 'interrupted', 'result': None, 'rich': {}, 'images': [], 'error': None
            }  # fmt: skip

    def _run(self, code: str, name: str, namespace: dict[str, Any]) -> dict[str, Any]:
        sys.modules['__main__'] = self.main
        self._restore_streams()
        self._bury_children()
        self.images, self.shown = [], None
        self.cells[name] = code
        if len(self.cells) > MOST_CELLS:
            del self.cells[next(iter(self.cells))]
        sys.displayhook = self._keep
        answer: dict[str, Any] = {
            'status': 'ok', 'result': None, 'rich': {}, 'images': [], 'error': None
        }  # fmt: skip
        try:
            _signal.signal(_signal.SIGINT, self._interrupt)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, ())  # whatever the one before blocked
            self.running = True
            for part in _compile(code, name):
                exec(part, namespace)
            if self.shown is not None:
                namespace['_'] = self.shown[0]
                answer['result'], answer['rich'] = self._describe(self.shown[0])
            self._take_figures()
        except CellInterrupt as error:
            answer.update(status='interrupted', error=self._explain(error))
        except BaseException as error:
            answer.update(status='error', error=self._explain(error))
        self.running = False
        for clock in (_signal.ITIMER_REAL, _signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF):
            _signal.setitimer(clock, 0)  # an alarm ends with the cell that set it
        answer['images'] = self.images[: self.most_images + 1]
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass  # whatever the cell has put there
        return answer

    def display(self, *values: Any) -> None:
        """What IPython calls `display`: prints values, or shows them if they are pictures."""
        for value in values:
            before = len(self.images)
            text, _ = self._describe(value)
            if len(self.images) == before:
                print(text)

    def _describe(self, value: Any) -> tuple[str, dict[str, str]]:
        """Text of a value and its other forms; pictures are put to the images."""
        kind = type(value)
        rich = {}
        for method, mime in RICH.items():
            form = self._form(value, method)
            if isinstance(form, str) and str.__len__(form) <= self.most_text:
                rich[mime] = _cut(form, self.most_text)
        picture = self._form(value, '_repr_png_')
        if isinstance(picture, bytes):
            self._add_image(bytes.__getitem__(picture, slice(None)))
        elif kind.__name__ == 'Figure' and kind.__module__ == 'matplotlib.figure':
            plt = sys.modules.get('matplotlib.pyplot')
            if plt is None or value.number not in plt.get_fignums():
                self._add_figure(value)  # pyplot's own are taken at the end of the cell
        return _cut(repr(value), self.most_text + 1), rich

    def _form(self, value: Any, method: str) -> Any:
        if not isinstance(getattr(type(value), method, None), FunctionType):
            return None  # one that answers to any name has none of them
        try:
            return getattr(value, method)()
        except Exception:
            return None

    def _add_image(self, data: bytes) -> None:
        if len(data) <= self.most_image_bytes and len(self.images) <= self.most_images:
            self.images.append(binascii.b2a_base64(data, newline=False).decode('ascii'))
        elif len(data) > self.most_image_bytes:
            print(f'[an image of {len(data)} bytes is too large to be shown]', file=sys.stderr)

    def _add_figure(self, figure: Any) -> None:
        file = io.BytesIO()
        figure.savefig(file, format='png')
        self._add_image(file.getvalue())

    def _take_figures(self) -> None:
        plt = sys.modules.get('matplotlib.pyplot')
        if plt is not None and hasattr(plt, 'get_fignums'):
            for number in plt.get_fignums():
                self._add_figure(plt.figure(number))
            plt.close('all')

    def _keep(self, value: Any) -> None:
        if value is not None:
            self.shown = (value,)

    def _explain(self, error: BaseException) -> str:
        """Traceback of an error without our own frames."""
        trace = error.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith('<cell '):
            trace = trace.tb_next
        try:
            traceback = __import__('traceback')  # now: sessions start faster without it
            for name, code in self.cells.items():
                lines = code.splitlines(True)
                traceback.linecache.cache[name] = (len(code), None, lines, name)
            if isinstance(error, CellInterrupt):
                frames = traceback.extract_tb(trace)
                ours = self._interrupt.__code__.co_filename
                kept = [frame for frame in frames if frame.filename != ours]
                text = 'Interrupted here:\n' + ''.join(traceback.format_list(kept))
            else:
                text = ''.join(traceback.format_exception(type(error), error, trace))
        except BaseException as second:
            text = f'{type(error).__name__} (no traceback: {type(second).__name__})'
        half = self.most_text // 2
        return text if len(text) <= self.most_text else f'{text[:half]}\n[...]\n{text[-half:]}'

    def _interrupt(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.running and os.getpid() == self.process:
            raise CellInterrupt

    def _restore_streams(self) -> None:
        """Give a cell its own outputs again, whatever the one before did to them."""
        for number, saved, name in ((1, self.outputs[0], 'stdout'), (2, self.outputs[1], 'stderr')):
            os.dup2(saved, number)
            own = getattr(sys, f'__{name}__')
            if own is None or own.closed:
                own = open(number, 'w', encoding='utf-8', closefd=False)
                setattr(sys, f'__{name}__', own)
            own.reconfigure(errors='backslashreplace', line_buffering=True)
            setattr(sys, name, own)

    def _bury_children(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG | WALL)[0]:
                pass  # the host has killed what the cell before left running
        except ChildProcessError:
            pass

    def _leave_control(self) -> None:
        try:
            os.close(self.control)
        except OSError:
            pass

    def _receive(self) -> bytes:
        return self._read(int.from_bytes(self._read(4), 'big'))

    def _read(self, count: int) -> bytes:
        data = b''
        while len(data) < count:
            piece = os.read(self.control, count - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return data

    def _send(self, text: str) -> None:
        data = text.encode('ascii')
        data = len(data).to_bytes(4, 'big') + data
        while data:
            data = data[os.write(self.control, data) :]


class _Help:
    def __repr__(self) -> str:
        return 'help(object)'

    def __call__(self, *values: Any) -> None:
        pydoc = __import__('pydoc')
        pydoc.Helper(output=sys.stdout)(*values) if values else print(repr(self))


class _NotShown:
    """Matches the warning that `plt.show()` gives: figures are shown at the end of the cell."""

    def match(self, text: str) -> bool:
        return text.startswith('FigureCanvasAgg is non-interactive')


def _main_module() -> ModuleType:
    """A module that code runs in: what it defines can be found as `__main__`, and nothing else."""
    module = ModuleType('__main__')
    module.__dict__['__builtins__'] = builtins
    return module


def _compile(code: str, name: str) -> list[Any]:
    """The parts of a cell; the last expression is one that is shown, unless `;` ends it."""
    tree: Any = compile(code, name, 'exec', ONLY_AST, True)
    parts = []
    last = None
    if tree.body and type(tree.body[-1]) is _ast.Expr and not code.rstrip().endswith(';'):
        last = _ast.Interactive(body=[tree.body.pop()])
    if tree.body:
        parts.append(compile(tree, name, 'exec', 0, True))
    if last is not None:
        parts.append(compile(last, name, 'single', 0, True))
    return parts


def _cut(text: str, most: int) -> str:
    """The beginning of a text as a plain one, whatever its class says of it."""
    return str.__getitem__(text, slice(0, most))


def _to_json(value: Any) -> str:
    """JSON of texts, None, lists and dicts, in ASCII."""
    if value is None:
        return 'null'
    if isinstance(value, list):
        return f'[{",".join(map(_to_json, value))}]'
    if isinstance(value, dict):
        return f'{{{",".join(f"{_to_json(k)}:{_to_json(v)}" for k, v in value.items())}}}'
    return _json.encode_basestring_ascii(str(value))


def _stop(code: Any = None) -> None:
    raise SystemExit(code)


def main(arguments: list[str]) -> None:
    """Take the limits upon us and serve.

    Args:
        arguments: Number of the control channel, three limits of `Worker`, and limits of the
            kernel as pairs of numbers, `resource=value`.
    """
    control, text, images, image_bytes, *limits = arguments
    for limit in limits:
        kind, value = map(int, limit.split('='))
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))
    builtins.exit = builtins.quit = _stop  # type: ignore[assignment]
    builtins.help = _Help()  # type: ignore[assignment]
    sys.argv = ['']
    filters: Any = getattr(_warnings, 'filters', [])
    filters.insert(0, ('ignore', _NotShown(), UserWarning, None, 0))
    Worker(int(control), int(text), int(images), int(image_bytes)).serve()


if __name__ == '__main__':
    main(sys.argv[1:])
