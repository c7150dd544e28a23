"""The command line, and the backend that it asks for."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from web_chat.backend import Backend, BackendError

INSTALL = "pip install 'streamlit>=1.67,<2' openai"
"""The extra `web`."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `run.py` and the page take the same."""
    parser = argparse.ArgumentParser(prog='run.py', description='Chat with a model in the browser.')
    parser.add_argument(
        'model',
        help='a work dir, a checkpoint iter_N, a Hugging Face folder, or the URL of a server with '
        "OpenAI's protocol (http://127.0.0.1:8000/v1)",
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
    return parser.parse_args(argv)


def is_url(model: str) -> bool:
    """Whether a model is a server's."""
    return model.startswith(('http://', 'https://'))


def check_installed(model: str, page: bool) -> None:
    """Ask for the packages that are missing.

    Args:
        model: What will answer.
        page: Whether there will be a page.

    Raises:
        BackendError: With the command that installs them.
    """
    wanted = [*(['streamlit'] if page else []), *(['openai'] if is_url(model) else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f'{" and ".join(missing)} not installed: {INSTALL}')


def open_backend(args: argparse.Namespace) -> Backend:
    """Load the model, or make ready to ask the server.

    Raises:
        BackendError: If the client of servers is not installed.
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged or fits nothing here.
    """
    check_installed(args.model, page=False)
    # Each of the two imports takes seconds, and only one is needed.
    if is_url(args.model):
        from web_chat.server_backend import ServerBackend

        key = os.environ.get('OPENAI_API_KEY', 'none')  # as every client of that protocol does
        return ServerBackend(args.model, args.model_name, key)
    if not Path(args.model).is_dir():
        raise FileNotFoundError(f'there is no folder {args.model}')
    from web_chat.local_backend import load

    return load(args.model, args.template, args.device, args.dtype)
