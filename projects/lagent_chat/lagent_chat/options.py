"""The command line, and what it asks for."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from internlm_mm.inference import Sampling
from internlm_mm.utils.arguments import Arguments

PROJECT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python projects/lagent_chat/chat.py work_dirs/my_agent
  python projects/lagent_chat/chat.py work_dirs/my_agent --plugins projects/lagent_chat/plugins.py
  python projects/lagent_chat/chat.py http://127.0.0.1:8000/v1 --no-lagent
  echo 'How much is 17 * 23?' | python projects/lagent_chat/chat.py work_dirs/my_agent
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(
        prog='chat.py',
        description='Chat with a model that calls tools, in the terminal.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'model',
        help='a work dir, a checkpoint iter_N, a folder of Hugging Face or PEFT, or the URL of a '
        "server with OpenAI's protocol (http://127.0.0.1:8000/v1)",
    )
    parser.add_argument('--no-lagent', action='store_true', help='our own loop, without Lagent')
    env_help = "Lagent's environment, as setup_env.py made it (default: .venv beside chat.py)"
    parser.add_argument('--env', metavar='PATH', help=env_help)
    parser.add_argument('--ask', metavar='TEXT', help='one question; 1 if it gets no answer')
    parser.add_argument('--system', metavar='TEXT', help='system prompt of the chat')
    parser.add_argument('--folder', metavar='PATH', help='of this chat: its trace and images')
    add_tools(parser.add_argument_group('tools'))
    add_model(parser.add_argument_group('model'))
    args = parser.parse_args(argv)
    for name in ('cell_seconds', 'tool_seconds'):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)} is not above 0')
    if '://' in args.model and not is_url(args.model):
        parser.error(f'{args.model}: the address of a server begins with http:// or https://')
    for name in ('device', 'dtype') if is_url(args.model) else ('model_name',):
        if (value := getattr(args, name)) is not None:
            option = '--' + name.replace('_', '-')
            parser.error(f'{option} {value} does nothing where {args.model} answers')
    return args


def add_tools(group: argparse._ArgumentGroup) -> None:
    """Options of what may be called."""
    group.add_argument(
        '--plugins', action='append', default=[], metavar='FILE', help='Python with @tool_api'
    )
    group.add_argument('--no-interpreter', action='store_true', help='no tool `python`')
    group.add_argument('--python', metavar='PATH', help='interpreter or environment of cells')
    unsafe_help = 'run cells on this machine as they are, where there is no sandbox'
    group.add_argument('--unsafe-no-sandbox', action='store_true', help=unsafe_help)
    group.add_argument('--cell-seconds', type=float, default=30.0, help='longest cell (30)')
    group.add_argument('--tool-seconds', type=float, default=60.0, help='longest call (60)')
    group.add_argument('--max-turns', type=int, default=10, help='most turns of an answer (10)')
    repairs_help = 'most misspelt calls in a row (2)'
    group.add_argument('--max-repairs', type=int, default=2, help=repairs_help)


def add_model(group: argparse._ArgumentGroup) -> None:
    """Options of who answers, and how."""
    template_help = 'chat template; what suits the model, and chatml for a server'
    group.add_argument('--template', metavar='NAME', help=template_help)
    group.add_argument('--model-name', help="which of a server's models; its first if not given")
    group.add_argument('--device', help='the first GPU if there is one, else cpu')
    dtypes = ('float32', 'bfloat16', 'float16')
    dtype_help = 'bfloat16 on a GPU and float32 on the CPU if not given'
    group.add_argument('--dtype', choices=dtypes, help=dtype_help)
    group.add_argument('--max-new-tokens', type=int, default=512, help='most tokens a turn (512)')
    group.add_argument('--temperature', type=float, default=0.0, help='0: the likeliest token (0)')
    group.add_argument('--top-k', type=int, help='draw from the k likeliest tokens only')
    group.add_argument('--top-p', type=float, default=1.0, help='share of probability drawn from')
    penalty_help = 'above 1 makes tokens that were used already less likely'
    group.add_argument('--repetition-penalty', type=float, default=1.0, help=penalty_help)
    group.add_argument('--seed', type=int, help='another one every time if not given')


def is_url(model: str) -> bool:
    """Whether a model is a server's."""
    return model.startswith(('http://', 'https://'))


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How to draw.

    Raises:
        ValueError: If a number is out of its range.
    """
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of this chat."""
    if args.folder is not None:
        return Path(args.folder)
    now = datetime.now().strftime('%Y%m%d_%H%M%S')
    return Path('work_dirs') / 'lagent_chat' / f'{now}_{os.getpid()}'


def api_key() -> str:
    """What a server knows us by, from where every client of that protocol looks for it."""
    return os.environ.get('OPENAI_API_KEY', 'none')
