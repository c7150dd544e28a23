"""The same model and step in a bare loop: what the framework's overhead is measured against.

Imports our model and nothing else of ours. Same shapes, attention, AdamW, clip and finite check; no
hooks, no data pipeline, no checkpoints. One process in fp32, or FSDP2 over all processes of the job
in the framework's precision, kept gathered over the step, with one reduction.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import internlm_mm.models as models


class BareLoop:
    """A model, an optimizer and a step.

    Args:
        model: Name of a class of `internlm_mm.models`, and its arguments as `options`.
        options: Sizes.
        device: Where to train.
        optimizer: Options of AdamW.
        max_norm: Largest gradient norm.
        dtypes: What layers compute and gradients are summed in, to shard over the job's processes;
            None for one process in fp32.
        compile: Whether to compile each layer.
        attend: The attention of all layers; the model's own if None.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        device: torch.device,
        optimizer: dict[str, Any],
        max_norm: float,
        dtypes: tuple[torch.dtype, torch.dtype] | None,
        compile: bool,  # noqa: A002
        attend: Callable[..., Any] | None = None,
    ) -> None:
        with torch.device('meta'):
            self.model: Any = getattr(models, model)(**options)
        for layer in self.model.layers.values():
            layer.self_attn.attend = attend or layer.self_attn.attend
            if compile:
                layer.compile()
            if dtypes:
                self._shard(layer, *dtypes)
        if dtypes:
            self._shard(self.model, *dtypes)
        self.sharded, self.device, self.max_norm = dtypes is not None, device, max_norm
        self.model.to_empty(device=device)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.006)
        groups: list[dict[str, Any]] = [
            {'params': [p for p in self.model.parameters() if p.ndim >= 2]},
            {'params': [p for p in self.model.parameters() if p.ndim < 2], 'weight_decay': 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, **optimizer)

    @staticmethod
    def _shard(module: Any, param: torch.dtype, reduce: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(param, reduce, cast_forward_inputs=False)
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # which gloo has, too

    def step(self, batches: Sequence[Any]) -> float:
        """One optimizer step over micro-batches. Returns the mean loss of this rank's share."""
        targets = torch.tensor(sum(batch.num_targets for batch in batches))
        if self.sharded:
            dist.all_reduce(targets)
        divisor = targets.item()
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if self.sharded:
                self.model.set_requires_gradient_sync(last)
                self.model.set_is_last_backward(last)
                self.model.set_reshard_after_backward(last)
            loss = self.model(batch.to(self.device))['loss'] / divisor
            loss.backward()
            total += loss.detach()
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        if math.isfinite(norm.full_tensor().item() if self.sharded else norm.item()):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()
