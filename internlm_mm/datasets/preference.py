"""Rows of pairs of answers, of which one was preferred."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from internlm_mm.datasets.conversation import ON_ERROR, tokenizer_of
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import Example
from internlm_mm.datasets.packed import PackedRows, check_packing
from internlm_mm.datasets.packing import Row
from internlm_mm.datasets.preference_formats import Preference, check_format, read_preferences
from internlm_mm.datasets.preprocessing import domains_of
from internlm_mm.datasets.record_tokens import cached_tokens, encode_records, masked_writer
from internlm_mm.datasets.row_order import check_order
from internlm_mm.datasets.token_cache import hash_in_order
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.registry import DATASETS
from internlm_mm.tokenizers import Tokenizer, build_template
from internlm_mm.tokenizers.chat_spelling import Encoded
from internlm_mm.utils.suggest import did_you_mean

OVERLONG = ('error', 'truncate', 'skip')
"""What may be done with a pair that is longer than a row."""

COUNTS_NAME = 'preferences.json'
_PACKINGS = ('best_fit', None)


@dataclass
class PreferenceCounts:
    """What became of one domain's preferences.

    Attributes:
        pairs: Those that are trained on.
        cut: Pairs that were longer than a row and were truncated.
        overlong: Pairs that were longer than a row and were left out, by `overlong='skip'`.
        tokens: Of both answers with their prompts.
        compared: Tokens of the answers alone.
        skipped: Records that were left out, by `on_error='skip'`.
        formats: Pairs by the form of their records.
        messages: The first errors of those that were left out.
    """

    pairs: int = 0
    cut: int = 0
    overlong: int = 0
    tokens: int = 0
    compared: int = 0
    skipped: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@DATASETS.register_module()
class PreferenceDataset(PackedRows):
    """Prompts with two answers each, an endless, shuffled sequence of rows of such pairs.

    A pair is two documents next to one another, first the chosen answer behind its prompt, then the
    rejected one behind the same; they do not see one another, and a row never has half a pair.
    Labels are on the answers alone, with the mark that ends them. Files are tokenised as those of a
    `ConversationDataset` are.

    Args:
        path: Files and folders of json, jsonl, both with .gz, and parquet, one or several. In a
            folder each sub-folder is a domain, and each file directly in it another; 'NAME=PATH'
            names a domain.
        seq_len: Length of a row, in tokens; both answers with their prompts must fit into it.
        chat_template: A name in the registry, or a dict with `type`.
        tokenizer: The model's: its config or a path; None takes the run's.
        packing: 'best_fit' puts pairs together so that little is wasted; None makes each a row.
        overlong: What becomes of a pair that is longer than a row: 'error'; 'truncate', which cuts
            the ends of the longer answer, or of both; or 'skip', which leaves it out and counts it.
        format: One of `preference_formats.FORMATS`; 'auto' is told by the keys of each file's first
            record.
        on_error: 'raise' stops at the first malformed record; 'skip' leaves them out and says how
            many.
        add_ending: Whether answers end as the template's own samples do (`</s>` of InternLM), where
            it has an ending.
        weights: Share of each domain, by name, in any unit; None reads every row once an epoch.
        shuffle: False keeps the order, for evaluation.
        seed: Another seed, another order.
        cache_dir: Where token files are made.

    Raises:
        FileNotFoundError: If there is no data or no tokenizer.
        ValueError: If an option is none, or a record is malformed: names file, line and field.
    """

    is_paired = True

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        seq_len: int,
        chat_template: str | Mapping[str, Any],
        tokenizer: Tokenizer | Mapping[str, Any] | str | None = None,
        packing: str | None = 'best_fit',
        overlong: str = 'error',
        format: str = 'auto',
        on_error: str = 'raise',
        add_ending: bool = True,
        weights: Mapping[str, float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str | Path = 'data/cache',
    ) -> None:
        if packing not in _PACKINGS:
            raise ValueError(
                f"packing={packing!r}: pairs are packed by 'best_fit' or, for None, a row each"
            )
        check_packing(packing, seq_len)
        check_order(weights, shuffle)
        check_format(format)
        for key, value, known in (
            ('on_error', on_error, ON_ERROR),
            ('overlong', overlong, OVERLONG),
        ):
            if value not in known:
                hint = did_you_mean(value, known)
                raise ValueError(f'{key}={value!r} is none of {", ".join(known)}.{hint}')
        encoder = PairEncoder(
            tokenizer_of(tokenizer), build_template(chat_template), seq_len, overlong, add_ending
        )
        inputs = [path] if isinstance(path, (str, Path)) else path
        domains = domains_of(inputs, texts=False)
        self.folder = tokenise(domains, encoder, cache_dir, format=format, on_error=on_error)
        self.template = encoder.template
        self.cache_dir = Path(cache_dir)  # of references too
        self.counts = {
            name: PreferenceCounts(**counts)
            for name, counts in json.loads((self.folder / COUNTS_NAME).read_text('utf-8')).items()
        }
        self._report_counts()
        self._references: list[np.ndarray] | None = None
        super().__init__(
            {name: TokenFile(self.folder / 'tokens' / name) for name in domains},
            seq_len=seq_len,
            packing=packing,
            weights=weights,
            shuffle=shuffle,
            seed=seed,
            together=2,
        )

    def read(self, domain: int, row: int) -> Row:
        """Row `row` of a domain, with what another model says of it, if that is known."""
        pairs = self.pairs_of(domain, row)
        references = None
        if self._references is not None:
            references = np.zeros(self.max_docs, np.float32)
            references[: 2 * len(pairs)] = self._references[domain][pairs].reshape(-1)
        found = super().read(domain, row)
        return replace(found, num_pairs=len(pairs), references=references)

    def pairs_of(self, domain: int, row: int) -> np.ndarray:
        """Which pairs of a domain lie in one of its rows, in their order."""
        assert self._bins is not None
        return self._bins[domain].row(row)

    @property
    def has_references(self) -> bool:
        """Whether rows carry what another model says of them."""
        return self._references is not None

    @property
    def num_pairs(self) -> list[int]:
        """Pairs of each domain."""
        return [len(file) // 2 for file in self.files]

    def set_references(self, references: Sequence[np.ndarray]) -> None:
        """Let rows carry what another model says of their answers.

        Args:
            references: Log-probability of the chosen and of the rejected answer of every pair of
                each domain, [pairs, 2].
        """
        shapes = [(count, 2) for count in self.num_pairs]
        assert [array.shape for array in references] == shapes
        self._references = [np.asarray(array, np.float32) for array in references]

    def _report_counts(self) -> None:
        for name, counts in self.counts.items():
            formats = ', '.join(counts.formats)
            text = (
                f'{name}: {counts.pairs:,} pairs ({formats}), {counts.cut:,} of them longer than a '
                f'row and cut; {counts.compared:,} of {counts.tokens:,} tokens compared'
            )
            print_log(text, logger='current', level=logging.INFO)
            for number, what in (
                (counts.overlong, "pairs longer than a row left out by overlong='skip'"),
                (counts.skipped, "malformed records left out by on_error='skip'"),
            ):
                if number:
                    lines = ''.join(f'\n  {line}' for line in counts.messages)
                    text = f'{name}: {number:,} {what}, the first of what was left out:{lines}'
                    print_log(text, logger='current', level=logging.WARNING)


class PairEncoder:
    """Spells pairs of answers in tokens.

    Args:
        tokenizer: Of the model.
        template: How conversations are spelt.
        max_tokens: Most tokens of a pair.
        overlong: One of `OVERLONG`.
        add_ending: Whether answers end as samples of the template do.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: Any, max_tokens: int, overlong: str, add_ending: bool
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.max_tokens, self.overlong, self.add_ending = max_tokens, overlong, add_ending
        self._encode = ConversationEncoder(
            tokenizer, template, sys.maxsize, add_ending=add_ending, overlong='error'
        )

    def __call__(self, pair: Preference) -> tuple[list[Encoded], bool] | None:
        """The two answers behind their prompt, and whether they were cut; None to leave them out.

        Raises:
            ValueError: Naming place, message and field, if it cannot be spelt, an answer is empty,
                both are spelt alike, or the pair is too long.
        """
        prompt = [
            {**message, 'loss': False} if message.get('role') == 'assistant' else message
            for message in pair.prompt
        ]
        documents = [
            self._document(prompt, answer, name, pair)
            for name, answer in (('chosen', pair.chosen), ('rejected', pair.rejected))
        ]
        if documents[0].ids == documents[1].ids:
            raise ValueError(f'{pair.place}: chosen and rejected are spelt alike')
        total = sum(len(document.ids) for document in documents)
        if total <= self.max_tokens:
            return documents, False
        if self.overlong == 'skip':
            return None
        if self.overlong == 'error':
            raise ValueError(
                f'{pair.place}: chosen and rejected have {total:,} tokens with their prompts, more '
                f"than the {self.max_tokens:,} of a row; overlong='truncate' cuts such pairs, "
                "'skip' leaves them out"
            )
        return self._cut(documents, pair.place), True

    def _document(
        self, prompt: list[Any], answer: list[Any], name: str, pair: Preference
    ) -> Encoded:
        example = Example([*prompt, *answer], pair.tools, f'{pair.place}, {name}', pair.format)
        (document,) = self._encode(example).documents
        return document

    def _cut(self, documents: list[Encoded], place: str) -> list[Encoded]:
        """The shorter one is spared as long as the longer one is longer."""
        shorter = min(len(document.ids) for document in documents)
        limit = max(self.max_tokens - shorter, self.max_tokens // 2)
        cut = [Encoded(one.ids[:limit], one.loss_mask[:limit]) for one in documents]
        if not all(any(one.loss_mask[1:]) for one in cut) or cut[0].ids == cut[1].ids:
            raise ValueError(
                f'{place}: longer than the {self.max_tokens:,} tokens of a row, and nothing to '
                'compare is left of it'
            )
        return cut


def tokenise(
    domains: Mapping[str, Sequence[Path]],
    encoder: PairEncoder,
    cache_dir: str | Path,
    *,
    format: str = 'auto',
    on_error: str = 'raise',
) -> Path:
    """Token files of preferences, made unless they are there: documents 2n and 2n + 1 are a pair.

    Args:
        domains: Files by domain.
        encoder: Spells pairs.
        cache_dir: Where the folder is made.
        format: As in `PreferenceDataset`.
        on_error: As in `PreferenceDataset`.

    Returns:
        A folder with `tokens/DOMAIN`, a token file each, and `COUNTS_NAME`.

    Raises:
        ValueError: As `PreferenceDataset`.
    """
    source = {
        'kind': 'preferences',
        'domains': {name: hash_in_order(files) for name, files in domains.items()},
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
    path: Path, files: Sequence[Path], encoder: PairEncoder, format: str, on_error: str
) -> PreferenceCounts:
    counts = PreferenceCounts()
    with masked_writer(path, encoder.tokenizer) as writer:
        for file in files:
            pairs = read_preferences(file, format)
            for pair, encoded in encode_records(pairs, encoder, on_error, counts):
                if encoded is None:
                    counts.overlong += 1
                    continue
                documents, was_cut = encoded
                counts.pairs += 1
                counts.cut += was_cut
                counts.formats[pair.format] = counts.formats.get(pair.format, 0) + 1
                for ids, loss_mask in documents:
                    writer.add(ids, np.array(loss_mask))
                    counts.tokens += len(ids)
                    counts.compared += sum(loss_mask[1:])
        if not counts.pairs:
            reasons = ''
            if counts.overlong:
                reasons += (
                    f', {counts.overlong:,} longer than the {encoder.max_tokens:,} tokens of a row '
                    "and left out by overlong='skip'"
                )
            if counts.skipped:
                reasons += f', {counts.skipped:,} malformed: {counts.messages[0]}'
            raise ValueError(f'{", ".join(map(str, files))}: no pair to learn from{reasons}')
    return counts
