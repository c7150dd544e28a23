"""A run's state, gathered for a checkpoint and put back from one."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.base import Base
from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.planner import local_part
from internlm_mm.checkpoint.random_state import random_state, set_random_state
from internlm_mm.checkpoint.step_folders import check_tensors, read_state
from internlm_mm.checkpoint.storage import read_tensor_index
from internlm_mm.optim.param_groups import check_same_groups
from internlm_mm.parallel.adapters import follow_base
from internlm_mm.parallel.mesh import Layout
from internlm_mm.parallel.strategy import HybridParallelStrategy
from internlm_mm.utils.adapters import is_adapter, is_score, names_held
from internlm_mm.utils.shards import zeros_cut_like


class RunState:
    """Knows what of a strategy's parts must survive, and under which names.

    Args:
        strategy: A prepared strategy.
    """

    def __init__(self, strategy: HybridParallelStrategy) -> None:
        self.strategy = strategy
        self.checkpointer = Checkpointer()
        optim_wrapper = getattr(strategy, 'optim_wrapper', None)
        if optim_wrapper is not None and strategy.layout.pipeline > 1:
            check_same_groups(optim_wrapper.optimizer)
        self.base: Base | None = None  # whose weights are frozen; then adapters alone are saved
        self.names = {id(p): name for name, p in strategy.model.named_parameters()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as `optimizer.PARAMETER.KIND`."""
        optimizer = self.strategy.optim_wrapper.optimizer
        return {
            f'optimizer.{self.names[id(parameter)]}.{kind}': value
            for parameter, state in optimizer.state.items()
            for kind, value in state.items()
            if isinstance(value, Tensor)
        }

    def save(
        self,
        path: Path,
        save_optimizer: bool,
        save_param_scheduler: bool,
        extra: Mapping[str, Any],
        callback: Callable[[dict], None] | None,
    ) -> None:
        """See `HybridParallelStrategy.save_checkpoint`."""
        strategy = self.strategy
        state = {key: value for key, value in extra.items() if key not in ('texts', 'folders')}
        state['layout'] = strategy.layout.as_dict()
        state['seed'] = strategy.seed
        tensors = {f'model.{k}': v for k, v in strategy.model_state_dict().items()}
        if self.base is not None:
            state['base'] = self.base.as_json()
            own = (name for name in tensors if is_adapter(name) or is_score(name))
            tensors = {name: tensors[name] for name in own}
        if save_optimizer:
            tensors |= self.optimizer_tensors()
            tensors |= {f'rng.{strategy.rank}.{k}': v for k, v in random_state().items()}
            state['optim_wrapper'] = strategy.optim_wrapper.scalar_state()
        if save_param_scheduler and hasattr(strategy, 'param_schedulers'):
            state['param_schedulers'] = strategy.scheduler_state_dict()
        if callback is not None:
            callback(state)
        self.checkpointer.save(path, tensors, state, extra.get('texts'), extra.get('folders'))

    def load(
        self, path: Path, content: Iterable[str], callback: Callable[[dict], None] | None
    ) -> dict[str, Any]:
        """Put the parts named in `content` back: model, optimizer, scheduler, random."""
        strategy, content = self.strategy, set(content)
        if strategy.gather_ahead is not None:
            strategy.gather_ahead.drop()  # copies of the weights from before
        state = read_state(path)
        tensors: dict[str, Tensor] = {}
        held = self._held(path)
        if 'model' in content:
            tensors |= held
        if 'optimizer' in content:
            if 'optim_wrapper' not in state:
                raise ValueError(
                    f'{path} was saved without optimizer state; use load_from for weights'
                )
            check_tensors(path, {name: tuple(tensor.shape) for name, tensor in held.items()})
            tensors |= self._empty_optimizer_state(path)
        generators = self._empty_random_state(path, state) if 'random' in content else {}
        tensors |= generators
        self.checkpointer.load(path, tensors)
        if 'model' in content and not any(map(is_adapter, held)):
            follow_base(strategy.model)
        if 'scheduler' in content and hasattr(strategy, 'param_schedulers'):
            if 'param_schedulers' not in state:
                raise ValueError(
                    f'{path} was saved without schedules, but the config has param_scheduler; '
                    "take the rest with load_from=dict(path=..., content=['model', ...])"
                )
            strategy.load_scheduler_state_dict(state['param_schedulers'])
        if 'optimizer' in content:
            scheduled = {
                key
                for scheduler in getattr(strategy, 'param_schedulers', [])
                if 'base_values' in scheduler.state_dict()  # continues from its last value
                for key in (scheduler.param_name, f'initial_{scheduler.param_name}')
            }
            strategy.optim_wrapper.load_scalar_state(
                state['optim_wrapper'], scheduled if 'scheduler' in content else ()
            )
        if generators:
            prefix = f'rng.{strategy.rank}.'
            set_random_state({key.removeprefix(prefix): v for key, v in generators.items()})
        if callback is not None:
            callback(state)
        return state

    def _held(self, path: Path) -> dict[str, Tensor]:
        """What of the model a checkpoint holds; see `names_held`."""
        tensors = {f'model.{k}': v for k, v in self.strategy.model_state_dict().items()}
        stored = (name for name in read_tensor_index(path) if name.startswith('model.'))
        return {name: tensors[name] for name in names_held(tensors, stored)}

    def load_weights(self, read: Callable[[str], Tensor], adapters: bool = False) -> None:
        """Take this rank's part of every weight; one of them is in memory whole at a time.

        Args:
            read: Gives a whole weight by our name of it.
            adapters: Whether to take those of adapters, and not all others.
        """
        if self.strategy.gather_ahead is not None:
            self.strategy.gather_ahead.drop()  # copies of the weights from before
        for name, tensor in self.strategy.model_state_dict().items():
            if is_adapter(name) != adapters or is_score(name):
                continue
            held = local_part(name, tensor)
            if held is not None:
                (offsets, sizes), data = held
                part = tuple(
                    slice(start, start + size) for start, size in zip(offsets, sizes, strict=True)
                )
                data.copy_(read(name)[part])
        if not adapters:
            follow_base(self.strategy.model)

    def _empty_optimizer_state(self, path: Path) -> dict[str, Tensor]:
        """Give the optimizer the state tensors the checkpoint has, to be filled by the load.

        A tensor with as many dimensions as the parameter, one at least, is laid out like the
        parameter; any other (AdamW's step) is whole on every rank.
        """
        index = read_tensor_index(path)
        optimizer = self.strategy.optim_wrapper.optimizer
        tensors: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group['params']:
                prefix = f'optimizer.{self.names[id(parameter)]}.'
                for name in (name for name in index if name.startswith(prefix)):
                    shape, dtype = index[name]['shape'], getattr(torch, index[name]['dtype'])
                    if shape and len(shape) == parameter.ndim:
                        value = zeros_cut_like(parameter, tuple(shape), dtype)
                    else:
                        on_device = group.get('fused') or group.get('capturable')
                        device = parameter.device if on_device else 'cpu'
                        value = torch.zeros(shape, dtype=dtype, device=device)
                    optimizer.state[parameter][name.removeprefix(prefix)] = value
                    tensors[name] = value
        return tensors

    def _empty_random_state(self, path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Room for this rank's generators; none if the layout changed: ranks mean other things."""
        if Layout(**state['layout']) != self.strategy.layout:
            self.strategy.logger.warning(
                f'the checkpoint was written on layout {json.dumps(state["layout"])}: '
                'random generators start from the seed; weights, optimizer and data go on'
            )
            return {}
        index = read_tensor_index(path)
        prefix = f'rng.{self.strategy.rank}.'
        return {
            name: torch.zeros(entry['shape'], dtype=torch.uint8)
            for name, entry in index.items()
            if name.startswith(prefix) and (torch.cuda.is_available() or not name.endswith('.cuda'))
        }
