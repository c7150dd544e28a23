"""Check conversations with tool calls, as a config trains on them; 1 if something is wrong."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_mm.agents import check_conversation, check_documents
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import Example, read_examples
from internlm_mm.datasets.preprocessing import domains_of
from internlm_mm.engine.preflight import build_data_part
from internlm_mm.registry import TOKENIZERS
from internlm_mm.tokenizers import build_template
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config

EXAMPLES = """examples:
  python projects/tool_agent/check_data.py projects/tool_agent/configs/internlm2_7b_agent.py
  python projects/tool_agent/check_data.py CONFIG --val
"""


@dataclass
class Findings:
    """What is in a set of conversations.

    Attributes:
        problems: A line each, with file and line.
        conversations: Those without problems.
        without_calls: Those of them in which no tool is called.
        calls: Calls by the name of their tool.
        unused: Tools that are declared and never called, by how often.
        turns: Conversations by how often the assistant calls.
        together: Turns by how many calls are in them.
    """

    problems: list[str] = field(default_factory=list)
    conversations: int = 0
    without_calls: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    together: Counter[int] = field(default_factory=Counter)

    def count(self, example: Example) -> None:
        """Take the numbers of a conversation."""
        called = [m['tool_calls'] for m in example.messages if m.get('tool_calls')]
        names = [call['function']['name'] for calls in called for call in calls]
        declared = {tool['function']['name'] for tool in example.tools}
        self.conversations += 1
        self.without_calls += not names
        self.calls.update(names)
        self.unused.update(declared - set(names))
        self.turns[len(called)] += 1
        self.together.update(map(len, called))

    def lines(self) -> Iterator[str]:
        """The numbers."""
        found = f'{len(self.problems):,} problem' + ('' if len(self.problems) == 1 else 's')
        yield (
            f'{self.conversations:,} conversations, {self.without_calls:,} of them without a call; '
            f'{found}'
        )
        if self.calls:
            most = ', '.join(f'{name} {count:,}' for name, count in self.calls.most_common(10))
            yield f'{sum(self.calls.values()):,} calls of {len(self.calls):,} tools: {most}'
            yield f'turns with calls in a conversation: {_spread(self.turns)}'
            yield f'calls in a turn: {_spread(self.together)}'
        never = sorted(set(self.unused) - set(self.calls))
        if never:
            more = '' if len(never) <= 10 else f' and {len(never) - 10:,} more'
            yield f'declared and never called: {", ".join(never[:10])}{more}'


def look_over(
    paths: Mapping[str, list[Path]], encoder: ConversationEncoder, format: str = 'auto'
) -> Findings:
    """Check every conversation of files.

    Args:
        paths: Files by domain.
        encoder: As training has it.
        format: As in `ConversationDataset`.
    """
    findings = Findings()
    for example in _examples(paths, format):
        problems = [str(example)] if isinstance(example, ValueError) else _check(example, encoder)
        findings.problems += problems
        if not problems:
            assert isinstance(example, Example)
            findings.count(example)
    return findings


def _examples(paths: Mapping[str, list[Path]], format: str) -> Iterator[Example | ValueError]:
    for path in (path for files in paths.values() for path in files):
        try:
            yield from read_examples(path, format, keep_going=True)
        except ValueError as error:  # what follows in this file cannot be read
            yield error


def _check(example: Example, encoder: ConversationEncoder) -> list[str]:
    template, tokenizer = encoder.template, encoder.tokenizer
    found = check_conversation(example.messages, example.tools or None, template, tokenizer)
    if not found:
        try:
            documents = encoder(example).documents
        except ValueError as error:
            return [str(error)]
        found = check_documents(documents, template, tokenizer)
    return [f'{example.place}, {problem}' for problem in found]


def _spread(counts: Counter[int]) -> str:
    return ', '.join(f'{number}: {count:,}' for number, count in sorted(counts.items()))


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if there are problems, 2 if nothing can be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config, by its path or name')
    parser.add_argument('--val', action='store_true', help='the held-out data in its place')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    key = 'val_dataloader' if args.val else 'train_dataloader'
    try:
        config = load_config(args.config, parse_cfg_options(args.cfg_options))
        check_config(config)
        data: dict[str, Any] = dict(config[key].dataset) if config.get(key) else {}
        if 'chat_template' not in data or not config.get('tokenizer'):
            raise ValueError(f'{args.config}: {key} reads no conversations, or has no tokenizer')
        encoder = ConversationEncoder(
            build_data_part(TOKENIZERS, config.tokenizer, 'tokenizer'),
            build_template(data['chat_template']),
            data['seq_len'],
            data.get('overlong', 'split'),
            data.get('add_ending', True),
        )
        path = data['path']
        domains = domains_of([path] if isinstance(path, (str, Path)) else path, texts=False)
        findings = look_over(domains, encoder, data.get('format', 'auto'))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for line in (*findings.problems, *findings.lines()):
        print(line.encode('utf-8', 'backslashreplace').decode())
    return 1 if findings.problems else 0


if __name__ == '__main__':
    sys.exit(main())
