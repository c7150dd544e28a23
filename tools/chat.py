"""Chat with a model in the terminal, or continue text with it: streamed, with history."""

import argparse
import sys

import torch

from internlm_mm.api import from_pretrained
from internlm_mm.inference import Sampling, stored_template
from internlm_mm.inference.terminal import Terminal, complete
from internlm_mm.utils.arguments import Arguments

try:
    import readline  # noqa: F401  arrows and history in what is typed
except ImportError:
    pass


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 at the end of the input, 2 for what the user did wrong."""
    args = parse_args(argv)
    try:
        _check_prompt(args)
        sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            stop=tuple(args.stop),
            seed=args.seed,
        )
        template = args.template or stored_template(args.path) or 'none'
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        generator = from_pretrained(
            args.path,
            device=args.device,
            dtype=dtype,
            add_bos=not args.no_bos,
            base=args.base,
        )
        if args.prompt is None:
            name = None if template == 'none' else template
            if name is None and args.system is not None:
                raise ValueError(
                    f'--system {args.system!r} needs a chat template, and {args.path} has none: '
                    'give --template NAME'
                )
            Terminal(generator, name, sampling, args.system, read_line).run()
        else:
            complete(generator, args.prompt, sampling)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def _check_prompt(args: argparse.Namespace) -> None:
    """A text that is continued is no conversation."""
    for option in ('template', 'system'):
        value = getattr(args, option)
        if args.prompt is not None and value not in (None, 'none'):
            raise ValueError(
                f'--{option} {value!r} does nothing with --prompt, which continues a text without '
                'a template; for one answer: echo TEXT | chat PATH'
            )


def read_line(prompt: str) -> str:
    """The next line that is typed; a file or another program is not prompted."""
    return input(prompt if sys.stdin.isatty() else '')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(
        prog='chat',
        description='Chat with a model, or continue text where it is a base model.',
    )
    parser.add_argument(
        'path', help='a work dir, a checkpoint iter_N, or a folder of Hugging Face or PEFT'
    )
    parser.add_argument('--prompt', help='continue this text and leave, without a template')
    template_help = "chat template, or 'none' to continue text; what the model was trained with"
    parser.add_argument('--template', metavar='NAME', help=template_help)
    parser.add_argument('--system', metavar='TEXT', help='system prompt of the chat')
    parser.add_argument('--max-new-tokens', type=int, default=256, help='most tokens to add')
    parser.add_argument(
        '--temperature', type=float, default=0.8, help='0 takes the likeliest token'
    )
    parser.add_argument('--top-k', type=int, help='draw from the k likeliest tokens only')
    parser.add_argument('--top-p', type=float, default=0.95, help='share of probability drawn from')
    penalty_help = 'above 1 makes tokens that were used already less likely'
    parser.add_argument('--repetition-penalty', type=float, default=1.0, help=penalty_help)
    stop_help = 'a text that ends an answer; may be given several times'
    parser.add_argument('--stop', action='append', default=[], metavar='TEXT', help=stop_help)
    parser.add_argument('--seed', type=int, help='another one every time if not given')
    parser.add_argument('--device', help='the first GPU if there is one, else cpu')
    dtypes = ('float32', 'bfloat16', 'float16')
    dtype_help = 'bfloat16 on a GPU and float32 on the CPU if not given'
    parser.add_argument('--dtype', choices=dtypes, help=dtype_help)
    no_bos_help = 'prompts do not begin with bos: the training data had none'
    parser.add_argument('--no-bos', action='store_true', help=no_bos_help)
    base_help = 'where the frozen weights under adapters are now, if not where they were'
    parser.add_argument('--base', metavar='PATH', help=base_help)
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(main())
