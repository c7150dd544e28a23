"""Every technique in its order, from a whole model to this rank's part."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from internlm_mm.parallel.accumulation import against_accumulation, fuse_accumulation
from internlm_mm.parallel.adapters import (
    check_adapters,
    check_four_bit,
    check_stages,
    follow_base,
    round_frozen,
)
from internlm_mm.parallel.attention import apply_attention
from internlm_mm.parallel.compiling import compile_layers
from internlm_mm.parallel.context import check_exchange
from internlm_mm.parallel.data import allocate, shard_model
from internlm_mm.parallel.float8 import Float8, apply_float8, check_partners, check_skip
from internlm_mm.parallel.initialize import initialize_parameters
from internlm_mm.parallel.kernels import Kernels, apply_kernels
from internlm_mm.parallel.mesh import Layout, ParallelMesh
from internlm_mm.parallel.pipeline import cut_stages
from internlm_mm.parallel.pipeline_plan import (
    PipelinePlan,
    check_reshard,
    layer_names,
    plan_pipeline,
)
from internlm_mm.parallel.recompute import recompute_layers
from internlm_mm.parallel.tensor import apply_tensor_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Techniques:
    """What is done to a model besides cutting it up; the keys of a strategy, checked.

    Attributes:
        param_dtype: What layers compute in.
        reduce_dtype: What gradients are summed in.
        reshard: See `internlm_mm.parallel.data.RESHARD`.
        offload: Whether masters, gradients and optimizer state live in host memory.
        recompute: See `internlm_mm.parallel.recompute.recompute_layers`.
        compile: Whether each layer is compiled by itself.
        attention: A backend from ATTENTIONS, or 'auto'.
        context_attention: How ranks that share a sequence exchange keys and values.
        kernels: Which kernels compute norms, losses and products.
        float8: How matrix products are rounded to 8 bits, or None.
        pipeline: See `internlm_mm.parallel.pipeline_plan.plan_pipeline`.

    Raises:
        ValueError: If there is no such `context_attention`, whether ranks share sequences or not.
    """

    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    reshard: str = 'step'
    offload: bool = False
    recompute: float | str | Mapping[str, float] = 0.0
    compile: bool = False
    attention: str = 'auto'
    context_attention: str = 'all_gather'
    kernels: Kernels = field(default_factory=Kernels)
    float8: Float8 | None = None
    pipeline: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_exchange(self.context_attention)

    def needs_mesh(self, world_size: int) -> bool:
        """Whether FSDP2 shards, casts or moves parameters; else it would only cost time."""
        wide = self.param_dtype in (torch.float32, torch.float64)
        return world_size > 1 or not wide or self.offload


@dataclass(frozen=True, slots=True)
class Placed:
    """A rank's part of a model.

    Attributes:
        model: All that the rank holds, under the whole model's names.
        stages: The pipeline stages it consists of, by index; the model itself without a pipeline.
        plan: Which layers each stage of every rank has, or None without a pipeline.
        attention: Which backend was chosen and why.
        float8: Which layers compute in 8 bits, or None.
        accumulation: Whose gradients add up in their products, or why none do.
    """

    model: nn.Module
    stages: dict[int, nn.Module]
    plan: PipelinePlan | None
    attention: str
    float8: str | None = None
    accumulation: str = 'off'

    def materialize(self, seed: int, device: torch.device, offload: bool) -> None:
        """Give parameters on the meta device memory and initial values; move any others.

        Args:
            seed: The run's.
            device: Where the model computes.
            offload: Whether parameters stay in host memory, where sharding has put them.
        """
        is_meta = any(parameter.is_meta for parameter in self.model.parameters())
        for stage in self.stages.values():
            if is_meta:
                allocate(stage, device, offload)
            elif not offload:
                stage.to(device)
        if is_meta:
            initialize_parameters(self.model, seed)
            follow_base(self.model)


def place_model(
    model: nn.Module,
    layout: Layout,
    rank: int,
    mesh: ParallelMesh | None,
    techniques: Techniques,
    device: torch.device,
    elsewhere: bool = False,
) -> Placed:
    """Pipeline cut -> tensor -> kernels -> recomputation -> float8 -> compilation -> sharding.

    Args:
        model: Whole, on the meta device or not; becomes the rank's part where there is no pipeline.
        layout: Of the job.
        rank: Of this process.
        mesh: Of the layout; None for one process that computes in its masters' precision, where
            sharding over nobody would only cost time.
        techniques: What else is done.
        device: Where the model will run.
        elsewhere: Whether that is on another machine, of which this one's GPUs and packages say
            nothing.

    Raises:
        ValueError: If a technique does not fit the model.
    """
    if techniques.float8 is not None:
        check_partners(layout.tensor, techniques.kernels.fuse)
        check_skip(model, techniques.float8)
    check_adapters(model, techniques.kernels.fuse, techniques.float8 is not None)
    check_four_bit(
        model, layout, techniques.reshard, techniques.offload, techniques.param_dtype, elsewhere
    )
    round_frozen(model, techniques.param_dtype)
    plan = rounded = None
    accumulation = 'off: gradients add up where they are, in the precision of the masters'
    stages = {0: model}
    if layout.pipeline > 1:
        plan = plan_pipeline(
            layer_names(model), layout.pipeline, techniques.pipeline, techniques.compile
        )
        check_reshard(plan, techniques.reshard)
        check_stages(model, iter(plan.layers))
        model, stages = cut_stages(model, plan, layout.coordinate(rank)['pipeline'])
    for stage in stages.values():
        if mesh is not None and mesh.tensor is not None:
            apply_tensor_parallel(stage, mesh.tensor)
        chosen = apply_attention(
            stage,
            techniques.attention,
            device,
            techniques.param_dtype,
            mesh.context if mesh is not None else None,
            techniques.context_attention,
            elsewhere,
        )
        apply_kernels(stage, techniques.kernels, device, techniques.param_dtype, layout.tensor)
        recompute_layers(stage, techniques.recompute, techniques.compile)
        if techniques.float8 is not None:
            rounded = apply_float8(
                stage, techniques.float8, device, techniques.param_dtype, mesh is not None
            )
        if techniques.compile:
            compile_layers(stage, techniques.recompute, turns=techniques.float8 is not None)
        if techniques.param_dtype == torch.float64:
            stage.to(torch.float64)
        if mesh is not None:
            shard_model(
                stage,
                mesh.fsdp,
                techniques.param_dtype,
                techniques.reduce_dtype,
                techniques.reshard,
                techniques.offload,
            )
            accumulation = fuse_accumulation(
                stage,
                techniques.kernels.fuse_accumulation,
                device,
                techniques.param_dtype,
                techniques.reduce_dtype,
                against_accumulation(layout, techniques.kernels.fuse, plan),
            )
    return Placed(model, stages, plan, chosen, rounded, accumulation)
