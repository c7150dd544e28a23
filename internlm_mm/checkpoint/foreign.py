"""Weights of other programs: what a path holds, and whether a model is the one in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from internlm_mm.checkpoint.hf_files import is_hf_folder
from internlm_mm.checkpoint.hf_import import import_hf
from internlm_mm.checkpoint.internlm_files import is_internlm_folder
from internlm_mm.checkpoint.internlm_layout import FORMATS as INTERNLM_FORMATS
from internlm_mm.checkpoint.internlm_shards import import_internlm
from internlm_mm.checkpoint.step_folders import list_checkpoints
from internlm_mm.checkpoint.storage import METADATA_FILE
from internlm_mm.registry import MODELS
from internlm_mm.utils.adapters import is_adapter, is_score
from internlm_mm.utils.suggest import did_you_mean

FORMATS = ('auto', 'hf', *INTERNLM_FORMATS)
"""What a folder of weights can be said to be."""

NEITHER = 'neither a Hugging Face model (config.json) nor shards of InternLM (model_tp*_pp*.pt)'
"""What is not in a folder, for messages."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIZES = 'vocab_size hidden_size intermediate_size num_heads num_kv_heads head_dim'.split()
_MEANING = ['rope_theta', 'norm_eps', 'tie_word_embeddings']
_PARTS = ['attention_bias', 'qk_norm']  # what families have or not


