"""Models to Hugging Face folders: safetensors, config.json and tokenizer.

What differs between families (the content of config.json, the names and packings of weights) is
told by their `hf_forms`; see `internlm_mm.models.hf_forms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.hf_files import (
    DTYPES,
    publish_folder,
    write_json,
    write_weights,
)
from internlm_mm.checkpoint.hf_import import check_names
from internlm_mm.checkpoint.remote import FORMATS as REMOTE_FORMATS
from internlm_mm.checkpoint.remote import write_remote_code
from internlm_mm.checkpoint.reward import has_score, scored_config, scored_layout
from internlm_mm.checkpoint.streaming import hf_model, streamed
from internlm_mm.tokenizers import ChatTemplate, Tokenizer
from internlm_mm.tokenizers.chat_export import write_chat_template
from internlm_mm.tokenizers.convert import write_hf_tokenizer
from internlm_mm.tokenizers.hf_tokenizer import read_hf_tokenizer
from internlm_mm.utils.progress import byte_bar
from internlm_mm.utils.suggest import did_you_mean

_MAX_PADDING_ROWS = 1024  # of an embedding table over its tokenizer's vocabulary

_PROBES = (
    'def main(path: str) -> None:\n    for line in open(path):\n        print(line, end="")\n',
    'The quick brown fox jumps over the lazy dog.  Two  spaces,\ttab, 3.14159.\n\n',
    '书生·浦语 · naïve café · 😀 · Ελληνικά',
    '        if self.value != other.value:  # indented\n            return NotImplemented\n',
)


def export_hf(
    model: Any,
    model_state: Mapping[str, Tensor],
    out: str | Path,
    *,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: ChatTemplate | None = None,
    dtype: str = 'bfloat16',
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    add_bos: bool = True,
    verify: bool = True,
    show_progress: bool = False,
) -> float | None:
    """Write a folder that `transformers` loads, and compare its logits, or scores, with ours.

    Everything is written to `OUT.tmp`, which takes the name OUT only when it is whole and proven.
    Weights pass through memory one tensor at a time, and for the comparison those of one module.

    Args:
        model: The architecture, on the meta device; its parameters are not read.
        model_state: Weights by our names, each read when asked for.
        out: The folder to make.
        format: Name of one of the family's forms; None for 'llama' where it has that.
        tokenizer: Written beside the weights if given.
        chat_template: Written into the tokenizer; None for the one that it has, if any.
        dtype: Of the weights: 'float32', 'float16' or 'bfloat16'.
        max_shard_bytes: Largest weight file; a tensor larger than this has a file of its own.
        overwrite: Whether an existing `out` is replaced.
        add_bos: Whether the exported tokenizer begins texts with bos, as the training data should.
        verify: Whether to run both models and compare.
        show_progress: Whether bars on standard error show how far it is.

    Returns:
        The largest difference between the logits, or the scores of a reward model; None without
        `verify`.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False.
        ValueError: If names, shapes, dtype or vocabulary do not fit, or the logits differ.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} cannot be exported.{did_you_mean(dtype, DTYPES)}')
    form = find_form(model, format)
    config = form.config_of(model)
    layout = form.layout(model.num_heads, model.num_kv_heads)
    is_reward = has_score(model)
    if is_reward:
        config, layout = scored_config(form, config), scored_layout(layout)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_names(shapes, model_state)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.vocab_size)
    torch_dtype = getattr(torch, dtype)
    size = torch_dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())
    with publish_folder(Path(out), overwrite) as folder:
        with byte_bar('writing', size, show_progress) as advance:
            write_weights(folder, layout, model_state, shapes, dtype, max_shard_bytes, advance)
        if form.name in REMOTE_FORMATS:
            config |= write_remote_code(folder, form.name)
        _write_configs(folder, config, tokenizer, chat_template, dtype)
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder, add_bos, chat_template)
        if not verify:
            return None
        ids = probe_ids(tokenizer, model.vocab_size, model.max_seq_len)
        with (
            byte_bar('comparing', 2 * size, show_progress) as advance,
            streamed(model.eval(), _Rounded(model_state, torch_dtype, advance)) as ours,
        ):
            if is_reward:
                return verify_scores(ours, folder, ids, on_bytes=advance)
            return verify_logits(ours, folder, ids, on_bytes=advance)


