"""The command line, and the backend that it asks for."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.suggest import nearest, nearest_path
from web_chat.backend import Backend, BackendError

INSTALL = "pip install 'streamlit>=1.67,<2' openai"
"""The extra `web`."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `run.py` and the page take the same."""
    parser = Arguments(prog='run.py', description='Chat with a model in the browser.')
    parser.add_argument(
        'model',
        help='a work dir, a checkpoint iter_N, a Hugging Face folder, the URL of a server with '
        "OpenAI's protocol (http://127.0.0.1:8000/v1), or module:function that makes a backend",
    )
    parser.add_argument('--template', help='chat template; what suits the model if not given')
    parser.add_argument('--device', help='the first GPU if there is one, else cpu')
    dtypes = ('float32', 'bfloat16', 'float16')
    dtype_help = 'bfloat16 on a GPU and float32 on the CPU if not given'
    parser.add_argument('--dtype', choices=dtypes, help=dtype_help)
    parser.add_argument('--model-name', help="which of a server's models; its first if not given")
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (%(default)s)')
    parser.add_argument('--port', type=int, default=8501, help='port to listen on (%(default)s)')
    parser.add_argument('--ask', help='answer this question in the terminal and leave')
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65_535:
        parser.error(f'--port {args.port}: a port is 1 to 65535')
    if '://' in args.model and not is_url(args.model):
        parser.error(f'{args.model}: the address of a server begins with http:// or https://')
    for name in idle_options(args.model):
        if (value := getattr(args, name)) is not None:
            option = '--' + name.replace('_', '-')
            parser.error(f'{option} {value} does nothing where {args.model} answers')
    return args


def idle_options(model: str) -> tuple[str, ...]:
    """Options that mean nothing to a model of this kind."""
    if is_import(model):
        return ('template', 'device', 'dtype', 'model_name')
    return ('template', 'device', 'dtype') if is_url(model) else ('model_name',)


def is_url(model: str) -> bool:
    """Whether a model is a server's."""
    return model.startswith(('http://', 'https://'))


def is_import(model: str) -> bool:
    """Whether a model is a backend of somebody's own, `module:function`."""
    return re.fullmatch(r'[\w.]+:\w+', model) is not None and not Path(model).exists()


def check_model(model: str, page: bool, template: str | None = None) -> None:
    """Say what is missing, before anything is started.

    Args:
        model: What will answer.
        page: Whether there will be a page.
        template: Name of a chat template.

    Raises:
        BackendError: If a package is not installed, with the command that installs it; or if what
            should answer cannot be imported.
        FileNotFoundError: If there is no such folder, or no model in it.
        ValueError: If its checkpoint lacks something, or there is no such template.
    """
    wanted = [*(['streamlit'] if page else []), *(['openai'] if is_url(model) else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f'{" and ".join(missing)} not installed: {INSTALL}')
    if not (is_url(model) or is_import(model) or Path(model).is_dir()):
        raise FileNotFoundError(f'there is no folder {model}{nearest_path(model)}')
    if page and is_import(model):
        backend_maker(model)
    elif page and not is_url(model):
        # Seconds, but the page would take them, and the terminal would have said that all is well.
        from internlm_mm.inference import stored_template

        stored_template(model)
    if page and template is not None:
        from internlm_mm.tokenizers import build_template  # takes seconds

        build_template(template)


def check_address(host: str, port: int) -> None:
    """Say why the page cannot be there, before a model is loaded.

    Raises:
        OSError: If there is no such host, or somebody else listens.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:  # a name that can be none is the latter
        said = getattr(error, 'strerror', None) or error
        raise OSError(f'--host {host} --port {port}: {said}') from None


def open_backend(args: argparse.Namespace) -> Backend:
    """Load the model, or make ready to ask somebody else.

    Raises:
        BackendError: If what should answer cannot be imported.
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged or fits nothing here.
    """
    check_model(args.model, page=False)
    if is_import(args.model):
        return import_backend(args.model)
    # Each of the two imports takes seconds, and only one is needed.
    if is_url(args.model):
        from web_chat.server_backend import ServerBackend

        key = os.environ.get('OPENAI_API_KEY', 'none')  # as every client of that protocol does
        return ServerBackend(args.model, args.model_name, key)
    from web_chat.local_backend import load

    return load(args.model, args.template, args.device, args.dtype)


def import_backend(name: str) -> Backend:
    """Call `module:function`.

    Raises:
        BackendError: If there is no such function, or if it makes nothing that answers.
    """
    maker = backend_maker(name)
    try:
        backend = maker()
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f'{name}: {_said(error)}') from error
    if not callable(getattr(backend, 'answer', None)):
        kind = type(backend).__name__
        raise BackendError(f'{name} gives an object of {kind}, which has no method `answer`')
    return backend


def backend_maker(name: str) -> Callable[[], Backend]:
    """The function that `module:function` names.

    Raises:
        BackendError: If it cannot be imported.
    """
    module, _, function = name.partition(':')
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendError(f'{name}: {error}; is its folder on PYTHONPATH?') from error
    except Exception as error:
        raise BackendError(f'{name}: {_said(error)}') from error
    maker = getattr(found, function, None)
    if not callable(maker):
        what = f'no attribute {function!r}' if maker is None else f'no function {function!r}'
        known = [key for key, value in vars(found).items() if callable(value)]
        raise BackendError(f'{name}: module {module!r} has {what}.{nearest(function, known)}')
    return maker


def _said(error: Exception) -> str:
    """What was raised by somebody else's file, and at which line of which file."""
    if isinstance(error, SyntaxError):
        place = f' at {error.filename}:{error.lineno}'
    else:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = '' if at.filename == __file__ else f' at {at.filename}:{at.lineno}'
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}{place}: {text}' if text else f'{type(error).__name__}{place}'
