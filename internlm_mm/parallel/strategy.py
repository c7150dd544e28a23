"""The strategy: where parts are placed, in which order techniques are applied, and one step."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine._strategy import BaseStrategy
from mmengine.optim import BaseOptimWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from internlm_mm.parallel.attention import apply_attention
from internlm_mm.parallel.data import RESHARD, begin_micro_batch, layers_of, shard_model
from internlm_mm.parallel.initialize import initialize_parameters
from internlm_mm.parallel.launch import join_process_group
from internlm_mm.parallel.mesh import Layout, build_mesh, resolve_layout
from internlm_mm.parallel.recompute import recompute_layers
from internlm_mm.registry import STRATEGIES
from internlm_mm.structures import Batch
from internlm_mm.utils.device import dtype_of, pick_device
from internlm_mm.utils.launch import read_launch
from internlm_mm.utils.suggest import did_you_mean


@STRATEGIES.register_module()
class HybridParallelStrategy(BaseStrategy):
    """Builds a model on the meta device, places it over the mesh, and runs forward and backward.

    Order: attention backend -> recomputation -> compilation -> sharding -> initialisation. The
    model is single-device code and never learns of any of it.

    Args:
        parallel: Degree of each axis of the mesh; see `resolve_layout`.
        precision: `param`, what layers compute in, and `reduce`, what gradients are summed in;
            names of dtypes. Masters are fp32, or fp64 if `param` is.
        reshard: When gathered parameters are given up: 'step' keeps them from the first forward to
            the last backward of a step, 'layer' gathers them again for every layer, with less
            memory.
        recompute: Share of the layers whose activations are computed again in backward, 0 to 1.
        compile: Whether each layer is compiled by itself.
        attention: A backend from ATTENTIONS, or 'auto'.
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
        recompute: float = 0.0,
        compile: bool = False,  # noqa: A002  the field's word for it
        attention: str = 'auto',
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
        self.reshard, self.recompute, self.compile = reshard, recompute, compile
        self.attention = attention
        self._parallel = parallel
        self.device: torch.device
        self.layout: Layout
        self.mesh: DeviceMesh | None = None
        self._prepared: bool  # set by MMEngine
        self.run_state: Any = None  # the runner's RunState: saves and loads
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
        return self.rank if self.layout.data > 1 else 0

    @property
    def data_world_size(self) -> int:
        """Shares of the data."""
        return self.layout.data

    @property
    def needs_mesh(self) -> bool:
        """Whether FSDP2 shards or casts parameters; on one fp32 process it would only cost time."""
        wide = self.param_dtype in (torch.float32, torch.float64)
        return self.layout.data > 1 or not wide

    def _setup_env(
        self, *, launcher: str = 'none', dist_cfg: dict | None = None, **kwargs: Any
    ) -> None:
        launch = read_launch(launcher)
        self.device = pick_device(launch.local_rank)
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        options = dict(dist_cfg or {})
        check_dist_cfg(options)
        timeout = datetime.timedelta(seconds=options.get('timeout', 1800))
        backend = options.get('backend')
        self.local_size = join_process_group(launcher, launch, self.device, timeout, backend)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.layout = resolve_layout(self._parallel, world_size, self.local_size)
        if self.needs_mesh:
            if (
                not dist.is_initialized()
            ):  # one process that casts: FSDP2 wants a group all the same
                dist.init_process_group(
                    'cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo',
                    store=dist.HashStore(),
                    rank=0,
                    world_size=1,
                    timeout=timeout,
                )
            self.mesh = build_mesh(self.layout, self.device.type)
        super()._setup_env(launcher=launcher, dist_cfg=None, **kwargs)

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
            return super().build_model(model)

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
        self._place(self.model)
        if optim_wrapper is not None:
            self.optim_wrapper = self.build_optim_wrapper(optim_wrapper, self.model)
            check_loss_scale(self.param_dtype, self.optim_wrapper)
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        self._prepared = True
        return self._prepared_components()

    def _place(self, model: nn.Module) -> None:
        chosen = apply_attention(model, self.attention, self.device, self.param_dtype)
        self.logger.info(f'attention {chosen}')
        recompute_layers(model, self.recompute)
        if self.compile:
            for layer in layers_of(model):
                layer.compile()
        if self.param_dtype == torch.float64:
            model.to(torch.float64)
        if self.mesh is not None:
            axes = self.mesh if self.layout.data_replicate > 1 else self.mesh['data_shard']
            shard_model(model, axes, self.param_dtype, self.reduce_dtype, self.reshard)
        if any(parameter.is_meta for parameter in model.parameters()):
            model.to_empty(device=self.device)
            initialize_parameters(model, self.seed, self.device)
        else:
            model.to(self.device)

    def build_param_scheduler(self, scheduler: Any, optim_wrapper: Any, default_args: Any = None):
        """Schedulers count iterations; MMEngine's default of epochs would never move."""
        listed = scheduler if isinstance(scheduler, Sequence) else [scheduler]
        filled = []
        for index, config in enumerate(listed):
            if isinstance(config, dict):
                config = {'by_epoch': False, **config}
                if config['by_epoch']:
                    raise ValueError(
                        f'param_scheduler.{index}.by_epoch=True: training has no epochs, '
                        'only iterations'
                    )
            filled.append(config)
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
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            begin_micro_batch(self.model, index == len(batches) - 1, self.reshard)
            sums = self.model(batch.to(self.device))
            self.optim_wrapper.backward(self.optim_wrapper.scale_loss(sums['loss'] / divisor))
            _accumulate(totals, sums)
        return self._sum_over_data(totals)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The same sums without gradients. Collective: every rank gives as many batches."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            _accumulate(totals, self.model(batch.to(self.device)))
        return self._sum_over_data(totals)

    def _sum_over_data(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.layout.data == 1:
            return totals
        # One collective for all of them; fp64 so that large sums keep their last digits on gloo and
        # NCCL.
        flat = torch.cat([value.double().reshape(-1) for value in totals.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in totals.values()])
        return {
            key: part.reshape(value.shape)
            for (key, value), part in zip(totals.items(), parts, strict=True)
        }

    # ---------------------------------------------------------------------------- checkpoints

    def model_state_dict(self) -> dict[str, Tensor]:
        """This rank's view of the weights; sharded ones are DTensors."""
        return self.model.state_dict()

    def optim_state_dict(self) -> dict[str, Tensor]:
        """This rank's view of the optimizer's tensors, by parameter name and kind."""
        return self.run_state.optimizer_tensors()

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Any = None,
    ) -> None:
        """Write everything a run needs to go on. Collective.

        Args:
            filename: The checkpoint's folder, `iter_N`.
            save_optimizer: Whether to include optimizer state and random generators.
            save_param_scheduler: Whether to include schedules.
            extra_ckpt: What else goes into `state.json`; the keys `texts` and `folders` name
                further files.
            callback: Called with the state before it is written, for hooks that add to it.
        """
        self.run_state.save(
            Path(filename), save_optimizer, save_param_scheduler, extra_ckpt or {}, callback
        )

    def load_checkpoint(
        self,
        filename: str,
        *,
        map_location: Any = 'cpu',  # noqa: ARG002  MMEngine's signature
        strict: bool = False,  # noqa: ARG002
        revise_keys: list | None = None,  # noqa: ARG002
        callback: Any = None,
    ) -> dict:
        """Weights only, every one of them. Collective."""
        return self.run_state.load(Path(filename), ('model',), callback)

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = 'default',  # noqa: ARG002  MMEngine's signature
        callback: Any = None,
    ) -> dict:
        """Weights and whatever else is asked for. Collective."""
        content = ['model', 'random']
        if resume_optimizer:
            content.append('optimizer')
        if resume_param_scheduler:
            content.append('scheduler')
        return self.run_state.load(Path(filename), tuple(content), callback)