def find_form(model: Any, name: str | None) -> Any:
    """The form called `name` of a model's family; None for 'llama', or its own if it has no such.

    Raises:
        ValueError: If it has no such form, or none at all.
    """
    family = type(model).__name__
    forms = {form.name: form for form in getattr(model, 'hf_forms', ())}
    if not forms:
        raise ValueError(f'{family} has no Hugging Face form: no hf_forms')
    if name is None:
        return forms.get('llama', next(iter(forms.values())))
    if name not in forms:
        raise ValueError(
            f'format={name!r}: {family} can be written as {" or ".join(forms)}.'
            f'{did_you_mean(name, forms)}'
        )
    return forms[name]


def verify_logits(
    model: Any,
    hf_folder: str | Path,
    ids: Sequence[Sequence[int]],
    tolerance: float = 1e-4,
    on_bytes: Callable[[int], None] | None = None,
) -> float:
    """Run the same tokens through our model and through `transformers`, in float32.

    Of the folder's weights only those of one module are in memory at any time.

    Args:
        model: Ours, in float32 on the CPU, or `streamed`.
        hf_folder: Folder that `AutoModelForCausalLM` loads; no code in it is run.
        ids: Prompts, as tokens.
        tolerance: Largest difference that passes, as a share of the largest logit, or as it is
            where logits are below 1.
        on_bytes: Called with the size of each of the folder's weights when it has been read.

    Returns:
        The largest difference of any logit.

    Raises:
        ValueError: If it exceeds the tolerance.
    """
    # One batch, so that every weight is read once. What is after a row's end changes nothing in it.
    length = max(map(len, ids))
    batch = torch.tensor([[*row, *([0] * (length - len(row)))] for row in ids])
    with torch.inference_mode():
        ours = model.logits(batch)
        other, weights = hf_model(Path(hf_folder))
        stored = _Watched(weights, on_bytes) if on_bytes else weights
        with streamed(other, stored) as running:
            theirs = running(batch, use_cache=False).logits
    return _compare(f'logits of {type(other).__name__}', ours, theirs, ids, tolerance)


def verify_scores(
    model: Any,
    hf_folder: str | Path,
    ids: Sequence[Sequence[int]],
    tolerance: float = 1e-4,
    on_bytes: Callable[[int], None] | None = None,
) -> float:
    """`verify_logits` of a reward model, and `AutoModelForSequenceClassification`.

    What both would score a conversation that ended there is compared at every token.
    """
    length = max(map(len, ids))
    batch = torch.tensor([[*row, *([0] * (length - len(row)))] for row in ids])
    positions = torch.arange(length).expand_as(batch)
    with torch.inference_mode():
        ours = model.objective.score(model.hidden_states(batch, positions))
        other: Any
        other, weights = hf_model(Path(hf_folder))
        stored = _Watched(weights, on_bytes) if on_bytes else weights
        with streamed(other, stored):
            hidden = other.model(batch, use_cache=False).last_hidden_state
            theirs = other.score(hidden)
    return _compare(f'scores of {type(other).__name__}', ours, theirs, ids, tolerance)


