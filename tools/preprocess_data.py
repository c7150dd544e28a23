"""Tokenise texts into memory-mapped token files, or InternLM's .bin files, by domain."""

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from internlm_mm.datasets.bin_export import preprocess_to_bins
from internlm_mm.datasets.preprocessing import Counts, preprocess
from internlm_mm.utils.arguments import Arguments

FORMATS = ('tokens', 'internlm')

EXAMPLES = """examples:
  texts/web/*.jsonl.gz and texts/code/*.parquet, one document in a thousand held out:
    python tools/preprocess_data.py texts/ --output data/text/tokens \\
        --tokenizer data/text/tokenizer --validation-fraction 0.001
  domains by name, a validation set of your own:
    python tools/preprocess_data.py web=/crawl/2024 web=/crawl/2025 code=repos.jsonl \\
        --validation-inputs held_out/ --output data/text/tokens --tokenizer my.model
  conversations as .bin files that InternLM reads, a tenth of them held out:
    python tools/preprocess_data.py en=alpaca.json --output alpaca --tokenizer V7_sft.model \\
        --format internlm --chat-template internlm --max-length 2048 --validation-fraction 0.1

writes OUTPUT/train/DOMAIN and OUTPUT/validation/DOMAIN; give the first to PretrainDataset:
  dataset=dict(type=PretrainDataset, data_root='OUTPUT/train', seq_len=4096)
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the output was written."""
    parser = Arguments(
        prog='preprocess_data',
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='file or folder of txt, json, jsonl, jsonl.gz, parquet; DOMAIN=PATH names its domain, '
        'else every sub-folder, or file beside them, is one',
    )
    parser.add_argument('--output', '-o', required=True, help='folder to make')
    parser.add_argument(
        '--tokenizer', required=True, help='a .model file, or a folder with a tokenizer'
    )
    parser.add_argument(
        '--validation-inputs', nargs='+', default=[], metavar='INPUT', help='texts to hold out'
    )
    parser.add_argument(
        '--validation-fraction',
        type=float,
        default=0.0,
        help='share of the documents to hold out, chosen by their hash (default: 0)',
    )
    parser.add_argument('--text-key', default='text', help="a record's text (default: text)")
    parser.add_argument(
        '--no-bos',
        dest='add_bos',
        action='store_false',
        help='do not begin documents with the begin token',
    )
    parser.add_argument(
        '--min-document-length',
        type=int,
        default=1,
        help='leave out documents of fewer tokens (default: 1)',
    )
    parser.add_argument(
        '--format',
        choices=FORMATS,
        default='tokens',
        help='token files, or .bin and .bin.meta of InternLM: OUTPUT/SPLIT/DOMAIN/dataset.bin',
    )
    parser.add_argument(
        '--chat-template',
        metavar='NAME',
        help='the inputs are conversations, spelt by this template (with --format internlm; '
        'training reads conversations as they are)',
    )
    parser.add_argument(
        '--max-length',
        type=int,
        metavar='TOKENS',
        help='split longer conversations before a turn of the user',
    )
    parser.add_argument('--num-workers', type=int, help='processes (default: all cores)')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace the output of an earlier run'
    )
    args = parser.parse_args(argv)
    try:
        counts = _run(vars(args))
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    table = Table('split', 'domain', 'documents', 'tokens', 'dropped', title=args.output)
    for split, domains in counts.items():
        for domain, count in domains.items():
            numbers = (count.documents, count.tokens, count.dropped)
            table.add_row(split, domain, *(f'{number:,}' for number in numbers))
    Console().print(table)
    return 0


def _run(options: dict[str, Any]) -> dict[str, dict[str, Counts]]:
    if options.pop('format') == 'internlm':
        return preprocess_to_bins(**options)
    for key in ('chat_template', 'max_length'):
        if options.pop(key) is not None:
            raise ValueError(
                f'--{key.replace("_", "-")} is for --format internlm; a run reads conversations '
                'as they are (docs/en/finetune.md)'
            )
    return preprocess(**options)


if __name__ == '__main__':
    sys.exit(main())
