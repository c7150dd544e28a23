"""What a rank's memory is filled with: by module and by kind."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from internlm_mm.parallel.gathered import gathered
from internlm_mm.registry import HOOKS
from internlm_mm.utils.activation_memory import ActivationMeter
from internlm_mm.utils.shards import local_tensor

KINDS = (
    'parameters',
    'gradients',
    'optimizer',
    'activations',
    'gathered_parameters',
    'gathered_gradients',
)
"""What memory is used for; the last two only where parameters are sharded."""


@HOOKS.register_module()
class MemoryHook(Hook):
    """Measure one step's memory on this rank, by module and kind, in bytes tensors really take.

    Parameters and gradients are read between backward and update, the only moment at which a step's
    gradients are whole, optimizer state after the update; of sharded tensors the local shard.
    Activations are what autograd keeps at the end of the forward that keeps most; see
    `ActivationMeter`. Gathered are the whole parameters, and whole gradients awaiting the last
    micro-batch, that FSDP2 holds besides the shards at the end of a forward, at most. What kernels
    use while they run is in none of these; on a GPU the peaks of the allocator tell.

    The table goes to the log of rank 0, everything to `WORK_DIR/TIMESTAMP/memory_rankR.json`.
    Reads and writes nothing in `outputs`; no number of the training changes.

    Args:
        at_iter: Which step to measure, counted from 0 at the start of this process. The first also
            allocates what later steps find, so the second is the earliest that is typical.
        depth: Parts of a module's name that are told apart: 2 shows `layers.0`.
        ranks: Which ranks measure; None for all.

    Raises:
        ValueError: If `at_iter` is negative or `depth` less than 1.
    """

    priority = 'VERY_LOW'

    def __init__(
        self, at_iter: int = 1, depth: int = 2, ranks: Sequence[int] | None = (0,)
    ) -> None:
        if at_iter < 0:
            raise ValueError(f'MemoryHook: at_iter={at_iter} must be at least 0')
        if depth < 1:
            raise ValueError(f'MemoryHook: depth={depth} must be at least 1')
        self.at_iter, self.depth, self.ranks = at_iter, depth, ranks
        self._first = 0
        self._done = False
        self._meter: ActivationMeter | None = None
        self._found: dict[str, dict[str, int]] = {}

    def before_train(self, runner: Any) -> None:
        """Note where this process begins."""
        self._first = runner.iter
        self._done = self.ranks is not None and runner.rank not in self.ranks

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to watch what autograd keeps, on the chosen step."""
        if self._done or runner.iter < self._first + self.at_iter:
            return
        self._found = {kind: {} for kind in KINDS}
        parts, model = runner.strategy.parts, runner.model
        self._meter = ActivationMeter(parts, lambda: self._look_at_gathered(model))
        self._meter.attach()

    def _look_at_gathered(self, model: torch.nn.Module) -> Iterable[Tensor]:
        """Note what is gathered now; returns every tensor that is a parameter and no activation."""
        whole = list(gathered(model))
        for kind, tensors in (
            ('gathered_parameters', {one.name: one.parameter for one in whole}),
            ('gathered_gradients', {one.name: one.gradient for one in whole}),
        ):
            found = {
                name: _storage_bytes(tensor)
                for name, tensor in tensors.items()
                if tensor is not None
            }
            if sum(found.values()) > sum(self._found[kind].values()):
                self._found[kind] = found
        return [*model.parameters(), *(one.parameter for one in whole)]

    def after_backward(self, runner: Any) -> None:
        """Measure parameters and gradients, while there are some. The training loop calls this."""
        if self._meter is None:
            return
        self._stop()
        self._found['activations'] = self._meter.by_module
        for name, parameter in runner.model.named_parameters():
            self._found['parameters'][name] = _bytes(parameter)
            if parameter.grad is not None:
                self._found['gradients'][name] = _bytes(parameter.grad)
        self._done = True

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Measure the optimizer's state and report."""
        if self._meter is None:
            return
        self._stop()
        self._meter = None
        if self._done:  # otherwise the step was passed over, and the next one is taken
            # By their own names: an evaluation may have left gathered parameters in the model.
            for parameter, values in runner.optim_wrapper.optimizer.state.items():
                self._found['optimizer'][runner.run_state.names[id(parameter)]] = sum(
                    _bytes(value) for value in values.values() if isinstance(value, Tensor)
                )
            self._report(runner)

    def after_train(self, runner: Any) -> None:
        """Say so if the chosen step never came."""
        if not self._done:
            runner.logger.warning(
                f'MemoryHook: no memory was measured, step at_iter={self.at_iter} was not reached'
            )

    def on_error(self, runner: Any) -> None:
        """Leave nothing behind on the model."""
        self._stop()

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.detach()

    def _report(self, runner: Any) -> None:
        tree = memory_tree(self._found, self.depth)
        report: dict[str, Any] = {
            'rank': runner.rank,
            'world_size': runner.world_size,
            'device': str(runner.strategy.device),
            'iteration': runner.iter + 1,
            'bytes': {kind: tree[kind] for kind in KINDS},
        }
        lines = memory_table(tree)
        if runner.strategy.device.type == 'cuda':
            report['cuda'] = {
                'peak_allocated': torch.cuda.max_memory_allocated(runner.strategy.device),
                'peak_reserved': torch.cuda.max_memory_reserved(runner.strategy.device),
            }
            lines += [
                f'{name.replace("_", " ")} {readable(size)}'
                for name, size in report['cuda'].items()
            ]
        path = Path(runner.log_dir) / f'memory_rank{runner.rank}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report | {'modules': tree}, indent=1) + '\n')
        runner.logger.info(
            f'memory of rank {runner.rank} in iteration {runner.iter + 1}, details in {path}\n'
            + '\n'.join(lines)
        )


