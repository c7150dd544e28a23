"""Make, try, time and use the sandbox that runs programs which a model wrote."""

import argparse
import logging
import sys
from codeop import compile_command

from internlm_mm.sandbox import Reply, Sandbox, SandboxError, make_environment
from internlm_mm.sandbox.backends import NAMES, missing
from internlm_mm.sandbox.benchmark import load, measure
from internlm_mm.sandbox.environment import SCIENCE, default_folder
from internlm_mm.utils.arguments import Arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 if code failed, 2 for what cannot be done here."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    try:
        return args.command(args)
    except (OSError, ValueError, SandboxError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def make(args: argparse.Namespace) -> int:
    """Make the Python that cells run in."""
    packages = [] if args.bare else [*SCIENCE, *args.package]
    python = make_environment(args.folder, packages, args.base, args.constraint)
    version = '.'.join(map(str, python.version))
    print(f'{args.folder or default_folder()}: Python {version} with {packages or "nothing else"}')
    return 0


def check(args: argparse.Namespace) -> int:
    """Say which backends this machine has, each tried in earnest."""
    works = False
    for name in NAMES[:-1]:
        reason = missing(name)
        if reason is None:
            try:
                with Sandbox(backend=name, python=args.python, spare=0) as sandbox:
                    with sandbox.session() as session:
                        works = session.run('6 * 7').result == '42' or works
            except SandboxError as error:
                reason = str(error)
        print(f'{name}: {"confines, as its canary proved" if reason is None else reason}')
    return 0 if works else 2


def benchmark(args: argparse.Namespace) -> int:
    """Time starts and cells."""
    with (
        Sandbox(args.backend, args.python, spare=1) as ready,
        Sandbox(args.backend, args.python, spare=0) as cold,
    ):
        timings = measure(ready, cold, args.starts, args.cells)
        print(f'{ready.backend}; {load()}')
        print(f'{"":42} {"times":>6} {"p50":>10} {"p95":>10} {"processor":>10}')
        for one in timings:
            figures = (one.median, one.high, one.processor)
            print(f'{one.name:42} {one.count:6}', *(f'{figure:7.2f} ms' for figure in figures))
    return 0


def run(args: argparse.Namespace) -> int:
    """Run files, or lines that are typed, in one session."""
    with (
        Sandbox(args.backend, args.python, unsafe=args.unsafe_no_sandbox) as sandbox,
        sandbox.session() as session,
    ):
        failed = False
        if args.file:
            for name in args.file:
                with open(name, encoding='utf-8') as file:
                    failed = not show(session.run(file.read())) or failed
        else:
            while (cell := read_cell()) is not None:
                failed = not show(session.run(cell))
    return int(failed)


def show(reply: Reply) -> bool:
    """Print a reply; whether the code ran to its end."""
    if reply.text:
        print(reply.text)
    for image in reply.images:
        print(f'[an image of {len(image)} bytes]')
    return reply.ok


def read_cell() -> str | None:
    """The next statement, which may have several lines as in Python's own prompt, or None."""
    line = read_line('>>> ')
    if line is None:
        return None
    lines = [line]
    while is_begun('\n'.join(lines)):
        line = read_line('... ')
        if line is None:
            break
        lines.append(line)
    return '\n'.join(lines)


def is_begun(code: str) -> bool:
    """Whether code is the beginning of a statement and not yet all of it."""
    try:
        return compile_command(code) is None
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False  # the session says what is wrong


def read_line(prompt: str) -> str | None:
    """The next line, None at the end of the input; a file or another program is not prompted."""
    try:
        return input(prompt if sys.stdin.isatty() else '')
    except EOFError:
        return None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(prog='sandbox', description=__doc__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    one = commands.add_parser('make', help='make the Python that programs run in')
    one.add_argument('--folder', help=f'where; {default_folder()} by default')
    one.add_argument('--base', help="the Python it is made from; the system's by default")
    one.add_argument('--package', action='append', default=[], help='one more, as pip takes it')
    one.add_argument('--bare', action='store_true', help=f'without {", ".join(SCIENCE)}')
    one.add_argument('--constraint', help='a file of versions, as pip takes it')
    one.set_defaults(command=make)

    one = commands.add_parser('check', help='say what this machine can confine programs with')
    one.set_defaults(command=check)
    _add_python(one)

    one = commands.add_parser('benchmark', help='time starts and cells')
    one.add_argument('--starts', type=int, default=30, help='sessions of each kind')
    one.add_argument('--cells', type=int, default=500, help='cells of each kind')
    _add_python(one)
    _add_backend(one)
    one.set_defaults(command=benchmark)

    one = commands.add_parser('run', help='run files, or lines that are typed, in one session')
    one.add_argument('file', nargs='*', help='each is one cell')
    one.add_argument(
        '--unsafe-no-sandbox', action='store_true', help='run without any where there is none'
    )
    _add_python(one)
    _add_backend(one)
    one.set_defaults(command=run)
    return parser.parse_args(argv)


def _add_python(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--python', help='interpreter or environment that programs run in')


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--backend', default='auto', help=f'auto or {", ".join(NAMES[:-1])}')


if __name__ == '__main__':
    sys.exit(main())
