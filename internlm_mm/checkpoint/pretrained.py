"""Finished models, read for inference or conversion."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm_mm.checkpoint.adapters import open_parts
from internlm_mm.checkpoint.foreign import open_source
from internlm_mm.checkpoint.hf_files import is_hf_folder
from internlm_mm.checkpoint.hf_import import fill_model
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.checkpoint.peft_files import is_peft_folder, open_peft, peft_base
from internlm_mm.checkpoint.reward import WithScore, has_score
from internlm_mm.checkpoint.step_folders import (
    TOKENIZER_FOLDER,
    find_checkpoint,
    read_config,
    read_model_state,
    verify,
)
from internlm_mm.checkpoint.vocabulary import find_tokenizer
from internlm_mm.registry import MODELS, OBJECTIVES
from internlm_mm.tokenizers import Tokenizer, build_template, load_tokenizer
from internlm_mm.tokenizers.chat_choice import recorded_template
from internlm_mm.utils.suggest import did_you_mean

LOG = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
) -> nn.Module:
    """Build a trained model, in evaluation mode and without gradients; adapters are merged.

    Args:
        path: A work dir, a checkpoint `iter_N`, a Hugging Face folder, or one of PEFT.
        device: Where the model goes.
        dtype: Of its parameters.
        base: Of adapters: where their frozen weights are now, if not where they were.

    Raises:
        FileNotFoundError: If there is no model at `path`.
        ValueError: If the checkpoint is damaged or does not fit the model.
    """
    if is_peft_folder(path):
        config, state = open_peft(path, base)
        return fill_model(_build_on_meta(config), state, device, dtype)
    if is_hf_folder(path):
        if base is not None:
            raise ValueError(f'base={base}: {path} holds all of its weights itself')
        source = open_source(path, 'hf')
        return fill_model(source.build(), source.weights, device, dtype)
    model, state = _open(_whole_checkpoint(path), base)
    return fill_model(model, state, device, dtype)


def _open(folder: Path, base: str | Path | None) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """A checkpoint's model on the meta device, and its weights, with adapters merged."""
    parts = open_parts(folder, base)
    config = read_config(folder)['model'] if parts is None else parts.model
    own = read_model_state(folder)
    model, state = _build_on_meta(config), own if parts is None else parts.merged()
    return model, WithScore(state, own) if has_score(model) else state


def load_tokenizer_of(path: str | Path, base: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer stored with a model, or None where there is none.

    Args:
        path: As in `load_model`.
        base: Likewise; a folder of PEFT without a tokenizer has that of its base.
    """
    if is_peft_folder(path):
        return find_tokenizer(path) or load_tokenizer_of(peft_base(path, base))
    return find_tokenizer(path if is_hf_folder(path) else find_checkpoint(path) / TOKENIZER_FOLDER)


def convert_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    add_bos: bool = True,
    show_progress: bool = False,
    base: str | Path | None = None,
) -> float:
    """Export a checkpoint to a Hugging Face folder, with adapters merged, and prove it.

    Args:
        checkpoint: A work dir or a checkpoint `iter_N`.
        out: The folder to make.
        format: Name of one of the forms that the model's family has; None for 'llama', or the
            family's own if it has no such.
        tokenizer: Path of the tokenizer; by default the one stored in the checkpoint, if any.
        chat_template: Name of the chat template to write into the tokenizer; 'none' for none; None
            for what the checkpoint's tokenizer or the run's config names.
        dtype: Of the weights: 'float32', 'float16' or 'bfloat16'; None for what the run computed
            in, so that nothing is rounded that the run did not round.
        max_shard_bytes: Largest weight file.
        overwrite: Whether an existing `out` is replaced.
        add_bos: Whether the exported tokenizer begins texts with bos, as the training data should.
        show_progress: Whether bars on standard error show how far it is.
        base: As in `load_model`.

    Returns:
        The largest difference between the logits of the two stacks on fixed prompts, in float32.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False.
        FileNotFoundError: If there is no checkpoint or tokenizer.
        ValueError: If the checkpoint is damaged, the model's family has no such form, there is no
            such template, the vocabularies do not fit or the logits differ.
    """
    folder = _whole_checkpoint(checkpoint)
    config = read_config(folder)
    template = chat_template or recorded_template(folder / TOKENIZER_FOLDER, config) or 'none'
    if dtype is None:
        dtype = computed_in(config)
    LOG.info(f'exporting {folder} in {dtype}')
    model, state = _open(folder, base)
    difference = export_hf(
        model,
        state,
        out,
        format=format,
        tokenizer=load_tokenizer_of(folder) if tokenizer is None else load_tokenizer(tokenizer),
        chat_template=None if template == 'none' else build_template(template),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        add_bos=add_bos,
        show_progress=show_progress,
    )
    assert difference is not None
    return difference


def _whole_checkpoint(path: str | Path) -> Path:
    folder = find_checkpoint(path)
    # What was found in a work dir has been verified on the way.
    problems = verify(folder) if folder == Path(path) else []
    if problems:
        raise ValueError(f'{folder} is damaged: {problems[0]}')
    return folder


def check_family(kind: Any) -> None:
    """Raise ValueError unless `kind`, of a checkpoint from anywhere, is a model or names one.

    Building calls whatever `type` names, and arguments come with it.
    """
    family = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(family, type) and issubclass(family, nn.Module)):
        hint = did_you_mean(str(kind), sorted(MODELS.module_dict))
        raise ValueError(f'model.type={kind!r} is no model that is known here.{hint}')


def _build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The model of a checkpoint; without its objective, unless that has the score of a reward."""
    said = dict(config)
    objective = said.pop('objective', None)
    check_family(said.get('type'))
    if objective and getattr(OBJECTIVES.get(objective['type']), 'replaces_head', False):
        said['objective'] = objective
    with torch.device('meta'):
        return MODELS.build(said)


def computed_in(config: Mapping[str, Any]) -> str:
    """Dtype that a run's layers computed in, as one that Hugging Face folders are written in."""
    precision = (config.get('strategy') or {}).get('precision') or {}
    dtype = precision.get('param', 'float32')
    return 'float32' if dtype == 'float64' else dtype