def check_dist_cfg(dist_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that the process group has no use for."""
    for key in dist_cfg:
        if key not in ('backend', 'timeout'):
            hint = did_you_mean(key, ('backend', 'timeout'))
            raise ValueError(f'env_cfg.dist_cfg.{key}={dist_cfg[key]!r} is unknown.{hint}')


def check_loss_scale(param_dtype: torch.dtype, optim_wrapper: Any) -> None:
    """Raise ValueError if fp16 would train without a loss scale: small gradients would vanish."""
    if param_dtype == torch.float16 and getattr(optim_wrapper, 'loss_scale', None) is None:
        raise ValueError(
            "strategy.precision.param='float16' needs optim_wrapper.loss_scale=dict(); "
            "'bfloat16' needs none"
        )


def check_options(
    precision: Mapping[str, str] | None, reshard: str
) -> tuple[torch.dtype, torch.dtype]:
    """Options that can be judged before there is a process group.

    Returns:
        What layers compute in, and what gradients are summed in.

    Raises:
        ValueError: With the key, the value and the nearest choice.
    """
    if reshard not in RESHARD:
        raise ValueError(f'strategy.reshard={reshard!r}.{did_you_mean(reshard, RESHARD)}')
    names = {'param': 'float32', 'reduce': 'float32'}
    for key, name in (precision or {}).items():
        if key not in names:
            raise ValueError(
                f'strategy.precision.{key}={name!r} is unknown.{did_you_mean(key, names)}'
            )
        names[key] = name
    param, reduce = (dtype_of(names[key], f'strategy.precision.{key}') for key in names)
    return param, reduce


def _accumulate(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for key, value in sums.items():
        value = value.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        totals[key] = totals[key] + value if key in totals else value