class Source(NamedTuple):
    """Weights of another program.

    Attributes:
        path: The folder.
        form: For people: whose it is.
        config: Of the model in it, as `MODELS.build` takes it.
        weights: By our names, each read when asked for: a `stream_writer.LazyWeights` that is a
            mapping, too, and has `check_files()`, and `stored_name(name)` and `describe(name)` for
            messages.
    """

    path: Path
    form: str
    config: dict[str, Any]
    weights: Any

    @property
    def family(self) -> str:
        """Name of the model's class."""
        return type(self.build()).__name__

    def weight(self, name: str) -> Tensor:
        """Read the weight of our name `name`.

        Raises:
            ValueError: If it holds values that are not finite.
        """
        tensor = self.weights[name]
        check_finite(self.path, name, tensor)
        return tensor

    def build(self) -> nn.Module:
        """The model, on the meta device."""
        with torch.device('meta'):
            return MODELS.build(dict(self.config))


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise ValueError, naming folder and weight, if a number in it is none or infinite."""
    # The sum of a tensor is finite only if all of it is; in float32, and without a copy.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise ValueError(
            f'{path}: {name!r} holds values that are not finite in '
            f'{str(tensor.dtype).removeprefix("torch.")}: the file is damaged, or the dtype too '
            'narrow'
        )


def is_foreign(path: str | Path) -> bool:
    """Whether `path` holds weights of another program: Hugging Face's or InternLM's own."""
    if (Path(path) / METADATA_FILE).is_file():
        return False
    return is_hf_folder(path) or is_internlm_folder(path)


def open_source(
    path: str | Path, format: str = 'auto', settings: Mapping[str, Any] | None = None
) -> Source:
    """Find out what a folder holds, and check it whole: files, names and shapes; not the numbers.

    Args:
        path: A Hugging Face folder, or one of InternLM's own shards.
        format: One of `FORMATS`; 'auto' looks at the files.
        settings: Arguments of the model that win over what the folder says.

    Raises:
        FileNotFoundError: If there is nothing, or a file is missing.
        ValueError: If files are damaged, or tensors missing, left over, or of other shapes than
            the model that is described.
    """
    path, settings = Path(path), dict(settings or {})
    if format not in FORMATS:
        raise ValueError(f'format={format!r} is unknown.{did_you_mean(format, FORMATS)}')
    if format == 'auto':
        format = _format_of(path)
    if format != 'hf':
        internlm = 'auto' if format == 'internlm' else format
        config, weights = import_internlm(path, internlm, settings)
        return Source(path, "InternLM's own shards", config, weights)
    source = _open_hf(path, settings)
    try:
        model = source.build()
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    check_weights(model, source)
    return source


def _format_of(path: Path) -> str:
    if not path.is_dir():
        hint = '; nothing is downloaded: give a local folder' if not path.exists() else ''
        raise FileNotFoundError(
            f'{path} is no folder: expected a Hugging Face folder or one of InternLM shards{hint}'
        )
    if (path / METADATA_FILE).is_file() or list_checkpoints(path):
        raise ValueError(f'{path} is a checkpoint of internlm_mm already: take it as it is')
    forms = [
        name
        for name, found in (
            ('hf', (path / 'config.json').is_file() or is_hf_folder(path)),
            ('internlm', is_internlm_folder(path)),
        )
        if found
    ]
    if len(forms) > 1:
        raise ValueError(
            f'{path} holds config.json or Hugging Face weights, and shards of InternLM: tell '
            f'which with --format ({", ".join(FORMATS[1:])})'
        )
    if not forms and any(path.glob('consolidated*.pth')):
        raise ValueError(f"{path} is in Meta's format; take the Hugging Face form of the model")
    if not forms and any(path.glob('*.gguf')):
        raise ValueError(
            f'{path} holds GGUF files, which are quantised; take the Hugging Face form'
        )
    if not forms:
        raise FileNotFoundError(f'{path} holds {NEITHER}{folder_inside(path)}')
    return forms[0]


def folder_inside(path: str | Path) -> str:
    """For a message about a folder without weights: which folder in it has some, if one has."""
    places = ('config.json', 'model_tp0_pp0.pt')
    found = [
        file.parent
        for place in places
        for pattern in (f'*/{place}', f'snapshots/*/{place}')  # the latter in a hub's cache
        for file in Path(path).glob(pattern)
        if list_checkpoints(file.parent.parent) == []
    ]
    if not found:
        return ''
    newest = max(found, key=lambda folder: (folder.name.zfill(20), folder))
    return f'; its folder {newest.relative_to(path)} does'


def _open_hf(path: Path, settings: dict[str, Any]) -> Source:
    config, weights = import_hf(path)
    family = config['type']
    known = [name for name in inspect.signature(family).parameters if name != 'objective']
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f'{key}={value!r} is no setting of {family.__name__}.{did_you_mean(key, known)}'
            )
    return Source(path, 'a Hugging Face folder', config | settings, weights)


def check_weights(model: nn.Module, source: Source) -> None:
    """Compare a model with what a folder holds, both ways, without reading a weight.

    Args:
        model: May be on the meta device; its adapters are no part of the comparison, nor is the
            score of a reward model, in whose place the folder has a head.
        source: The folder.

    Raises:
        ValueError: Naming the first tensor that is missing, left over, quantised, or of another
            shape.
    """
    parameters = dict(model.named_parameters())
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in parameters.items()
        if not is_adapter(name) and not is_score(name)
    }
    kind, weights = type(model).__name__, source.weights
    for name, shape in wanted.items():
        if name not in weights:
            near = did_you_mean(name, set(weights) - set(wanted))
            raise ValueError(
                f'{source.path}: {weights.stored_name(name)!r} is missing, which {kind} has.{near}'
            )
        found = tuple(weights.shape(name))
        if found != shape:
            raise ValueError(
                f'{source.path}: {weights.describe(name)} has shape {list(found)}; expected '
                f'{list(shape)} for this {kind}'
            )
        if weights.dtype(name) not in _DTYPES:
            dtype = str(weights.dtype(name)).removeprefix('torch.')
            raise ValueError(
                f'{source.path}: {weights.describe(name)} is {dtype}; expected a floating-point '
                'dtype of 16 bits or more: quantised weights are not read'
            )
    unused = {'lm_head.weight'} if any(map(is_score, parameters)) else set()
    extra = sorted(set(weights) - set(wanted) - unused)
    if extra:
        raise ValueError(
            f'{source.path}: {weights.describe(extra[0])} is left over (of {len(extra)}): {kind} '
            'of these sizes has no such weight'
        )


def check_same_model(model: nn.Module, source: Source) -> list[str]:
    """Compare a run's model with the one in a folder: settings, names and shapes.

    Args:
        model: The run's, whole; may be on the meta device.
        source: The folder.

    Returns:
        Differences that change nothing before long texts: the length and scaling of positions.

    Raises:
        ValueError: Naming the first key of the model, or tensor, that differs.
    """
    theirs = source.build()
    layers = len(_layers(model)), len(_layers(theirs))
    pairs: list[tuple[str, Any, Any]] = [('num_layers', *layers)]
    keys = _SIZES + _MEANING + (_PARTS if type(model) is type(theirs) else [])
    pairs += [(key, getattr(model, key, None), getattr(theirs, key, None)) for key in keys]
    has_score = any(is_score(name) for name, _ in model.named_parameters())
    for key, here, there in pairs:
        if key == 'tie_word_embeddings' and has_score:  # there is nothing to tie
            continue
        if here != there and None not in (here, there):
            raise ValueError(
                f'model.{key}={here!r}, but {source.path} holds {type(theirs).__name__} with '
                f'{key}={there!r}'
            )
    try:
        check_weights(model, source)
    except ValueError as error:
        if type(model) is type(theirs):
            raise
        raise ValueError(
            f'model.type={type(model).__name__}, but {source.path} holds {type(theirs).__name__}: '
            f'{error}'
        ) from error
    return [
        f'model.{key}={here!r} differs from {there!r} in {source.path}'
        for key in ('max_seq_len', 'rope_scaling')
        if (here := getattr(model, key, None)) != (there := getattr(theirs, key, None))
    ]


def _layers(model: nn.Module) -> list[Any]:
    return list(getattr(model, 'layers', []))
