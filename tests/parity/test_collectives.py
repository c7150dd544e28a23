"""What leaves a rank in a step: gradients once, whatever the accumulation, layer by layer.

Collectives are seen where torch hands them to a process group, whoever asked for them.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_mm.datasets import RandomTokens, collate_rows
from internlm_mm.models import InternLM
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper
from internlm_mm.parallel import HybridParallelStrategy
from tests.ranks import Ranks

pytestmark = pytest.mark.parallel

LAYERS, ACCUMULATION = 4, (4, 8)
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=LAYERS, num_heads=4,
    max_seq_len=16,
)  # fmt: skip
OPTIM = dict(
    type=HybridZeroOptimWrapper,
    constructor=DecayGroupsConstructor,
    optimizer=dict(type=torch.optim.AdamW, lr=1e-3),
    clip_grad=dict(max_norm=1.0),
)
KINDS = {'_reduce_scatter_base_': 'scatter', 'allreduce_': 'reduce', '_allgather_base_': 'gather'}
"""Collectives of FSDP2 by what they do; activations travel by others (`_c10d_functional`)."""


@dataclass(frozen=True)
class Sent:
    """One collective: what it does, among which ranks, and how many numbers go in."""

    kind: str
    ranks: tuple[int, ...]
    numel: int


class Watch(TorchDispatchMode):
    """Notes collectives, and what `note` is told in between."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Sent | str] = []

    def note(self, event: str) -> None:
        self.events.append(event)

    @property
    def sent(self) -> list[Sent]:
        return [event for event in self.events if isinstance(event, Sent)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # what it does is seen when it comes to its local tensors
        kind = KINDS.get(func._opname)
        if kind and func.namespace == 'c10d':
            ranks = tuple(dist.get_process_group_ranks(_group_of(args)))
            if len(ranks) > 1:
                numel = _numel(func._opname, args)
                self.events.append(Sent(kind, ranks, numel))
        return func(*args, **(kwargs or {}))


def _group_of(args: tuple) -> dist.ProcessGroup:
    (group,) = (
        arg for arg in args
        if isinstance(arg, torch.ScriptObject) and 'ProcessGroup' in str(arg._type())
    )  # fmt: skip
    return dist.ProcessGroup.unbox(group)


def _numel(name: str, args: tuple) -> int:
    # The first tensor is where the result goes, if there is a second.
    sent = args[0] if name == 'allreduce_' else args[1]
    return sum(one.numel() for one in sent) if isinstance(sent, (list, tuple)) else sent.numel()


def strategy_of(folder: str, parallel: dict, **options: Any) -> HybridParallelStrategy:
    strategy = HybridParallelStrategy(
        parallel=parallel, **options, work_dir=folder, experiment_name=folder.replace('/', '_'),
        env_kwargs={'launcher': 'none', 'randomness': {'seed': 5}},
        log_kwargs={'log_level': 'WARNING'},
    )  # fmt: skip
    strategy.prepare(dict(type=InternLM, **SIZES), optim_wrapper=dict(OPTIM))
    return strategy


def batches(strategy: HybridParallelStrategy, count: int) -> list:
    data = RandomTokens(vocab_size=32, seq_len=16, document_lengths=[3, 7])
    first = strategy.data_rank * count
    return [collate_rows([data[first + index]]) for index in range(count)]


def axes_of(strategy: HybridParallelStrategy) -> dict[str, tuple[int, ...]]:
    """Ranks of this rank's groups over which gradients are reduced."""
    mesh = strategy.mesh.fsdp
    names = mesh.mesh_dim_names
    return {
        name: tuple(dist.get_process_group_ranks(mesh.get_group(name)))
        for name in names
        if mesh[name].size() > 1
    }


def units_of(strategy: HybridParallelStrategy) -> dict[str, int]:
    """Parameters of each unit that is gathered and reduced as one, by the names of its own."""
    found: dict[str, int] = {}
    for part in strategy.parts:
        inner = {
            id(p) for m in part.modules() if m is not part and isinstance(m, FSDPModule)
            for p in m.parameters()
        }  # fmt: skip
        for name, module in part.named_modules():
            if isinstance(module, FSDPModule):
                own = [p for p in module.parameters() if module is not part or id(p) not in inner]
                if own:
                    found[f'{id(part)}/{name}'] = sum(p.to_local().numel() for p in own)
    return found


def steps(parallel: dict, fault: bool = False, **options: Any) -> dict:
    """One step for each accumulation: what was reduced over the axes of data."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = strategy_of(folder, parallel, **options)
        if fault:
            reduce_every_time(strategy)
        axes, told = axes_of(strategy), []
        for count in ACCUMULATION:
            with Watch() as watch:
                strategy.forward_backward(batches(strategy, count), 100)
                strategy.optim_wrapper.update_params()
            told.append({axis: gradients(watch.sent, axis, ranks) for axis, ranks in axes.items()})
        return {'told': told, 'units': sorted(units_of(strategy).values()), 'axes': axes}


def gradients(sent: list[Sent], axis: str, ranks: tuple[int, ...]) -> list[int]:
    """Sizes of what was reduced over an axis, but for single numbers: the norm and the loss."""
    kind = {'shard': 'scatter', 'data_replicate': 'reduce'}[axis]
    return sorted(
        one.numel for one in sent
        if (one.kind, one.ranks) == (kind, ranks) and one.numel > 20
    )  # fmt: skip


def reduce_every_time(strategy: HybridParallelStrategy) -> None:
    """As FSDP2 does unless it is told otherwise."""
    for module in strategy.model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(True)
            module.set_requires_gradient_sync = lambda value, **options: None


@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp('four'), world_size=4)
    yield ranks
    ranks.close()


ONCE = [
    dict(parallel={'data_shard': 4}),
    dict(parallel={'data_shard': 4}, reshard='layer'),
    dict(parallel={'data_shard': 4}, reshard='never'),
    dict(parallel={'data_shard': 4}, recompute=1.0),
    dict(parallel={'data_shard': 4}, offload=True),
    dict(parallel={'data_replicate': 4}),
    dict(parallel={'data_replicate': 2, 'data_shard': 2}),
    dict(parallel={'data_replicate': 2, 'data_shard': 2}, reshard='layer'),
    dict(parallel={'data_shard': 2, 'tensor': 2}),
    dict(parallel={'data_replicate': 2, 'tensor': 2}),
    dict(parallel={'data_shard': 2, 'context': 2}),
    dict(parallel={'data_replicate': 2, 'context': 2}),
    *(
        dict(parallel={'data_shard': 2, 'pipeline': 2}, pipeline={'schedule': schedule})
        for schedule in ('gpipe', '1f1b', 'interleaved_1f1b', 'interleaved_zero_bubble',
                         'zbv_zero_bubble')
    ),
    dict(parallel={'data_replicate': 2, 'pipeline': 2}),
]  # fmt: skip


def name_of(options: dict) -> str:
    return '-'.join(str(value) for value in options.values())


@pytest.mark.parametrize('options', ONCE, ids=name_of)
def test_gradients_leave_once_a_step(four_ranks: Ranks, options: dict) -> None:
    """Every unit's gradient is reduced once over every axis of data, at four and at eight."""
    for found in four_ranks(steps, **options):
        assert found['told'][0] == found['told'][1]
        for axis, ranks in found['axes'].items():
            numels = found['told'][0][axis]
            # A unit sends all of it to be scattered, and then its own shard to the copies.
            factor = len(ranks) if axis == 'shard' else 1
            assert len(numels) == len(found['units']), axis
            for numel, own in zip(numels, found['units'], strict=True):
                # Shards are padded to equal sizes.
                assert own * factor <= numel < own * factor * 1.5 + 200, axis


def test_the_count_can_fail(four_ranks: Ranks) -> None:
    options = dict(parallel={'data_replicate': 2, 'data_shard': 2}, fault=True)
    for found in four_ranks(steps, **options):
        units = len(found['units'])
        for count, told in zip(ACCUMULATION, found['told'], strict=True):
            assert {axis: len(numels) for axis, numels in told.items()} == {
                'data_replicate': count * units, 'shard': count * units,
            }  # fmt: skip


# ----------------------------------------------------------------------------------- and when


def order(reshard: str) -> list[list[str]]:
    """Events of two steps of two micro-batches: layers in both directions, collectives."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = strategy_of(folder, {'data_shard': 4}, reshard=reshard)
        watch = Watch()
        for name, layer in strategy.model.layers.items():
            mark(layer, name, watch)
        told = []
        for _ in range(2):
            watch.events.clear()
            with watch:
                strategy.forward_backward(batches(strategy, 2), 100)
                watch.note('update')
                strategy.optim_wrapper.update_params()
            told.append([
                event if isinstance(event, str) else event.kind
                for event in watch.events
                if isinstance(event, str) or event.numel > 20
            ])  # fmt: skip
        return told


def mark(layer: nn.Module, name: str, watch: Watch) -> None:
    """Note when a layer's forward begins, and when its backward does."""
    layer.register_forward_pre_hook(lambda *_: watch.note(f'forward {name}'), prepend=False)

    def watch_backward(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: watch.note(f'backward {name}'))

    layer.register_forward_hook(watch_backward)


FORWARD = [f'forward {layer}' for layer in range(LAYERS)]
BACKWARD = [f'backward {layer}' for layer in reversed(range(LAYERS))]


def test_gradients_leave_while_backward_goes_on(four_ranks: Ranks) -> None:
    """A layer's gradient is on its way before the backward of the layer below has begun."""
    for told in four_ranks(order, 'step'):
        for events in told:
            assert Counter(events)['scatter'] == LAYERS + 1
            last = len(events) - events[::-1].index('forward 3') - 1
            ending = events[last + 1 : events.index('update')]
            expected = ['backward 3']
            for layer in reversed(range(LAYERS - 1)):
                expected += ['scatter', f'backward {layer}']
            assert ending == [*expected, 'scatter', 'scatter']  # the first layer's, the rest


def test_parameters_are_gathered_layer_by_layer(four_ranks: Ranks) -> None:
    """No layer waits for the parameters of a later one; the second micro-batch has them all."""
    for told in four_ranks(order, 'step'):
        for events in told:
            first = ['gather', *(e for layer in FORWARD for e in ('gather', layer))]
            assert events[: len(first)] == first
            assert events[len(first) :].count('gather') == 0


def test_parameters_are_gathered_ahead_of_the_next_step(four_ranks: Ranks) -> None:
    for told in four_ranks(order, 'never'):
        first, second = told
        assert first[first.index('update') :].count('gather') == LAYERS + 1
        assert second[: second.index('update')].count('gather') == 0
        assert [event for event in second if event.startswith(('forward', 'backward'))] == [
            *FORWARD, *BACKWARD, *FORWARD, *BACKWARD,
        ]  # fmt: skip