def _compare(
    what: str, ours: Tensor, theirs: Tensor, ids: Sequence[Sequence[int]], tolerance: float
) -> float:
    """The largest difference, [rows, seq, ...] each, at the tokens that rows have."""
    pairs = [(a[: len(row)], b[: len(row)]) for a, b, row in zip(ours, theirs, ids, strict=True)]
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    scale = max(1.0, *(float(b.abs().max()) for _, b in pairs))
    if not difference <= tolerance * scale:  # written so that a NaN fails
        raise ValueError(
            f'{what} differ from ours by {difference:.3g}, more than {tolerance * scale:.3g}'
        )
    return difference


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError unless the model has a row for every token, and few rows more."""
    spare = vocab_size - tokenizer.vocab_size
    if not 0 <= spare <= _MAX_PADDING_ROWS:
        raise ValueError(
            f'the tokenizer has vocab_size={tokenizer.vocab_size} and the model '
            f'vocab_size={vocab_size}: they do not belong together; expected as many rows as '
            f'tokens, or up to {_MAX_PADDING_ROWS} more'
        )


def probe_ids(tokenizer: Tokenizer | None, vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """Fixed prompts to compare two models on: texts where there is a tokenizer, and random ids."""
    generator = torch.Generator().manual_seed(0)
    limit = vocab_size if tokenizer is None else tokenizer.vocab_size
    rows = [torch.randint(limit, (min(64, max_seq_len),), generator=generator).tolist()]
    if tokenizer is not None:
        rows += [tokenizer.encode(text) for text in _PROBES]
    return [row[:max_seq_len] for row in rows if row]


def write_tokenizer(
    tokenizer: Tokenizer,
    folder: str | Path,
    add_bos: bool = True,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Write a tokenizer so that plain `AutoTokenizer` loads it, and check that it encodes the same.

    Args:
        tokenizer: Ours.
        folder: Where its files go.
        add_bos: Whether texts begin with bos; one in Hugging Face's format has decided already.
        chat_template: Written as Jinja, its marks as special tokens; None changes nothing.

    Raises:
        ValueError: If the converted tokenizer gives other ids for one of a few probe texts.
    """
    folder = Path(folder)
    tokenizer.save(folder)
    if not (folder / 'tokenizer.json').exists():
        write_hf_tokenizer(folder / 'tokenizer.model', folder, add_bos)
    if chat_template is not None:
        write_chat_template(folder, chat_template)
    converted = read_hf_tokenizer(folder)
    for text in _PROBES:
        ours = tokenizer.encode(text)
        theirs = converted.encode(text, add_special_tokens=False)
        if ours != theirs:
            raise ValueError(
                f'the exported tokenizer, which transformers reads as {type(converted).__name__}, '
                f'encodes {text!r} as {theirs}, ours as {ours}'
            )


class _Watched(Mapping[str, Tensor]):
    """Tensors that are counted when they have been read."""

    def __init__(self, state: Mapping[str, Tensor], on_bytes: Callable[[int], None]) -> None:
        self._state, self._on_bytes = state, on_bytes

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        self._on_bytes(tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _Rounded(_Watched):
    """Tensors as they are after being stored in another dtype."""

    def __init__(
        self, state: Mapping[str, Tensor], dtype: torch.dtype, on_bytes: Callable[[int], None]
    ) -> None:
        super().__init__(state, on_bytes)
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name].to(self._dtype)
        self._on_bytes(tensor.nbytes)
        return tensor


def _write_configs(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    chat_template: ChatTemplate | None,
    dtype: str,
) -> None:
    ids: dict[str, Any] = {}
    stops: tuple[int, ...] = ()
    if tokenizer is not None:
        pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        ids = {
            'bos_token_id': tokenizer.bos_id,
            'eos_token_id': tokenizer.eos_id,
            'pad_token_id': pad_id,
        }
        if chat_template is not None:
            stops = chat_template.stops(tokenizer)[0]
    # Both spellings: transformers 5 reads the first, servers of before it the second.
    dtypes = {'dtype': dtype, 'torch_dtype': dtype}
    write_json(folder / 'config.json', {**config, **ids, **dtypes})
    if stops:  # what ends an answer ends generation, as eos does
        eos = [] if ids['eos_token_id'] is None else [ids['eos_token_id']]
        ids = {**ids, 'eos_token_id': [*eos, *(index for index in stops if index not in eos)]}
    write_json(folder / 'generation_config.json', ids)
