"""Show the rows of a config's training data as the model sees them, or check all of it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from internlm_mm.agents import check_record
from internlm_mm.datasets.browsing import show_documents, visible
from internlm_mm.datasets.browsing_page import check_page, dataset_page, shown_rows
from internlm_mm.datasets.conversation import tokenizer_of
from internlm_mm.datasets.conversation_formats import Example
from internlm_mm.datasets.inspection import Report
from internlm_mm.datasets.inspection_sets import inspect
from internlm_mm.datasets.survey import packings, rows_an_epoch, sheets
from internlm_mm.engine.preflight import build_data_part
from internlm_mm.registry import DATASETS, TOKENIZERS
from internlm_mm.tokenizers import ChatTemplate, Tokenizer
from internlm_mm.tokenizers.chat_spelling import Encoded
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config

EXAMPLES = """tokens that are learned are green, special ones magenta, and underlined where they are
learned; context is white

examples:
  python tools/browse_dataset.py internlm_tiny_sft --rows 3
  python tools/browse_dataset.py internlm_tiny_sft --check
  python tools/browse_dataset.py internlm_tiny_sft --rows 50 --html chats.html
"""
FIRST = 2000  # records of a file that statistics by role are made of, without --check


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if `--check` finds problems, 2 if nothing can be read."""
    parser = Arguments(
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
        '--check', action='store_true', help='read every record and name all that is wrong'
    )
    parser.add_argument('--html', metavar='FILE', help='a page that shows it, which is written')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    report: Report | None = None
    try:
        if args.html:
            check_page(Path(args.html))
        data, tokenizer = _read_config(args)
        if args.check:
            report = inspect(data, tokenizer, also=_tool_problems)
        dataset = None
        if report is None or args.html:
            dataset = _build(args, data, tokenizer, report)
        if args.html:
            part = _key(args)
            told = report or _first_records(data, tokenizer)
            count = 0 if dataset is None else args.rows
            rows = list(shown_rows(dataset, tokenizer, args.first, count))
            page = dataset_page(args.config, part, dataset, tokenizer, rows, told)
            Path(args.html).write_text(page, encoding='utf-8')
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if report is not None:
        _tell(report, console)
    elif not args.html:
        _show(args, dataset, tokenizer, console)
    if args.html:
        console.print(f'written: {args.html}', markup=False, soft_wrap=True)
    return 1 if report is not None and report.problems else 0


def _key(args: argparse.Namespace) -> str:
    return 'val_dataloader' if args.val else 'train_dataloader'


def _read_config(args: argparse.Namespace) -> tuple[dict[str, Any], Tokenizer | None]:
    """The config of the data, and the tokenizer that its tokens are of, if there is one."""
    if args.rows < 0 or args.first < 0:
        raise ValueError(f'--rows {args.rows} --first {args.first}: both count from 0')
    config = load_config(args.config, parse_cfg_options(args.cfg_options))
    check_config(config)
    if not config.get(_key(args)):
        raise ValueError(f'{args.config} has no {_key(args)}')
    data = dict(config[_key(args)].dataset)
    if data.get('tokenizer') is not None:
        return data, tokenizer_of(data['tokenizer'])
    if not config.get('tokenizer'):
        return data, None
    return data, build_data_part(TOKENIZERS, config.tokenizer, 'tokenizer')


def _build(
    args: argparse.Namespace,
    data: dict[str, Any],
    tokenizer: Tokenizer | None,
    report: Report | None,
) -> Any:
    """The dataset; None where a check has told what keeps it from being made."""
    try:
        return build_data_part(DATASETS, data, f'{_key(args)}.dataset', tokenizer)
    except ValueError:
        if report is None or not report.problems:
            raise
        return None


def _tool_problems(
    example: Example, documents: Sequence[Encoded], template: ChatTemplate, tokenizer: Tokenizer
) -> list[str]:
    """What is wrong with a conversation in which tools are called."""
    messages, tools = example.messages, example.tools
    if not tools and not any(message.get('tool_calls') for message in messages):
        return []
    return check_record(messages, tools or None, documents, template, tokenizer)


def _show(
    args: argparse.Namespace, dataset: Any, tokenizer: Tokenizer | None, console: Console
) -> None:
    count = rows_an_epoch(dataset)
    of = '' if count is None else f' of {count:,} an epoch'
    for row in shown_rows(dataset, tokenizer, args.first, args.rows):
        console.rule(f'row {row.number}{of}')
        console.print(show_documents(row.documents))
    for sheet in sheets(dataset):
        console.print(sheet.table())
    for line in packings(dataset):
        console.print(line, markup=False)


def _first_records(data: dict[str, Any], tokenizer: Tokenizer | None) -> Report | None:
    """Statistics by role of so many records as take no time, where records have roles."""
    try:
        return inspect(data, tokenizer, FIRST) if 'path' in data else None
    except ValueError:  # data of another class
        return None


def _tell(report: Report, console: Console) -> None:
    for problem in report.problems:
        console.print(visible(problem), style='red', markup=False, soft_wrap=True)
    if report.messages:
        console.print(report.roles().table())
    for line in report.lines():
        console.print(visible(line), markup=False, soft_wrap=True)


if __name__ == '__main__':
    sys.exit(main())
