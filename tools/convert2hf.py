"""Export a checkpoint to a Hugging Face folder that transformers loads, and prove it."""

import argparse
import re
import sys

from internlm_mm.checkpoint.hf_files import DTYPES
from internlm_mm.checkpoint.peft_files import export_peft
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.utils.arguments import Arguments

UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the export was made and proven, 2 if not."""
    args = parse_args(argv)
    try:
        if args.adapter:
            size = export_peft(args.checkpoint, args.out, args.overwrite)
            print(f'written: {args.out}')
            print(f'adapter_bytes: {size}')
            return 0
        difference = convert_to_hf(
            args.checkpoint,
            args.out,
            format=args.format,
            tokenizer=args.tokenizer,
            chat_template=args.chat_template,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            add_bos=not args.no_bos,
            show_progress=sys.stderr.isatty(),
            base=args.base,
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'written: {args.out}')
    print(f'logits_max_difference: {difference:.3e}')
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line, in our spelling or in InternLM's."""
    parser = Arguments(
        prog='convert2hf',
        description='Export a checkpoint to a folder that transformers loads, by default as plain '
        'LlamaForCausalLM without remote code, and compare the logits of the two.',
    )
    parser.add_argument('checkpoint', nargs='?', help='a work dir or a checkpoint iter_N in it')
    parser.add_argument('out', nargs='?', help='the folder to make')
    parser.add_argument('--src_folder', help="InternLM's name for CHECKPOINT")
    parser.add_argument('--tgt_folder', help="InternLM's name for OUT")
    parser.add_argument(
        '--format',
        help="what config.json names: llama, or the form of the model's own family, as internlm or "
        'qwen2 (default: llama where the family has it)',
    )
    tokenizer_help = 'a .model file or a tokenizer folder; by default the one in the checkpoint'
    parser.add_argument('--tokenizer', help=tokenizer_help)
    template_help = "chat template of the exported tokenizer, or 'none'; by default what is stored"
    parser.add_argument('--chat-template', metavar='NAME', help=template_help)
    parser.add_argument(
        '--dtype', choices=DTYPES, help='of the weights (default: what the run computed in)'
    )
    parser.add_argument('--max-shard-size', type=parse_size, default='5GB', help='e.g. 5GB')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    no_bos_help = 'the exported tokenizer does not begin texts with bos: the data had none'
    parser.add_argument('--no-bos', action='store_true', help=no_bos_help)
    adapter_help = "write the adapters alone, in PEFT's format; without it they are merged"
    parser.add_argument('--adapter', action='store_true', help=adapter_help)
    base_help = 'where the frozen weights under adapters are now, if not where they were'
    parser.add_argument('--base', metavar='PATH', help=base_help)
    args = parser.parse_args(argv)
    for positional, option in (('checkpoint', 'src_folder'), ('out', 'tgt_folder')):
        given = [v for v in (getattr(args, positional), getattr(args, option)) if v is not None]
        if len(given) != 1:
            parser.error(f'give {positional.upper()} or --{option}, once')
        setattr(args, positional, given[0])
    return args


def parse_size(text: str) -> int:
    """Bytes of a size such as '5GB', '500MB' or '1000000'."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([KMG]B)?', text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * UNITS[(match[2] or '').upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no size; write for example 5GB or 500MB')
    return size


if __name__ == '__main__':
    sys.exit(main())
