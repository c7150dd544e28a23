"""The command line, and the backend that it asks for."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.suggest import nearest_path
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
    return args


def is_url(model: str) -> bool:
    """Whether a model is a server's."""
    return model.startswith(('http://', 'https://'))


def is_import(model: str) -> bool:
    """Whether a model is a backend of somebody's own, `module:function`."""
    return re.fullmatch(r'[\w.]+:\w+', model) is not None and not Path(model).exists()


def check_model(model: str, page: bool) -> None:
    """Say what is missing, before anything is started.

    Args:
        model: What will answer.
        page: Whether there will be a page.

    Raises:
        BackendError: If a package is not installed, with the command that installs it.
        FileNotFoundError: If there is no such folder.
    """
    wanted = [*(['streamlit'] if page else []), *(['openai'] if is_url(model) else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f'{" and ".join(missing)} not installed: {INSTALL}')
    if not (is_url(model) or is_import(model) or Path(model).is_dir()):
        raise FileNotFoundError(f'there is no folder {model}{nearest_path(model)}')


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
        BackendError: If there is no such function.
    """
    module, _, function = name.partition(':')
    try:
        return getattr(importlib.import_module(module), function)()
    except ModuleNotFoundError as error:
        raise BackendError(f'{name}: {error}; is its folder on PYTHONPATH?') from error
    except AttributeError as error:
        raise BackendError(f'{name}: {error}') from error
