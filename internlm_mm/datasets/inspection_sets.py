"""Any training data looked over for what is wrong, by the config of its dataset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.datasets.conversation import ConversationDataset
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.inspection import (
    Check,
    Marks,
    Report,
    absent_marks,
    has_stop,
    learned_stretches,
    look_over,
    texts_of,
)
from internlm_mm.datasets.internlm_bin import InternLMBinDataset, find_bins, read_lines
from internlm_mm.datasets.preference import PairEncoder, PreferenceDataset
from internlm_mm.datasets.preference_formats import Preference, read_preferences
from internlm_mm.datasets.preprocessing import domains_of
from internlm_mm.datasets.pretrain import PretrainDataset, find_token_files
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.registry import DATASETS
from internlm_mm.tokenizers import ChatTemplate, Tokenizer, build_template
from internlm_mm.tokenizers.chat_spelling import Encoded
from internlm_mm.utils.resolve import resolve_type
from internlm_mm.utils.signatures import options_of

_CHUNK = 4096  # documents handled at a time
_TOLD = 20  # of the same kind in one token file


def inspect(
    dataset: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    limit: int | None = None,
    also: Check | None = None,
) -> Report:
    """Read the whole set that a config names, and say what is wrong with it.

    Args:
        dataset: The config of a `ConversationDataset`, `PreferenceDataset`, `InternLMBinDataset` or
            `PretrainDataset`.
        tokenizer: Of the run.
        limit: Samples of each file to read; None reads all.
        also: What else to check of conversations; see `look_over`.

    Raises:
        ValueError: If the data is of another class, or conversations have no tokenizer.
        FileNotFoundError: If there is no data.
    """
    target = resolve_type(dataset['type'], DATASETS, 'dataset.type')
    options = options_of(target)
    defaults = {} if options is None else options.defaults
    for kind, look in _KINDS.items():
        if isinstance(target, type) and issubclass(target, kind):
            config = {**defaults, **dataset}
            if kind is ConversationDataset:
                return _conversations(config, tokenizer, limit, also)
            return look(config, tokenizer, limit)
    names = ', '.join(kind.__name__ for kind in _KINDS)
    name = getattr(target, '__name__', target)
    raise ValueError(f'data of {name} cannot be checked; that of {names} can')


def _conversations(
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    limit: int | None,
    also: Check | None = None,
) -> Report:
    encoder = ConversationEncoder(
        _needed(tokenizer),
        build_template(config['chat_template']),
        config['seq_len'],
        config['overlong'],
        config['add_ending'],
    )
    return look_over(_files(config), encoder, config['format'], limit, also)


def _pairs(config: Mapping[str, Any], tokenizer: Tokenizer | None, limit: int | None) -> Report:
    encoder = PairEncoder(
        _needed(tokenizer),
        build_template(config['chat_template']),
        config['seq_len'],
        config['overlong'],
        config['add_ending'],
    )
    report = Report('pairs', notes=absent_marks(encoder.tokenizer, encoder.template))
    marks = Marks()
    for files in _files(config).values():
        with report.of_domain(files):
            for path in files:
                _look_over_pairs(path, config['format'], limit, encoder, marks, report)
    return report


def _look_over_pairs(
    path: Path,
    format: str,
    limit: int | None,
    encoder: PairEncoder,
    marks: Marks,
    report: Report,
) -> None:
    try:
        pairs = read_preferences(path, format, keep_going=True)
        for pair in itertools.islice(pairs, limit):
            if isinstance(pair, ValueError):
                report.problems.append(str(pair))
            else:
                _look_at_pair(pair, encoder, marks, report)
        report.is_part |= limit is not None and next(pairs, None) is not None
    except ValueError as error:  # of the file: what follows cannot be read
        report.problems.append(str(error))


def _look_at_pair(pair: Preference, encoder: PairEncoder, marks: Marks, report: Report) -> None:
    parts = {'prompt': pair.prompt, 'chosen': pair.chosen, 'rejected': pair.rejected}
    try:
        encoded = encoder(pair)
    except ValueError as error:
        report.problems.append(str(error))
        return
    if encoded is None:  # left out by overlong='skip'
        report.cut += 1
        return
    documents, was_cut = encoded
    for name, messages in parts.items():
        report.problems += marks.problems(messages, f'{pair.place}, {name}')
    report.problems += marks.problems_of_tools(pair.tools, pair.place)
    report.conversations += 1
    report.cut += was_cut
    for name, document in zip(('chosen', 'rejected'), documents, strict=True):
        report.add(document)
        stretches = [] if was_cut else learned_stretches(document)
        if not all(has_stop(one, encoder.template, encoder.tokenizer) for one in stretches):
            report.problems.append(f'{pair.place}, {name}: the answer ends without a stop token')
    for name, messages in parts.items():
        texts = [text for message in messages for _, text in texts_of(message)]
        report.messages[name] += len(messages)
        report.with_loss[name] += 0 if name == 'prompt' else len(messages)
        report.tokens[name] += sum(len(encoder.tokenizer.encode(text)) for text in texts)


def _bins(config: Mapping[str, Any], tokenizer: Tokenizer | None, limit: int | None) -> Report:
    report = Report('samples')
    named = config['chat_template']
    template = None if named is None else build_template(named)
    if template is not None and tokenizer is not None:
        report.notes += absent_marks(tokenizer, template)
    else:
        report.notes.append(
            'stop tokens are not looked for: that needs a tokenizer, and dataset.chat_template'
        )
    for path in (path for files in find_bins(config['data_root']).values() for path in files):
        samples = read_lines(path, on_damage=lambda error: report.problems.append(str(error)))
        try:
            for number, (ids, loss_mask) in itertools.islice(samples, limit):
                place = f'{path}:{number}'
                document = Encoded(ids.tolist(), loss_mask.astype(bool).tolist())
                is_sound = _look_at_sample(document, place, config, report)
                if is_sound and template is not None and tokenizer is not None:
                    report.problems += _stop_problems(document, place, template, tokenizer)
            report.is_part |= limit is not None and next(samples, None) is not None
        except ValueError as error:  # .bin and .meta are not of one another
            report.problems.append(str(error))
    return report


def _look_at_sample(
    document: Encoded, place: str, config: Mapping[str, Any], report: Report
) -> bool:
    """Count a sample; whether it is trained on and its tokens can be read."""
    length, top = len(document.ids), max(document.ids)
    if length < config['min_length']:
        return False
    if top >= config['vocab_size']:
        report.problems.append(
            f"{place}: 'tokens' has {top}, outside the vocabulary of {config['vocab_size']}"
        )
        return False
    report.conversations += 1
    report.add(document)
    if not any(document.loss_mask[1:]):
        report.problems.append(f"{place}: 'tokens' has nothing to learn: no id is positive")
    if length > config['seq_len']:
        report.cut += 1
        if config['packing'] != 'documents':
            report.problems.append(
                f"{place}: 'tokens' has {length:,}, more than the {config['seq_len']:,} of a row; "
                "packing='documents' cuts what is too long"
            )
    return True


def _stop_problems(
    document: Encoded, place: str, template: ChatTemplate, tokenizer: Tokenizer
) -> list[str]:
    """A line if an answer has no stop token; texts that are learned from the start are none."""
    if all(document.loss_mask[1:]):
        return []
    stretches = learned_stretches(document)
    if document.loss_mask[0]:
        del stretches[0]  # bos, which InternLM's own tool does not make negative
    return [
        f"{place}: 'tokens', answer {number}: it ends without a stop token of {template.name!r} "
        'that is learned: the model would not stop'
        for number, stretch in enumerate(stretches)
        if not has_stop(stretch, template, tokenizer)
    ]


def _token_files(
    config: Mapping[str, Any], tokenizer: Tokenizer | None, limit: int | None
) -> Report:
    report = Report('documents')
    found = find_token_files(config['data_root'])
    names = config['domains'] or list(found)
    for path in (path for name in names for path in found.get(name, ())):
        try:
            file = TokenFile(path)
            file.verify()
            _look_at_file(file, config, tokenizer, limit, report)
        except ValueError as error:
            report.problems.append(str(error))
    return report


def _look_at_file(
    file: TokenFile,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    limit: int | None,
    report: Report,
) -> None:
    made_by = (file.tokenizer or {}).get('hash')
    if tokenizer is not None and made_by not in (None, tokenizer.hash):
        report.problems.append(f'{file.path}: made with another tokenizer than that of the run')
    count = len(file) if limit is None else min(limit, len(file))
    report.is_part |= count < len(file)
    without_end: list[int] = []
    for first in range(0, count, _CHUNK):
        offsets = np.asarray(file.offsets[first : min(first + _CHUNK, count) + 1])
        lengths = np.diff(offsets)
        kept = lengths >= config['min_document_length']
        report.conversations += int(kept.sum())
        report.lengths += lengths[kept].tolist()
        report.cut += int((lengths[kept] > config['seq_len']).sum())
        report.learned += int((lengths[kept] - 1).sum()) if file.loss_mask is None else 0
        if file.loss_mask is None and tokenizer is not None and tokenizer.eos_id is not None:
            ends = file.tokens[offsets[1:] - 1]
            without_end += (first + np.flatnonzero((ends != tokenizer.eos_id) & kept)).tolist()
        elif file.loss_mask is not None:
            spans = zip(offsets[:-1][kept], offsets[1:][kept], strict=True)
            learned = [int(file.loss_mask[start + 1 : stop].sum()) for start, stop in spans]
            report.learned += sum(learned)
    for index in without_end[:_TOLD]:
        report.problems.append(f'{file.path}: document {index} does not end with the end token')
    if len(without_end) > _TOLD:
        more = len(without_end) - _TOLD
        report.problems.append(f'{file.path}: {more:,} more documents without the end token')


_KINDS: dict[type, Callable[[Mapping[str, Any], Tokenizer | None, int | None], Report]] = {
    ConversationDataset: _conversations,
    PreferenceDataset: _pairs,
    InternLMBinDataset: _bins,
    PretrainDataset: _token_files,
}


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError('conversations are checked with a tokenizer, and the config has none')
    return tokenizer


def _files(config: Mapping[str, Any]) -> dict[str, list[Path]]:
    path: str | Path | Sequence[str | Path] = config['path']
    return domains_of([path] if isinstance(path, (str, Path)) else path, texts=False)
