"""Checkpoints: one folder a step, published by a rename, readable on any layout.

`WORK_DIR/iter_N` after N finished steps holds

    shard_R.safetensors   tensors: `model.*`, `optimizer.*`, `rng.*`
    metadata.json         which part of which tensor lies where
    state.json            everything that is not a tensor
    config.py config.json the resolved configuration, for people and for tools
    tokenizer/            the tokenizer, when the run had one
    manifest.json         size and CRC-32 of every file above; written last

Nothing in it is a pickle. A save that did not finish stays behind as `iter_N.tmp` and is never
read.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from internlm_mm.checkpoint.disk import copy_folder, write_file
from internlm_mm.checkpoint.planner import LoadPlanner, SavePlanner
from internlm_mm.checkpoint.step_folders import (
    MANIFEST_FILE,
    STATE_FILE,
    check_tensors,
    verify,
)
from internlm_mm.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from internlm_mm.utils.publish import publish, set_aside

_REMOVED = '{}.removed'  # what is on its way out is called; see `_sweep`


class Checkpointer:
    """Saves and loads the state of a run. All methods are collective.

    Args:
        async_save: Whether writing goes on in the background while training continues; the call
            then only waits for the copy to host memory. At most one save is in flight.
    """

    def __init__(self, async_save: bool = True) -> None:
        self.async_save = async_save
        self._pending: tuple[Path, Future] | None = None
        self._group: dist.ProcessGroup | None = None

    def save(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        """Write a checkpoint and publish it.

        Args:
            path: The final folder. A folder already there is replaced once the new one is whole.
            tensors: This rank's view; DTensors are stored once, whatever the layout.
            state: Whatever else must come back; JSON types only.
            texts: Further files, {name: content}.
            folders: Folders to copy in, {name: source}.

        Raises:
            TypeError: If `state` holds something JSON cannot.
            OSError: If this save, or an earlier one in the background, failed on any rank.
                Checkpoints that are whole stay as they are.
        """
        self.finish()
        _silence_single_process()
        path = Path(path)
        texts = {**(texts or {}), STATE_FILE: _to_json(state)}
        staging = path.with_name(path.name + '.tmp')
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        if not distributed or dist.get_rank() == 0:
            _sweep(path.parent)
        if distributed:
            dist.barrier(group=self._control_group())
        writer = SafetensorsWriter(
            staging, lambda files: publish_checkpoint(staging, path, files, texts, folders or {})
        )
        arguments: dict[str, Any] = {
            'storage_writer': writer,
            'planner': SavePlanner(),
            'process_group': self._control_group() if distributed else None,
            'no_dist': not distributed,
        }
        if self.async_save:
            writing: Any = dcp.async_save(dict(tensors), **arguments)
            self._pending = path, writing
        else:
            with _one_error(f'saving {path}'):
                dcp.save(dict(tensors), **arguments)

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the save in flight, if any; raises what went wrong with it.

        Args:
            timeout: Seconds to wait at most; then the save is given up without a word.
        """
        if self._pending is not None:
            (path, pending), self._pending = self._pending, None
            with _one_error(f'saving {path}'), suppress(FutureTimeout):
                pending.result(timeout)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place from a checkpoint of any layout.

        Raises:
            ValueError: If a tensor is missing or has another shape; names the first one.
        """
        path = Path(path)
        check_tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        _silence_single_process()
        with _one_error(f'loading {path}'):
            dcp.load(
                dict(tensors),
                storage_reader=SafetensorsReader(path),
                planner=LoadPlanner(),
                no_dist=True,  # every rank reads its own slices; no rank waits for another
            )

    def _control_group(self) -> dist.ProcessGroup:
        # Background collectives on the default group would interleave with those of training.
        if self._group is None:
            self._group = dist.new_group(backend='gloo')
        return self._group


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; once begun it can no longer be taken for a whole one."""
    shutil.rmtree(set_aside(path, _REMOVED))


def _sweep(work_dir: Path) -> None:
    """Clear up after processes that were killed: saves half written, deletions half done."""
    for left_over in work_dir.glob('iter_*.tmp'):
        shutil.rmtree(left_over, ignore_errors=True)
    for left_over in work_dir.glob('iter_*.removed*'):
        path = left_over.with_name(left_over.name.split('.')[0])
        if not path.exists() and not verify(left_over, checksums=False):
            os.replace(left_over, path)  # killed between the two renames of a replacement
        else:
            shutil.rmtree(left_over, ignore_errors=True)


def publish_checkpoint(
    staging: Path,
    path: Path,
    files: dict[str, tuple[int, int]],
    texts: Mapping[str, str],
    folders: Mapping[str, Path],
) -> None:
    """Add the small files and the manifest, then give the folder its name. Coordinator only."""
    for name, text in texts.items():
        files[name] = write_file(staging / name, text.encode())
    for name, source in folders.items():
        copied = copy_folder(source, staging / name)
        files |= {f'{name}/{file}': written for file, written in copied.items()}
    manifest = {name: {'size': size, 'crc32': crc} for name, (size, crc) in sorted(files.items())}
    write_file(staging / MANIFEST_FILE, json.dumps({'files': manifest}, indent=1).encode())
    publish(staging, path, _REMOVED)


def _silence_single_process() -> None:
    """Have torch not warn of what is meant, also in the thread that writes in the background."""
    # A context manager would not do: its filters are gone before that thread comes to warn.
    warnings.filterwarnings('ignore', message='torch.distributed is disabled, unavailable')


@contextmanager
def _one_error(action: str) -> Iterator[None]:
    """What went wrong on some rank as an ordinary error; torch's own is none, and pages long."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f'{action} failed on rank {rank}: {type(cause).__name__}: {cause}') from cause


def _to_json(state: Mapping[str, Any]) -> str:
    def refuse(value: object) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.item()
        raise TypeError(f'{type(value).__name__} cannot be stored in {STATE_FILE}: {value!r:.80}')

    return json.dumps(state, default=refuse, indent=1)
