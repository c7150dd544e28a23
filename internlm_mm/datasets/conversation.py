"""Rows for fine-tuning, from conversations."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import check_format, read_examples
from internlm_mm.datasets.packed import PackedRows, check_packing
from internlm_mm.datasets.preprocessing import domains_of
from internlm_mm.datasets.record_tokens import cached_tokens, encode_records, masked_writer
from internlm_mm.datasets.row_order import check_order
from internlm_mm.datasets.token_cache import hash_contents
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.registry import DATASETS, TOKENIZERS
from internlm_mm.tokenizers import Tokenizer, build_template, load_tokenizer
from internlm_mm.utils.suggest import did_you_mean

ON_ERROR = ('raise', 'skip')
COUNTS_NAME = 'conversations.json'


@dataclass
class ConversationCounts:
    """What became of one domain's conversations.

    Attributes:
        conversations: Those that are trained on.
        documents: What they were split into.
        cut: Conversations that were longer than a row, split or truncated.
        tokens: Of all documents.
        trained: Tokens with a loss.
        lost: Tokens that `overlong='truncate'` cut off.
        skipped: Records that were left out, by `on_error='skip'`.
        formats: Conversations by the form of their records.
        messages: The first errors of those that were left out.
    """

    conversations: int = 0
    documents: int = 0
    cut: int = 0
    tokens: int = 0
    trained: int = 0
    lost: int = 0
    skipped: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@DATASETS.register_module()
class ConversationDataset(PackedRows):
    """Conversations spelt by a chat template, an endless, shuffled sequence of rows of them.

    There is a loss on what the assistant writes and on the mark that ends it, and on nothing else.
    Files are tokenised when a run first needs them, into token files below `cache_dir`: by one
    process, for which the others wait, and never again for the same data, tokenizer, template and
    options.

    Args:
        path: Files and folders of json, jsonl, both with .gz, and parquet, one or several. In a
            folder each sub-folder is a domain, and each file directly in it another; 'NAME=PATH'
            names a domain.
        seq_len: Length of a row, in tokens.
        chat_template: A name in the registry, or a dict with `type`.
        tokenizer: The model's: its config or a path; None takes the run's.
        packing: 'best_fit' puts whole conversations together so that little is wasted; 'documents'
            puts them end to end and cuts them where rows end; None makes each a row.
        overlong: What becomes of a conversation that is longer than a row: 'split' before a user's
            turn, with the system's turns once more; 'truncate'; or 'error'.
        format: 'messages' (OpenAI's), 'alpaca', 'sharegpt', 'prompt_answer'; 'auto' is told by the
            keys of each file's first record.
        on_error: 'raise' stops at the first malformed record; 'skip' leaves them out and says how
            many.
        add_ending: Whether conversations end as the template's own samples do (`</s>` of
            InternLM), where it has an ending.
        weights: Share of each domain, by name, in any unit; None reads every row once an epoch.
        shuffle: False keeps the order, for evaluation.
        seed: Another seed, another order.
        cache_dir: Where token files are made.

    Raises:
        FileNotFoundError: If there is no data or no tokenizer.
        ValueError: If an option is none, or a record is malformed: names file, line and field.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        seq_len: int,
        chat_template: str | Mapping[str, Any],
        tokenizer: Tokenizer | Mapping[str, Any] | str | None = None,
        packing: str | None = 'best_fit',
        overlong: str = 'split',
        format: str = 'auto',
        on_error: str = 'raise',
        add_ending: bool = True,
        weights: Mapping[str, float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str | Path = 'data/cache',
    ) -> None:
        check_packing(packing, seq_len)
        check_order(weights, shuffle)
        check_format(format)
        if on_error not in ON_ERROR:
            hint = did_you_mean(on_error, ON_ERROR)
            raise ValueError(f'on_error={on_error!r} is none of {", ".join(ON_ERROR)}.{hint}')
        encoder = ConversationEncoder(
            tokenizer_of(tokenizer), build_template(chat_template), seq_len, overlong, add_ending
        )
        inputs = [path] if isinstance(path, (str, Path)) else path
        domains = domains_of(inputs, texts=False)
        folder = tokenise(domains, encoder, cache_dir, format=format, on_error=on_error)
        self.template = encoder.template
        self.counts = {
            name: ConversationCounts(**counts)
            for name, counts in json.loads((folder / COUNTS_NAME).read_text('utf-8')).items()
        }
        self._report_counts()
        super().__init__(
            {name: TokenFile(folder / 'tokens' / name) for name in domains},
            seq_len=seq_len,
            packing=packing,
            weights=weights,
            shuffle=shuffle,
            seed=seed,
        )

    def _report_counts(self) -> None:
        for name, counts in self.counts.items():
            formats = ', '.join(counts.formats)
            lost = f', {counts.lost:,} tokens cut off' if counts.lost else ''
            print_log(
                f'{name}: {counts.conversations:,} conversations ({formats}), {counts.cut:,} of '
                f'them longer than a row{lost}; {counts.trained:,} of {counts.tokens:,} tokens '
                'learned',
                logger='current',
                level=logging.INFO,
            )
            if counts.skipped:
                lines = '\n  '.join(counts.messages)
                print_log(
                    f"{name}: {counts.skipped:,} malformed records left out by on_error='skip', "
                    f'the first:\n  {lines}',
                    logger='current',
                    level=logging.WARNING,
                )