def memory_tree(found: Mapping[str, Mapping[str, int]], depth: int) -> dict[str, Any]:
    """Add up bytes by module.

    Args:
        found: Kind -> name -> bytes. Names are those of modules for activations and of parameters
            for every other kind.
        depth: Parts of a name that are told apart.

    Returns:
        The model as `{'name': 'model', KIND: bytes, ..., 'children': [...]}`; a node's bytes
        include its children's.
    """
    root = _node('model')
    for kind, sizes in found.items():
        for name, size in sizes.items():
            parts = name.split('.') if name else []
            if kind != 'activations':
                parts = parts[:-1]
            node = root
            node[kind] += size
            for part in parts[:depth]:
                node = _child(node, part)
                node[kind] += size
    return root


def memory_table(tree: Mapping[str, Any]) -> list[str]:
    """Lines of a table; neighbours that are alike, as layers are, share a line."""
    kinds = [kind for kind in KINDS if tree[kind] or not kind.startswith('gathered')]
    rows = [('module', *(kind.replace('_', ' ') for kind in kinds)), *_rows(tree, kinds, '')]
    widths = [max(len(row[column]) for row in rows) for column in range(len(kinds) + 1)]
    return [
        '  '.join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def readable(size_bytes: int) -> str:
    """A number of bytes for people, in units of 1024: '1.50 GiB'."""
    size, units = float(size_bytes), ['B', 'KiB', 'MiB', 'GiB', 'TiB']
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f'{size:.0f} B' if units[0] == 'B' else f'{size:.2f} {units[0]}'


def _rows(node: Mapping[str, Any], kinds: Sequence[str], indent: str) -> list[tuple[str, ...]]:
    cells = [readable(node[kind]) if node[kind] else '-' for kind in kinds]
    rows = [(indent + node['name'], *cells)]
    groups: list[list[dict[str, Any]]] = []
    for child in node['children']:
        if groups and _alike(groups[-1][0], child):
            groups[-1].append(child)
        else:
            groups.append([child])
    for first, *others in groups:
        if others:
            name = f'{first["name"]} to {others[-1]["name"]}, each'
            first = first | {'name': name}
        rows += _rows(first, kinds, indent + '  ')
    return rows


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two numbered modules, and all inside them, take the same memory."""
    numbered = one['name'].isdigit() and other['name'].isdigit()
    return numbered and _sizes(one) == _sizes(other)


def _sizes(node: Mapping[str, Any]) -> list[Any]:
    children = [(child['name'], _sizes(child)) for child in node['children']]
    return [*(node[kind] for kind in KINDS), *children]


def _node(name: str) -> dict[str, Any]:
    return {'name': name, **dict.fromkeys(KINDS, 0), 'children': []}


def _child(node: dict[str, Any], name: str) -> dict[str, Any]:
    for child in node['children']:
        if child['name'] == name:
            return child
    node['children'].append(_node(name))
    return node['children'][-1]


def _bytes(tensor: Tensor) -> int:
    local = local_tensor(tensor)
    return local.numel() * local.element_size()


def _storage_bytes(tensor: Tensor) -> int:
    local: Any = local_tensor(tensor)
    if not is_traceable_wrapper_subclass(local):
        return local.untyped_storage().nbytes()
    # It would tell the size of what it stands for; weights that are gathered in 8 bits have less.
    inner, _ = local.__tensor_flatten__()
    return sum(_storage_bytes(getattr(local, name)) for name in inner)
