"""Check conversations with tool calls, as a config trains on them; 1 if something is wrong."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_mm.agents import check_record
from internlm_mm.datasets.browsing import Sheet, visible
from internlm_mm.datasets.browsing_page import check_page, dataset_page, shown_rows
from internlm_mm.datasets.conversation_formats import Example
from internlm_mm.datasets.inspection import Report
from internlm_mm.datasets.inspection_sets import inspect
from internlm_mm.engine.preflight import build_data_part
from internlm_mm.registry import DATASETS, TOKENIZERS
from internlm_mm.tokenizers import ChatTemplate, Tokenizer
from internlm_mm.tokenizers.chat_spelling import Encoded
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config

EXAMPLES = """examples:
  python projects/tool_agent/check_data.py projects/tool_agent/configs/internlm2_7b_agent.py
  python projects/tool_agent/check_data.py CONFIG --val
  python projects/tool_agent/check_data.py CONFIG --html calls.html --rows 20
"""


@dataclass
class Counts:
    """What is called in a set of conversations.

    Attributes:
        conversations: Those without problems of their own.
        without_calls: Those of them in which no tool is called.
        calls: Calls by the name of their tool.
        declared: Conversations by the names of tools that are declared in them.
        turns: Conversations by how often the assistant calls.
        together: Turns by how many calls are in them.
    """

    conversations: int = 0
    without_calls: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    declared: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    together: Counter[int] = field(default_factory=Counter)

    def check(
        self,
        example: Example,
        documents: Sequence[Encoded],
        template: ChatTemplate,
        tokenizer: Tokenizer,
    ) -> list[str]:
        """Problems of a conversation; one without any is counted."""
        tools = example.tools or None
        found = check_record(example.messages, tools, documents, template, tokenizer)
        if documents and not found:
            self._count(example)
        return found

    def _count(self, example: Example) -> None:
        called = [m['tool_calls'] for m in example.messages if m.get('tool_calls')]
        names = [call['function']['name'] for calls in called for call in calls]
        self.conversations += 1
        self.without_calls += not names
        self.calls.update(names)
        self.declared.update({tool['function']['name'] for tool in example.tools})
        self.turns[len(called)] += 1
        self.together.update(map(len, called))

    def lines(self, problems: int) -> Iterator[str]:
        """The numbers."""
        found = f'{problems:,} problem' + ('' if problems == 1 else 's')
        yield (
            f'{self.conversations:,} conversations, {self.without_calls:,} of them without a call; '
            f'{found}'
        )
        if self.calls:
            most = ', '.join(f'{name} {count:,}' for name, count in self.calls.most_common(10))
            yield f'{sum(self.calls.values()):,} calls of {len(self.calls):,} tools: {most}'
            yield f'turns with calls in a conversation: {_spread(self.turns)}'
            yield f'calls in a turn: {_spread(self.together)}'
        never = sorted(set(self.declared) - set(self.calls))
        if never:
            more = '' if len(never) <= 10 else f' and {len(never) - 10:,} more'
            yield f'declared and never called: {", ".join(never[:10])}{more}'

    def sheet(self) -> Sheet:
        """Calls by tool, as a table."""
        names = sorted({*self.calls, *self.declared}, key=lambda name: (-self.calls[name], name))
        rows = [(name, f'{self.declared[name]:,}', f'{self.calls[name]:,}') for name in names]
        return Sheet('tools', ('tool', 'conversations', 'calls'), rows)


def _spread(counts: Counter[int]) -> str:
    return ', '.join(f'{number}: {count:,}' for number, count in sorted(counts.items()))


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if there are problems, 2 if nothing can be read."""
    parser = Arguments(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config, by its path or name')
    parser.add_argument('--val', action='store_true', help='the held-out data in its place')
    parser.add_argument(
        '--html', metavar='FILE', help='a page with rows, what is learned in them, and problems'
    )
    parser.add_argument('--rows', type=int, default=20, help='rows of the page (default: 20)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    counts = Counts()
    try:
        if args.html:
            check_page(Path(args.html))
        data, tokenizer = _read_config(args)
        report = inspect(data, tokenizer, also=counts.check)
        if args.html:
            _write_page(args, data, tokenizer, report, counts)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for line in (*report.problems, *report.notes, *counts.lines(len(report.problems))):
        print(visible(line).encode('utf-8', 'backslashreplace').decode())
    if args.html:
        print(f'written: {args.html}')
    return 1 if report.problems else 0


def _key(args: argparse.Namespace) -> str:
    return 'val_dataloader' if args.val else 'train_dataloader'


def _read_config(args: argparse.Namespace) -> tuple[dict[str, Any], Tokenizer]:
    """The config of the data, and its tokenizer."""
    if args.rows < 0:
        raise ValueError(f'--rows {args.rows}: 0 or more')
    config = load_config(args.config, parse_cfg_options(args.cfg_options))
    check_config(config)
    key = _key(args)
    data: dict[str, Any] = dict(config[key].dataset) if config.get(key) else {}
    if 'chat_template' not in data or not config.get('tokenizer'):
        raise ValueError(f'{args.config}: {key} reads no conversations, or has no tokenizer')
    return data, build_data_part(TOKENIZERS, config.tokenizer, 'tokenizer')


def _write_page(
    args: argparse.Namespace,
    data: dict[str, Any],
    tokenizer: Tokenizer,
    report: Report,
    counts: Counts,
) -> None:
    """Rows as training sees them; without any where problems keep it from reading the data."""
    dataset, rows = None, []
    try:
        dataset = build_data_part(DATASETS, data, f'{_key(args)}.dataset', tokenizer)
        rows = list(shown_rows(dataset, tokenizer, 0, args.rows))
    except ValueError:
        if not report.problems:
            raise
    page = dataset_page(args.config, _key(args), dataset, tokenizer, rows, report, [counts.sheet()])
    Path(args.html).write_text(page, encoding='utf-8')


if __name__ == '__main__':
    sys.exit(main())
