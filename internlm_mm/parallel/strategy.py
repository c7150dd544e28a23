"""The strategy: where parts are placed, in which order techniques are applied, and one step."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.optim import BaseOptimWrapper
from torch import Tensor, nn

from internlm_mm.parallel.adapters import part_ways
from internlm_mm.parallel.data import GatherAhead
from internlm_mm.parallel.fit import check_layout
from internlm_mm.parallel.float8 import check_float8, scales_first
from internlm_mm.parallel.kernels import check_kernels
from internlm_mm.parallel.launch import join_process_group, unused_timestamp
from internlm_mm.parallel.mesh import Layout, ParallelMesh, resolve_layout
from internlm_mm.parallel.options import (
    by_iteration,
    check_dist_cfg,
    check_loss_scale,
    check_options,
)
from internlm_mm.parallel.pipeline import Pipeline
from internlm_mm.parallel.place import Techniques, place_model
from internlm_mm.parallel.saving import SavingStrategy
from internlm_mm.parallel.step import Stepper
from internlm_mm.registry import MODELS, STRATEGIES
from internlm_mm.structures import Batch
from internlm_mm.utils.device import pick_device
from internlm_mm.utils.launch import let_gpu_memory_grow, read_launch


@STRATEGIES.register_module()
class HybridParallelStrategy(SavingStrategy):
    """Builds a model on the meta device, places it over the mesh, and runs forward and backward.

    The model is single-device code and never learns of any of it; see `place_model` for the order
    in which techniques are applied.

    Args:
        parallel: Degree of each axis of the mesh; see `resolve_layout`.
        precision: `param`, what layers compute in, and `reduce`, what gradients are summed in;
            names of dtypes. Masters are fp32, or fp64 if `param` is.
        reshard: How long gathered parameters are kept: 'step' from the first forward to the last
            backward of a step; 'layer' gathers them again for every layer, with less memory;
            'never' gathers them right after the update, ahead of the next step.
        recompute: Share of the layers whose activations are computed again in backward, 0 to 1;
            'selective' for all but their matrix products; `dict(budget_gib=60)` for the smallest
            share with which tensors fit so much memory.
        compile: Whether each layer is compiled by itself.
        attention: A backend from ATTENTIONS, or 'auto'.
        offload: Whether masters, gradients and optimizer state live in host memory, where the
            update then runs: memory for speed.
        pipeline: How layers are cut into stages and micro-batches pass through them: `schedule`, a
            name in SCHEDULES; `stages_per_rank`; `layers`, how many each stage has.
        context_attention: How ranks that share a sequence exchange keys and values: 'all_gather',
            or 'ring', torch's own, on CUDA and for rows of one document.
        kernels: `norm`, `cross_entropy` ...; see `internlm_mm.parallel.kernels.Kernels`.
        float8: Products in 8 bits: `recipe` ...; see `internlm_mm.parallel.float8.Float8`.
        work_dir: Filled in by the runner.
        experiment_name: Filled in by the runner.
        env_kwargs: Filled in by the runner: launcher, `dist_cfg` (backend, timeout in seconds) and
            randomness.
        log_kwargs: Filled in by the runner.
        auto_scale_lr: Must be None: the rate does not follow the number of ranks.

    Raises:
        ValueError: If an option is out of range; names the key and the nearest choice.
    """

    def __init__(
        self,
        *,
        parallel: Mapping[str, int] | None = None,
        precision: Mapping[str, str] | None = None,
        reshard: str = 'step',
        recompute: float | str | Mapping[str, float] = 0.0,
        compile: bool = False,  # noqa: A002  the field's word for it
        attention: str = 'auto',
        offload: bool = False,
        pipeline: Mapping[str, Any] | None = None,
        context_attention: str = 'all_gather',
        kernels: Mapping[str, Any] | None = None,
        float8: Mapping[str, Any] | None = None,
        work_dir: str = 'work_dirs',
        experiment_name: str | None = None,
        env_kwargs: dict | None = None,
        log_kwargs: dict | None = None,
        auto_scale_lr: dict | None = None,
    ) -> None:
        if auto_scale_lr is not None:
            raise ValueError(
                'auto_scale_lr is not supported: the global batch size is in the config'
            )
        self.param_dtype, self.reduce_dtype = check_options(precision, reshard)
        self.techniques = Techniques(
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            reshard=reshard,
            offload=offload,
            recompute=recompute,
            compile=compile,
            attention=attention,
            context_attention=context_attention,
            kernels=check_kernels(kernels),
            float8=check_float8(float8, self.param_dtype),
            pipeline=pipeline,
        )
        self._parallel = parallel
        self._pipeline: Pipeline | None = None
        self._stepper: Stepper
        self.gather_ahead: GatherAhead | None = None
        self.device: torch.device
        self.layout: Layout
        self.mesh: ParallelMesh | None = None
        self._prepared: bool  # set by MMEngine
        self._run_name = experiment_name
        super().__init__(
            work_dir=work_dir,
            experiment_name=experiment_name,
            env_kwargs=env_kwargs,
            log_kwargs=log_kwargs,
        )

    # ---------------------------------------------------------------------------- environment

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank reads."""
        return self.layout.data_rank(self.rank)

    @property
    def data_world_size(self) -> int:
        """Shares of the data."""
        return self.layout.data

    @property
    def parts(self) -> list[nn.Module]:
        """What forward calls: the model, or this rank's stages of a pipeline."""
        return [self.model] if self._pipeline is None else list(self._pipeline.stages.values())

    @property
    def is_data_leader(self) -> bool:
        """Whether it is this rank that speaks for those that read the same rows."""
        place = self.layout.coordinate(self.rank)
        return not (place['pipeline'] or place['context'] or place['tensor'])

    def _setup_env(
        self, *, launcher: str = 'none', dist_cfg: dict | None = None, **kwargs: Any
    ) -> None:
        launch = read_launch(launcher)
        self.device = pick_device(launch.local_rank)
        if self.device.type == 'cuda':
            let_gpu_memory_grow()
            torch.cuda.set_device(self.device)
        options = dict(dist_cfg or {})
        check_dist_cfg(options)
        timeout = datetime.timedelta(seconds=options.get('timeout', 1800))
        backend = options.get('backend')
        self.local_size = join_process_group(launcher, launch, self.device, timeout, backend)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.layout = resolve_layout(self._parallel, world_size, self.local_size)
        if self.techniques.needs_mesh(world_size):
            # One process that casts or offloads: FSDP2 wants a group all the same.
            if not dist.is_initialized():
                dist.init_process_group(
                    'cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo',
                    store=dist.HashStore(),
                    rank=0,
                    world_size=1,
                    timeout=timeout,
                )
            self.mesh = ParallelMesh(self.layout, self.device.type)
        super()._setup_env(launcher=launcher, dist_cfg=None, **kwargs)
        self._timestamp: str = unused_timestamp(self._timestamp, self._run_name)

    def _set_randomness(self, seed: int | None = None, deterministic: bool = False) -> None:
        """Seed every rank alike: weights and the order of the data must not depend on the rank."""
        super()._set_randomness(seed, False, deterministic)

    def adopt_seed(self, seed: int) -> None:
        """Take over the seed of the run that is resumed; before data and weights are made of it."""
        self._seed = seed

    # -------------------------------------------------------------------------------- building

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build on the meta device, so that nothing is allocated before it is sharded."""
        if isinstance(model, nn.Module):
            return model
        with torch.device('meta'):
            return MODELS.build(model)

    def check_fit(
        self, model: nn.Module, seq_len: int, micro_batches: int | None = None, **key: str
    ) -> None:
        """Raise ValueError where the layout does not fit; see `check_layout`."""
        pipeline = self.techniques.pipeline
        check_layout(self.layout, model, seq_len, micro_batches, pipeline, self.local_size, **key)

    def prepare(
        self,
        model: nn.Module | dict,
        *,
        optim_wrapper: BaseOptimWrapper | dict | None = None,
        param_scheduler: dict | list | None = None,
        compile: dict | bool = False,  # noqa: A002  MMEngine's signature
        dispatch_kwargs: dict | None = None,
    ) -> tuple:
        """Build, place and initialise everything. Idempotent."""
        if compile:
            raise ValueError(
                'the top-level key `compile` is not supported: set strategy.compile=True'
            )
        if self._prepared:
            return self._prepared_components()
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        self.model = self.build_model(model)
        self.model = self._place(self.model)
        if optim_wrapper is not None:
            self.optim_wrapper = self.build_optim_wrapper(optim_wrapper, self.model)
            check_loss_scale(self.param_dtype, self.optim_wrapper)
            self._wire(self.optim_wrapper)
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        self._prepared = True
        return self._prepared_components()

    def _wire(self, optim_wrapper: Any) -> None:
        """Tell the optimizer's side over whom to add up, and what an update makes stale."""
        if self.mesh is not None and self.mesh.pipeline is not None:
            optim_wrapper.norm_groups = (self.mesh.pipeline.get_group(),)
        if self.mesh is not None and self.techniques.reshard == 'never':
            whole = self.model if self._pipeline is None else nn.ModuleList(self.parts)
            self.gather_ahead = GatherAhead(whole)
            optim_wrapper.after_step = self.gather_ahead.start
        if self.techniques.float8 is not None and self.techniques.float8.gathers:
            optim_wrapper.after_step = scales_first(self.model, optim_wrapper.after_step)

    def _place(self, model: nn.Module) -> nn.Module:
        hidden_size = getattr(model, 'hidden_size', 0)
        placed = place_model(model, self.layout, self.rank, self.mesh, self.techniques, self.device)
        self.logger.info(f'attention {placed.attention}')
        if placed.float8 is not None:
            self.logger.info(f'float8 {placed.float8}')
        if self.techniques.kernels.fuse_accumulation:
            self.logger.info(f'fuse_accumulation {placed.accumulation}')
        placed.materialize(self.seed, self.device, self.techniques.offload)
        part_ways(placed.model, self.seed, self.rank)
        if placed.plan is not None:
            assert self.mesh is not None and self.mesh.pipeline is not None
            self._pipeline = Pipeline(
                placed.stages,
                placed.plan,
                self.mesh.pipeline,
                self.device,
                hidden_size,
                self.param_dtype,
                self.layout.tensor,
            )
        self._stepper = Stepper(
            placed.model,
            self._pipeline,
            self.layout,
            self.rank,
            self.mesh,
            self.techniques,
            self.device,
        )
        return placed.model

    def build_param_scheduler(self, scheduler: Any, optim_wrapper: Any, default_args: Any = None):
        """Schedulers count iterations; MMEngine's default of epochs would never move."""
        filled = by_iteration(scheduler)
        return super().build_param_scheduler(filled, optim_wrapper, default_args)

    # ------------------------------------------------------------------------------- one step

    def sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        """Sum small host integers over all ranks. Collective; never waits for the GPU."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total)
        return total.tolist()

    def forward_backward(self, batches: Sequence[Batch], divisor: int) -> dict[str, Tensor]:
        """Accumulate a whole step's gradient and reduce it once. Collective.

        Args:
            batches: This rank's micro-batches of the step.
            divisor: The step's trained tokens over all ranks and micro-batches.

        Returns:
            Sums over all ranks and micro-batches of what the model returns ('loss', ...), on the
            device.
        """
        return self._stepper.forward_backward(batches, divisor, self.optim_wrapper)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The same sums without gradients. Collective: every rank gives as many batches."""
        return self._stepper.evaluate(batches)