def tokenise(
    domains: Mapping[str, Sequence[Path]],
    encoder: ConversationEncoder,
    cache_dir: str | Path,
    *,
    format: str = 'auto',
    on_error: str = 'raise',
) -> Path:
    """Token files of conversations, made unless they are there.

    Args:
        domains: Files by domain.
        encoder: Spells conversations.
        cache_dir: Where the folder is made.
        format: As in `ConversationDataset`.
        on_error: As in `ConversationDataset`.

    Returns:
        A folder with `tokens/DOMAIN`, a token file each, and `COUNTS_NAME`.

    Raises:
        ValueError: As `ConversationDataset`.
    """
    source = {
        'counts': sorted(asdict(ConversationCounts())),
        'domains': {name: hash_contents(files) for name, files in domains.items()},
        'format': format,
        'on_error': on_error,
    }
    return cached_tokens(
        domains,
        encoder,
        cache_dir,
        counts_name=COUNTS_NAME,
        source=source,
        write=lambda path, files: _write(path, files, encoder, format, on_error),
    )


def _write(
    path: Path, files: Sequence[Path], encoder: ConversationEncoder, format: str, on_error: str
) -> ConversationCounts:
    counts = ConversationCounts()
    with masked_writer(path, encoder.tokenizer) as writer:
        for file in files:
            examples = read_examples(file, format)
            for example, encoded in encode_records(examples, encoder, on_error, counts):
                documents, was_cut, num_lost = encoded
                counts.conversations += 1
                counts.cut += was_cut
                counts.lost += num_lost
                counts.formats[example.format] = counts.formats.get(example.format, 0) + 1
                for ids, loss_mask in documents:
                    writer.add(ids, np.array(loss_mask))
                    counts.documents += 1
                    counts.tokens += len(ids)
                    counts.trained += sum(loss_mask[1:])
        if not counts.documents:
            reason = f', {counts.skipped} malformed: {counts.messages[0]}' if counts.skipped else ''
            raise ValueError(f'{", ".join(map(str, files))}: no conversation to learn from{reason}')
    return counts


def tokenizer_of(tokenizer: Tokenizer | Mapping[str, Any] | str | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            'conversations need a tokenizer: tokenizer=dict(type=..., path=...) in the config, or '
            'dataset.tokenizer'
        )
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str):
        return load_tokenizer(tokenizer)
    return TOKENIZERS.build(dict(tokenizer))
