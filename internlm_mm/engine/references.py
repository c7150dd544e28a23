"""What a model says of all answers before it is trained: computed once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn
from torch.distributed.tensor import DTensor

from internlm_mm.datasets.loader import EvalLoader
from internlm_mm.datasets.packing import Row
from internlm_mm.datasets.preference import PreferenceDataset
from internlm_mm.datasets.token_cache import SOURCE_NAME, cached_folder, folder_of
from internlm_mm.parallel.sums import reduce_all
from internlm_mm.utils.config import dump_config

_KIND = 'log-probabilities of answers'


def hash_weights(model: nn.Module) -> str:
    """sha256 of all weights by name, whatever the layout; the same on every rank. Collective.

    One of them is in memory whole at a time.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        data = whole.detach().cpu().contiguous()
        found.update(f'{name} {data.dtype} {list(data.shape)}\n'.encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def hash_model(model: nn.Module, config: Config) -> str:
    """sha256 of all weights and of what the config says of them: heads, rotary base, epsilon ...

    The objective is left out, since it does not change what is said. Collective.

    Args:
        model: Placed and loaded.
        config: The run's.
    """
    return hash_said(hash_weights(model), config)


def hash_said(weights: str, config: Config) -> str:
    """As `hash_model`, of weights by their hash."""
    said = json.loads(dump_config(config)[1]).get('model', {})
    said.pop('objective', None)
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(f'{weights}\n{text}'.encode()).hexdigest()


def describe(strategy: Any, dataset: PreferenceDataset, model: str) -> dict[str, Any]:
    """All that decides what a model, by its hash, says of a dataset's answers."""
    return {
        'kind': _KIND,
        'model': model,
        'precision': str(strategy.param_dtype),
        'tokens': dataset.folder.name,  # a hash of data, tokenizer, template and options
        'domains': dataset.domains,
    }


def read_references(
    source: Mapping[str, Any], dataset: PreferenceDataset
) -> list[np.ndarray] | None:
    """What was kept for a dataset, [pairs, 2] for each domain; None if there is nothing.

    Args:
        source: As `describe` gives it.
        dataset: Names the folder, and says how many pairs there are.

    Raises:
        ValueError: If what lies there is of another model or other data, or is damaged.
    """
    folder = folder_of(dataset.cache_dir, source)
    if not folder.is_dir():
        return None
    try:
        kept = json.loads((folder / SOURCE_NAME).read_text('utf-8'))
        arrays = [
            np.load(folder / f'{index}.npy', allow_pickle=False)
            for index in range(len(dataset.domains))
        ]
    except (OSError, ValueError) as error:
        raise ValueError(f'{folder} is damaged ({error}): delete it') from error
    for key, value in source.items():
        if kept.get(key) != value:
            raise ValueError(
                f'{folder} is stale: its {key} is {kept.get(key)!r}, and not {value!r}: delete it'
            )
    for array, pairs in zip(arrays, dataset.num_pairs, strict=True):
        if array.shape != (pairs, 2) or not np.isfinite(array).all():
            raise ValueError(
                f'{folder} is damaged: {list(array.shape)} numbers, or some that are not finite, '
                f'for {pairs} pairs: delete it'
            )
    return arrays


def find_outdated(cache_dir: str | Path) -> list[Path]:
    """What versions have kept that knew a model by its weights alone; nobody reads it any more."""
    found = []
    for path in sorted(Path(cache_dir).glob(f'*/{SOURCE_NAME}')):
        try:
            source = json.loads(path.read_text('utf-8'))
        except (OSError, ValueError):  # of a folder that is of no use here
            continue
        if isinstance(source, dict) and source.get('kind') == _KIND and 'model' not in source:
            found.append(path.parent)
    return found


def compute_references(
    strategy: Any, dataset: PreferenceDataset, micro_batch_size: int
) -> list[np.ndarray]:
    """Ask the model as it is now, [pairs, 2] for each domain; the same on every rank. Collective.

    Args:
        strategy: Prepared; its model has an objective over pairs.
        dataset: The answers.
        micro_batch_size: Rows of one forward.
    """
    model, rows = strategy.model, _EachRow(dataset)
    found = [np.zeros((pairs, 2)) for pairs in dataset.num_pairs]
    loader = EvalLoader(
        rows,
        micro_batch_size=micro_batch_size,
        data_rank=strategy.data_rank,
        data_world_size=strategy.data_world_size,
    )
    was_training = model.training
    model.eval()
    with torch.no_grad(), model.objective.telling_log_probs():
        for indices, batch in zip(loader.indices(), loader, strict=True):
            log_probs = model(batch.to(strategy.device))['log_probs'].cpu().numpy()
            for index, values in zip(indices, log_probs, strict=True):
                if index < len(rows):
                    domain, row = rows.places[index]
                    pairs = dataset.pairs_of(domain, row)
                    found[domain][pairs] = values[: 2 * len(pairs)].reshape(-1, 2)
    model.train(was_training)
    if strategy.world_size > 1:
        share = 1.0 if strategy.is_data_leader else 0.0
        totals = reduce_all(
            {
                str(index): torch.from_numpy(array * share).to(strategy.device)
                for index, array in enumerate(found)
            }
        )
        found = [array.cpu().numpy() for array in totals.values()]
    return [array.astype(np.float32) for array in found]


def keep_references(
    source: Mapping[str, Any], dataset: PreferenceDataset, references: list[np.ndarray]
) -> Path:
    """Write what was computed, unless it is there; by one process for all that share the folder."""

    def make(folder: Path) -> None:
        for index, array in enumerate(references):
            np.save(folder / f'{index}.npy', array, allow_pickle=False)

    return cached_folder(dataset.cache_dir, source, make)


class _EachRow:
    """Every row of a dataset once, domain after domain, whatever its order and shares."""

    def __init__(self, dataset: PreferenceDataset) -> None:
        self.dataset = dataset
        self.places = [
            (domain, row) for domain, rows in enumerate(dataset.num_rows) for row in range(rows)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        return self.dataset.read(*self.places[index])
