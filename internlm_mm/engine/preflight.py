"""What must fit together before any time is spent."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import Registry
from torch import nn

from internlm_mm.parallel.fit import fitting_message
from internlm_mm.parallel.mesh import LayoutError
from internlm_mm.registry import DATASETS, MODELS
from internlm_mm.utils.folders import why_not_writable
from internlm_mm.utils.resolve import resolve_type
from internlm_mm.utils.signatures import options_of

MAKE_DATA = """
Paths are taken from the current folder, {folder}
`make demo` makes the data of internlm_tiny_pretrain.py. Your own, from a folder of texts:
  python tools/train_tokenizer.py TEXTS --output data/text/tokenizer --vocab-size 103168
  python tools/preprocess_data.py TEXTS --output data/text/tokens \\
      --tokenizer data/text/tokenizer --validation-fraction 0.001
Conversations, and pairs of answers, are read as they are: docs/en/finetune.md, preference.md.
A published model is not downloaded: set load_from and tokenizer.path to its folder
(docs/en/import.md).
For a speed run neither is needed: dataset=dict(type=RandomTokens, ...), as in
internlm_7b_speed.py, or RandomPairs, as in internlm_7b_dpo_speed.py"""


def build_data_part(
    registry: Registry,
    config: Mapping[str, Any],
    key: str,
    tokenizer: Any = None,
    **defaults: Any,
) -> Any:
    """Build a tokenizer or dataset; where its files are missing, say how they are made.

    Args:
        registry: TOKENIZERS or DATASETS.
        config: Its config.
        key: Where the config stands, for the message.
        tokenizer: Of the run, for a dataset that takes one.
        defaults: Arguments that the runner supplies.

    Raises:
        FileNotFoundError: With the key, the path and the two commands.
        ValueError: With the key: most runs have two datasets.
    """
    if tokenizer is not None:
        config = give_tokenizer(config, tokenizer)
    try:
        return registry.build(dict(config), default_args=defaults)
    except FileNotFoundError as error:
        hint = MAKE_DATA.format(folder=Path.cwd())
        raise FileNotFoundError(f'{key}: {error}{hint}') from error
    except (ValueError, NotADirectoryError) as error:
        raise ValueError(f'{key}: {error}') from error


def give_tokenizer(dataset: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The config of a dataset with the run's tokenizer, where its class takes one and it has none.

    Args:
        dataset: Its config; it may wrap that of another one.
        tokenizer: Of the run, built or its config; None changes nothing.
    """
    given = dict(dataset)
    target = resolve_type(given['type'], DATASETS, 'dataset.type')
    options = options_of(target)
    takes_one = options is not None and 'tokenizer' in options.hints
    if takes_one and given.get('tokenizer') is None and tokenizer is not None:
        given['tokenizer'] = tokenizer
    if isinstance(given.get('dataset'), Mapping):
        given['dataset'] = give_tokenizer(given['dataset'], tokenizer)
    return given


def check_run(model: nn.Module, loaders: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Compare model, data and tokenizer.

    Args:
        model: May be on the meta device.
        loaders: Built loaders by config key.
        tokenizer: Built, or None.

    Raises:
        ValueError: Naming both keys and both values.
    """
    vocab_size = getattr(model, 'vocab_size', None)
    longest = getattr(model, 'max_seq_len', None)
    if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f'model.vocab_size={vocab_size} is too small for the tokenizer, '
            f'which has {tokenizer.vocab_size} tokens'
        )
    for key, loader in loaders.items():
        dataset = loader.dataset
        if longest is not None and dataset.seq_len > longest:
            raise ValueError(
                f'{key}.dataset.seq_len={dataset.seq_len} is longer than '
                f'model.max_seq_len={longest}'
            )
        data_vocab = getattr(dataset, 'vocab_size', None)
        if vocab_size is not None and data_vocab is not None and data_vocab > vocab_size:
            raise ValueError(
                f'{key}.dataset holds tokens of a vocabulary of {data_vocab}, '
                f'but model.vocab_size={vocab_size}'
            )
        made_by = (getattr(dataset, 'tokenizer', None) or {}).get('hash')
        if tokenizer is not None and made_by is not None and made_by != tokenizer.hash:
            raise ValueError(
                f'{key}.dataset was tokenised with another tokenizer '
                f'({made_by[:12]}...) than the config names ({tokenizer.hash[:12]}...)'
            )
    _check_templates(loaders)


def _check_templates(loaders: Mapping[str, Any]) -> None:
    """Refuse to evaluate on another chat template than is trained.

    Chat and export take the one of the config: two leave open which.
    """
    spelt = {key: getattr(loader.dataset, 'template', None) for key, loader in loaders.items()}
    trained = spelt.get('train_dataloader')
    for key, template in spelt.items():
        if trained is None or template is None or template == trained:
            continue
        names = template.name, trained.name
        how = 'its options differ' if names[0] == names[1] else 'they must be the same'
        raise ValueError(
            f'{key}.dataset.chat_template={names[0]!r}, but '
            f'train_dataloader.dataset.chat_template={names[1]!r}: {how}; set both'
        )


def check_writable(work_dir: Path) -> None:
    """Make the work dir and try to write into it.

    Raises:
        PermissionError: If that fails, with the path and the system's reason.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        reason = why_not_writable(work_dir)
    if reason is not None:
        raise PermissionError(f'work_dir={str(work_dir)!r} cannot be written: {reason}')


@contextmanager
def propose_fit(config: Mapping[str, Any]) -> Iterator[None]:
    """Let a layout that is refused for its number of ranks propose one that suits all the config.

    Whoever counts ranks knows nothing of heads, layers, rows and batches; what it would propose
    might be refused next.

    Args:
        config: Checked.

    Raises:
        ValueError: In place of a `LayoutError`.
    """
    try:
        yield
    except LayoutError as error:
        model = config['model']
        if not isinstance(model, nn.Module):
            with torch.device('meta'):
                model = MODELS.build(dict(model))
        dataset = (config.get('train_dataloader') or {}).get('dataset') or {}
        seq_len = dataset.get('seq_len') or 0
        step = config.get('train_cfg') or {}
        rows, micro_rows = (step.get(f'{key}_batch_size') for key in ('global', 'micro'))
        micro_batches = rows // micro_rows if rows and micro_rows else None
        pipeline = (config.get('strategy') or {}).get('pipeline')
        message = fitting_message(error, model, seq_len, micro_batches, pipeline)
        raise ValueError(message) from None
