"""Texts or conversations -> `.bin` files that InternLM and InternEvo read."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import read_examples
from internlm_mm.datasets.documents import fraction_of
from internlm_mm.datasets.internlm_bin import samples_of, write_bin
from internlm_mm.datasets.preprocessing import (
    SPLITS,
    SUMMARY_NAME,
    Counts,
    check_output,
    domains_of,
    preprocess,
)
from internlm_mm.datasets.record_tokens import masked_writer
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import TokenFileWriter
from internlm_mm.tokenizers import build_template, load_tokenizer
from internlm_mm.utils.publish import publish

BIN_NAME = 'dataset.bin'  # as InternLM's own tools call it


def preprocess_to_bins(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    chat_template: str | Mapping[str, Any] | None = None,
    max_length: int | None = None,
    validation_inputs: Sequence[str | Path] = (),
    validation_fraction: float = 0.0,
    text_key: str = 'text',
    add_bos: bool = True,
    min_document_length: int = 1,
    num_workers: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, dict[str, Counts]]:
    """Write `OUTPUT/train/DOMAIN/dataset.bin` and `OUTPUT/validation/...`, each with its `.meta`.

    Of conversations, tokens that are not learned are negative: all but what the assistant writes,
    the mark that ends it, and the template's ending. InternLM tells kinds of text by folders `en`,
    `cn` and `code`; InternEvo by any.

    Args:
        inputs: As in `preprocess`; with `chat_template` as in `ConversationDataset`.
        output: The folder to make.
        tokenizer: What `load_tokenizer` reads.
        chat_template: Of the conversations; None reads texts.
        max_length: Most tokens of a conversation, which is split before a user's turn.
        validation_inputs: As in `preprocess`.
        validation_fraction: As in `preprocess`.
        text_key: As in `preprocess`; of texts.
        add_bos: As in `preprocess`; of texts.
        min_document_length: As in `preprocess`.
        num_workers: As in `preprocess`; conversations take one process.
        overwrite: As in `preprocess`.
        show_progress: As in `preprocess`.

    Returns:
        Counts by split and domain; a conversation that is split is several documents.

    Raises:
        FileNotFoundError: As `preprocess`.
        FileExistsError: As `preprocess`.
        ValueError: As `preprocess`, or if a conversation is malformed, or id 0 is to be learned,
            which the format cannot say.
    """
    output = Path(output)
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', suffix='.partial', dir=output.parent))
    try:
        if chat_template is None:
            if max_length is not None:
                raise ValueError('max_length splits conversations: it needs chat_template')
            counts = preprocess(
                inputs,
                work / 'tokens',
                tokenizer=tokenizer,
                validation_inputs=validation_inputs,
                validation_fraction=validation_fraction,
                text_key=text_key,
                add_bos=add_bos,
                min_document_length=min_document_length,
                num_workers=num_workers,
                show_progress=show_progress,
            )
        else:
            encoder = ConversationEncoder(
                load_tokenizer(tokenizer), build_template(chat_template), max_length or sys.maxsize
            )
            counts = _tokenise(
                work / 'tokens',
                _sources(inputs, validation_inputs, validation_fraction),
                encoder,
                validation_fraction,
                min_document_length,
            )
            inputs_told = {
                'inputs': [str(path) for path in inputs],
                'validation_inputs': [str(path) for path in validation_inputs],
                'validation_fraction': validation_fraction,
                'tokenizer': {'path': str(tokenizer), 'hash': encoder.tokenizer.hash},
            }
            _write_summary(work / 'tokens', inputs_told, encoder, counts)
        _convert(work / 'tokens', work / 'bins', counts)
        publish(work / 'bins', output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


def _write_summary(
    folder: Path,
    told: Mapping[str, Any],
    encoder: ConversationEncoder,
    counts: Mapping[str, Mapping[str, Counts]],
) -> None:
    """What was asked for and what came of it."""
    summary = {
        **told,
        'chat_template': encoder.template.name,
        'vocab_size': encoder.tokenizer.vocab_size,
        'counts': {
            split: {domain: asdict(count) for domain, count in domains.items()}
            for split, domains in counts.items()
        },
    }
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + '\n')


def _sources(
    inputs: Sequence[str | Path], validation_inputs: Sequence[str | Path], fraction: float
) -> list[tuple[str | None, str, list[Path]]]:
    """Files by split and domain; None where a hash decides on the split."""
    if not 0 <= fraction < 1:
        raise ValueError(f'validation_fraction must be in [0, 1), got {fraction}')
    if fraction and validation_inputs:
        raise ValueError('give validation_inputs or validation_fraction, not both')
    train = None if fraction else 'train'
    held_out = domains_of(validation_inputs).items()
    return [
        *((train, domain, files) for domain, files in domains_of(inputs).items()),
        *(('validation', domain, files) for domain, files in held_out),
    ]


def _tokenise(
    folder: Path,
    sources: Sequence[tuple[str | None, str, list[Path]]],
    encoder: ConversationEncoder,
    fraction: float,
    min_length: int,
) -> dict[str, dict[str, Counts]]:
    counts: dict[str, dict[str, Counts]] = {split: {} for split in SPLITS}
    for wanted, domain, files in sources:
        with ExitStack() as stack:
            writers: dict[str, TokenFileWriter] = {}
            for example in (example for file in files for example in read_examples(file)):
                if isinstance(example, ValueError):
                    raise example
                split = wanted
                if split is None:
                    text = json.dumps(example.messages, sort_keys=True)
                    held_out = fraction_of(text, 'validation') < fraction
                    split = 'validation' if held_out else 'train'
                if split not in writers:
                    writer = masked_writer(folder / split / domain, encoder.tokenizer)
                    writers[split] = stack.enter_context(writer)
                count = counts[split].setdefault(domain, Counts())
                for ids, loss_mask in encoder(example).documents:
                    if len(ids) < min_length:
                        count.dropped += 1
                        continue
                    writers[split].add(ids, np.array(loss_mask))
                    count.documents += 1
                    count.tokens += len(ids)
    if not any(count.documents for domains in counts.values() for count in domains.values()):
        raise ValueError('there is no conversation in the inputs, or none is long enough')
    return counts


def _convert(tokens: Path, bins: Path, counts: Mapping[str, Mapping[str, Counts]]) -> None:
    for split, domains in counts.items():
        for domain, count in domains.items():
            if not count.documents:
                continue
            samples = samples_of(TokenFile(tokens / split / domain))
            try:
                write_bin(bins / split / domain / BIN_NAME, samples)
            except ValueError as error:
                raise ValueError(f'{split}, {domain}: {error}') from None
    shutil.copyfile(tokens / SUMMARY_NAME, bins / SUMMARY_NAME)
    bins.chmod(0o755)
