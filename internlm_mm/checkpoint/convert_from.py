"""Weights of other programs as a checkpoint of ours: `tools/convert_from.py`."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor

from internlm_mm.checkpoint.foreign import Source, check_finite, open_source
from internlm_mm.checkpoint.hf_files import DTYPES, publish_folder
from internlm_mm.checkpoint.huggingface import check_vocabulary
from internlm_mm.checkpoint.step_folders import TOKENIZER_FOLDER
from internlm_mm.checkpoint.stream_writer import entries_of, write_weights_checkpoint
from internlm_mm.checkpoint.tensor_file import Entry
from internlm_mm.checkpoint.vocabulary import find_tokenizer
from internlm_mm.tokenizers import load_tokenizer
from internlm_mm.utils.config import dump_config
from internlm_mm.utils.progress import byte_bar
from internlm_mm.utils.suggest import did_you_mean

STEP_FOLDER = 'iter_0'


class Converted(NamedTuple):
    """What was converted.

    Attributes:
        form: Whose weights they were.
        family: Name of the model's class.
        parameters: Their number.
        dtype: In which most of them are stored.
        vocabulary: Size of the tokenizer that was taken along, None if there was none.
    """

    form: str
    family: str
    parameters: int
    dtype: str
    vocabulary: int | None


def convert_from(
    source: str | Path,
    out: str | Path,
    *,
    format: str = 'auto',
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Converted:
    """Make a work dir with the checkpoint `iter_0` of weights that another program has trained.

    It is written beside OUT and takes the name when it is whole. One tensor is in memory at a time.

    Args:
        source: A Hugging Face folder, or one of InternLM's own shards.
        out: The work dir to make.
        format: 'auto', 'hf', 'internlm-2023' or 'internevo'.
        dtype: Of the weights: 'float32', 'float16' or 'bfloat16'; as they are if None.
        tokenizer: Path of the tokenizer; by default the one in `source`, if any.
        settings: Arguments of the model that `source` does not tell, or tells wrongly.
        overwrite: Whether an existing `out` is replaced, if it holds nothing but `iter_0`.
        show_progress: Whether a bar on standard error shows how far it is.

    Raises:
        FileExistsError: If `out` exists, and must stay.
        FileNotFoundError: If something is missing.
        OSError: If the disk is too small.
        ValueError: If files are damaged, or something does not fit.
    """
    out = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} is not stored here.{did_you_mean(dtype, DTYPES)}')
    _check_out(out, overwrite)
    found = open_source(source, format, settings)
    model: Any = found.build()
    words = find_tokenizer(found.path) if tokenizer is None else load_tokenizer(tokenizer)
    if words is not None:
        check_vocabulary(words, model.vocab_size)
    names = [name for name, _ in model.named_parameters()]
    entries = entries_of(found.weights, names, None if dtype is None else getattr(torch, dtype))
    size = sum(entry.nbytes for entry in entries)
    _check_space(out, size)
    stored = _most_common(entries)
    config = _config(found, stored)
    found.weights.check_files()
    with (
        publish_folder(out, overwrite) as folder,
        byte_bar('converting', size, show_progress) as advance,
    ):
        folders = {}
        if words is not None:
            words.save(folder / TOKENIZER_FOLDER)
            folders[TOKENIZER_FOLDER] = folder / TOKENIZER_FOLDER

        def look_at(entry: Entry, tensor: Tensor) -> None:
            check_finite(found.path, entry.name.removeprefix('model.'), tensor)
            advance(entry.nbytes)

        write_weights_checkpoint(
            folder / STEP_FOLDER,
            found.weights,
            entries,
            {'iter': 0, 'converted_from': {'path': str(found.path), 'form': found.form}},
            dict(zip(('config.py', 'config.json'), dump_config(config), strict=True)),
            folders,
            on_tensor=look_at,
        )
        shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    return Converted(
        found.form,
        type(model).__name__,
        sum(torch.Size(entry.shape).numel() for entry in entries),
        stored,
        None if words is None else words.vocab_size,
    )


def _check_out(out: Path, overwrite: bool) -> None:
    """Replace only what this program has written: a work dir may hold weeks of training."""
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(f'{out} exists; choose another folder or overwrite it (--overwrite)')
    others = sorted(path.name for path in out.iterdir() if path.name != STEP_FOLDER)
    if others:
        raise FileExistsError(
            f'{out} is not overwritten: it holds {others[0]!r}, which no conversion left there'
        )


def _check_space(out: Path, size: int) -> None:
    folder = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f'{out} needs {size / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB left')


def _most_common(entries: list[Entry]) -> str:
    sizes: Counter[torch.dtype] = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.nbytes
    return str(sizes.most_common(1)[0][0]).removeprefix('torch.')


def _config(source: Source, dtype: str) -> Config:
    """The resolved config: the model, and the dtype, in which exports then are, too."""
    content: dict[str, Any] = {'model': source.config}
    if dtype in DTYPES and dtype != 'float32':
        precision = {'param': dtype, 'reduce': 'float32'}
        content['strategy'] = {'type': 'HybridParallelStrategy', 'precision': precision}
    return Config(content)
