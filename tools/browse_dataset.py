"""Show the rows of a config's training data as the model sees them, or check all of it."""

import argparse
import sys
from typing import Any

from rich.console import Console

from internlm_mm.datasets.browsing import Report, look_over, show_row, special_tokens
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.preprocessing import domains_of
from internlm_mm.engine.preflight import build_data_part
from internlm_mm.registry import DATASETS, TOKENIZERS
from internlm_mm.tokenizers import build_template
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config

EXAMPLES = """tokens that are learned are green, special ones magenta, and underlined where they are
learned; context is white

examples:
  python tools/browse_dataset.py internlm_tiny_sft --rows 3
  python tools/browse_dataset.py internlm_tiny_sft --check
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if `--check` finds problems, 2 if nothing can be read."""
    parser = argparse.ArgumentParser(
        prog='browse_dataset',
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='a config, by its path or name')
    parser.add_argument('--val', action='store_true', help='the held-out data in its place')
    parser.add_argument('--rows', type=int, default=2, help='how many to show (default: 2)')
    parser.add_argument('--first', type=int, default=0, help='the first row (default: 0)')
    parser.add_argument(
        '--check', action='store_true', help='read every conversation and name what is wrong'
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    key = 'val_dataloader' if args.val else 'train_dataloader'
    try:
        config = load_config(args.config, parse_cfg_options(args.cfg_options))
        check_config(config)
        if not (config.get(key) and config.get('tokenizer')):
            raise ValueError(f'{args.config} has no {key}, or no tokenizer to decode tokens with')
        tokenizer = build_data_part(TOKENIZERS, config.tokenizer, 'tokenizer')
        if args.check:
            return tell(check(dict(config[key].dataset), tokenizer))
        dataset = build_data_part(DATASETS, config[key].dataset, f'{key}.dataset', tokenizer)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    special = special_tokens(tokenizer, getattr(dataset, 'template', None))
    console = Console(highlight=False)
    for index in range(args.first, args.first + args.rows):
        console.rule(f'row {index} of {len(dataset):,} an epoch')
        console.print(show_row(dataset[index], tokenizer, special))
    return 0


def check(dataset: dict[str, Any], tokenizer: Any) -> Report:
    """Look over the conversations of a dataset's config."""
    path = dataset.get('path')
    if path is None or 'chat_template' not in dataset:
        raise ValueError('--check reads conversations; this data is none (ConversationDataset)')
    encoder = ConversationEncoder(
        tokenizer,
        build_template(dataset['chat_template']),
        dataset['seq_len'],
        dataset.get('overlong', 'split'),
        dataset.get('add_ending', True),
    )
    domains = domains_of([path] if isinstance(path, str) else path)
    return look_over(domains, encoder, dataset.get('format', 'auto'))


def tell(report: Report) -> int:
    """Print a report; 1 if there are problems."""
    console = Console(highlight=False)
    for problem in report.problems:
        console.print(problem, style='red', markup=False, soft_wrap=True)
    console.print(report.table())
    for line in report.lines():
        console.print(line)
    return 1 if report.problems else 0


if __name__ == '__main__':
    sys.exit(main())
