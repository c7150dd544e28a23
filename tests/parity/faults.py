"""Errors of parallel training, planted: each is called by every process before it trains."""

import os
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.tensor import DTensor, Replicate

from internlm_mm.engine.run_state import RunState
from internlm_mm.models.layers import norm
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper, grad_norm, hybrid_zero
from internlm_mm.parallel import HybridParallelStrategy, adapters, initialize, place, step, tensor
from internlm_mm.parallel.data import GatherAhead


def plant(owner: Any, name: str, error: Any) -> None:
    """Put `error` in the place of what works; fails where there is nothing of that name."""
    assert hasattr(owner, name), f'{owner} has no {name}: it was renamed, and so shall the error be'
    setattr(owner, name, error)


def no_reduce_over_shards() -> None:
    """Each rank keeps its own gradient of the part that it holds."""

    def own_part(self, output_tensor, input_tensor, group, op, async_op=False):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        output_tensor.copy_(input_tensor.view(size, -1)[rank])

    plant(collectives.DefaultReduceScatter, '__call__', own_part)


def no_reduce_over_replicas() -> None:
    """Copies of the sharded model keep what they have computed from their own rows."""

    class Without:
        all_reduce = staticmethod(lambda *args, **kwargs: None)

        def __getattr__(self, name):
            return getattr(dist, name)

    plant(collectives, 'dist', Without())


def no_reduce_over_tensor_ranks() -> None:
    """Norms see a share of the tokens on each rank; their gradients are not added up."""
    original = norm.rms_norm

    def without(x, weight, eps):
        if not isinstance(weight, DTensor):
            return original(x, weight, eps)
        own = weight.to_local(grad_placements=[Replicate()] * weight.device_mesh.ndim)
        return DTensor.from_local(original(x.to_local(), own, eps), x.device_mesh, x.placements)

    plant(norm, 'rms_norm', without)


def no_reduce_over_context_ranks() -> None:
    """Keys and values get gradients from the queries of their own rank only."""
    plant(tensor, 'Partial', Replicate)


def no_reduce_of_adapters() -> None:
    """Each tensor rank keeps its part of the gradient of what adapters have whole."""

    def own_part(parameter, summed=False):
        return None if parameter is None else parameter.to_local()

    plant(adapters, '_local', own_part)


def lengths_of_parts() -> None:
    """Rows that tensor ranks share are as long as each one's part."""
    plant(adapters, '_add_up', lambda mesh, part: part)


def no_norm_over_stages() -> None:
    """Each stage clips by its own norm."""
    original = hybrid_zero.gradient_norm
    plant(hybrid_zero, 'gradient_norm', lambda gradients, groups=(): original(gradients))


def norm_counted_twice() -> None:
    """What every rank has whole counts once a rank."""

    def every_axis(gradient):
        mesh = gradient.device_mesh
        return tuple(mesh.get_group(axis) for axis in range(mesh.ndim) if mesh.size(axis) > 1)

    plant(grad_norm, '_groups_of', every_axis)


def norm_of_a_shard() -> None:
    """The norm is that of this rank's part."""
    plant(grad_norm, '_sum_over', lambda group, values: values)


def unclipped_shard() -> None:
    """One rank clips a copy."""
    original = hybrid_zero.local_tensor
    if os.environ['RANK'] == '1':
        plant(hybrid_zero, 'local_tensor', lambda gradient: original(gradient).clone())


def wrong_rotary_offset() -> None:
    """Positions of the second rank's tokens are one too high."""
    original = step.share_batch

    def shifted(batch, mesh):
        own = original(batch, mesh)
        return replace(own, position_ids=own.position_ids + mesh.get_local_rank())

    plant(step, 'share_batch', shifted)


def mean_of_means() -> None:
    """Each rank divides by its own tokens, and gradients are averaged."""

    def own_share(self, values):
        return [value * self.layout.data for value in values]

    plant(HybridParallelStrategy, 'sum_over_ranks', own_share)


def averaged_gradients() -> None:
    """FSDP2's default: divide by the number of ranks, on top of the division by all tokens."""
    plant(FSDPModule, 'set_gradient_divide_factor', lambda self, factor: None)


def last_micro_batch_unreduced() -> None:
    """Gradients leave the rank with the first micro-batch; the others stay behind."""
    begin = step.begin_micro_batch
    is_first = [True]

    def begin_early(model, is_last, reshard):
        begin(model, is_last, reshard)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_first[0])
        is_first[0] = is_last

    plant(step, 'begin_micro_batch', begin_early)


def stale_gather() -> None:
    """Parameters of the next step are gathered before they are updated."""
    start, update = GatherAhead.start, HybridZeroOptimWrapper.step

    def gather_then_step(self, **kwargs):
        if self.after_step is not None:
            start(self.after_step.__self__)
        update(self, **kwargs)

    plant(HybridZeroOptimWrapper, 'step', gather_then_step)
    plant(GatherAhead, 'start', lambda self: None)


def swapped_stage() -> None:
    """The first stage computes the last layers."""
    original = place.plan_pipeline

    def swapped(*args):
        plan = original(*args)
        return replace(plan, layers=plan.layers[::-1])

    plant(place, 'plan_pipeline', swapped)


def decay_of_everything() -> None:
    """Biases and norms decay, too."""
    original = DecayGroupsConstructor.__call__

    def decay(self, model):
        wrapper = original(self, model)
        for group in wrapper.param_groups:
            group['weight_decay'] = 0.1
        return wrapper

    plant(DecayGroupsConstructor, '__call__', decay)


def weights_by_rank() -> None:
    """Each rank draws other weights."""
    original = initialize.name_seed
    rank = int(os.environ['RANK'])
    plant(initialize, 'name_seed', lambda seed, name: original(seed + rank, name))


def forgotten_moments() -> None:
    """A resumed run begins with an empty first moment."""
    original = RunState.load

    def load(self, *args):
        state = original(self, *args)
        for moments in self.strategy.optim_wrapper.optimizer.state.values():
            moments['exp_avg'].zero_()
        return state

    plant(RunState, 'load', load)


def death() -> None:
    """The second rank is gone at its first gradient."""
    original = HybridParallelStrategy.forward_backward

    def die(self, *args):
        if self.rank == 1:
            raise FloatingPointError('planted')
        return original(self, *args)

    plant(HybridParallelStrategy, 'forward_backward', die)
