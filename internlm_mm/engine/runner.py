"""Builds the parts of a config and holds them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from internlm_mm.checkpoint.base import Base
from internlm_mm.checkpoint.foreign import Source
from internlm_mm.checkpoint.peft_files import read_peft
from internlm_mm.checkpoint.step_folders import TOKENIZER_FOLDER, read_state
from internlm_mm.engine.alignment import check_alignment, check_reference
from internlm_mm.engine.building import BuildingRunner
from internlm_mm.engine.held import check_host_memory
from internlm_mm.engine.load_from import Start, base_of, check_base
from internlm_mm.engine.memory_budget import settle_recompute
from internlm_mm.engine.preflight import build_data_part, check_run, check_writable, propose_fit
from internlm_mm.engine.run_state import RunState
from internlm_mm.engine.start import (
    agree,
    check_start,
    check_start_vocabulary,
    choose_start,
    together,
)
from internlm_mm.engine.task_evaluation import check_evaluation
from internlm_mm.parallel.adapters import round_weights
from internlm_mm.parallel.attention import check_packed_rows
from internlm_mm.parallel.context import check_documents
from internlm_mm.registry import RUNNERS, TOKENIZERS
from internlm_mm.utils.config import dump_config
from internlm_mm.utils.flops import FlopsPerToken, model_flops


@RUNNERS.register_module()
class LLMRunner(BuildingRunner):
    """MMEngine's FlexibleRunner without its vision-era assumptions. Stock hooks work in it.

    Every argument is a top-level key of a config.

    Args:
        model: Config of a MODELS member.
        work_dir: Where logs and checkpoints go.
        tokenizer: Config of a TOKENIZERS member; travels with the checkpoints.
        train_dataloader: Config of a DATALOADERS member with its dataset.
        train_cfg: Config of the training loop: length and batch sizes.
        val_dataloader: Config of a loader over held-out data; None where `val_cfg` has tasks alone.
        val_cfg: Config of the evaluation loop.
        optim_wrapper: Config of the optimizer wrapper with its optimizer.
        param_scheduler: Configs of schedules.
        strategy: Config of the strategy: layout, precision, memory.
        default_hooks: Hooks by role, so that a config can replace or drop (None) one.
        custom_hooks: Further hooks.
        load_from: A checkpoint, Hugging Face folder or folder of InternLM's shards whose weights
            to start from; `dict(path=..., content=[...])` takes any of 'model', 'optimizer',
            'data', 'scheduler' of a checkpoint.
        resume: True goes on from the newest whole checkpoint of `work_dir` if there is one; a path
            from there.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.
        env_cfg: `dist_cfg=dict(backend=, timeout=)` and `cudnn_benchmark`.
        log_processor: MMEngine's; used by its stock LoggerHook.
        log_level: Level of the log.
        visualizer: Where curves go; MMEngine's VisBackends by name.
        default_scope: Where bare type names are looked up first.
        randomness: `seed`, `deterministic`.
        experiment_name: Name of the run; the config's by default.
        cfg: The whole config, for the dump.

    Raises:
        ValueError: If parts do not fit together, before anything is allocated.
        PermissionError: If `work_dir` cannot be written.
    """

    def __init__(
        self,
        *,
        model: Any,
        work_dir: str,
        tokenizer: dict | None = None,
        train_dataloader: Any = None,
        train_cfg: dict | None = None,
        val_dataloader: Any = None,
        val_cfg: dict | None = None,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        strategy: Any = None,
        default_hooks: dict | None = None,
        custom_hooks: list | None = None,
        load_from: str | Mapping[str, Any] | None = None,
        resume: str | bool = False,
        launcher: str = 'none',
        env_cfg: dict | None = None,
        log_processor: dict | None = None,
        log_level: str = 'INFO',
        visualizer: Any = None,
        default_scope: str = 'internlm_mm',
        randomness: dict | None = None,
        experiment_name: str | None = None,
        cfg: Config | None = None,
    ) -> None:
        check_writable(Path(work_dir))
        check_evaluation(val_dataloader, val_cfg)
        if val_cfg is not None and val_dataloader is None:
            val_dataloader = {}  # tasks alone; MMEngine wants both
        self.tokenizer: Any = tokenizer and build_data_part(TOKENIZERS, tokenizer, 'tokenizer')
        self.run_state: RunState
        # MMEngine keeps a config here until it has built the part.
        self._train_loop: Any
        self._val_loop: Any
        self.model: Any
        self.optim_wrapper: Any
        self.param_schedulers: Any
        self._has_loaded: bool
        self.flops_per_token: FlopsPerToken | None = None  # of the whole model, before it is cut
        self._start: Start | None = None
        self._taken: list[tuple[Start, Source | None]] = []  # all of it; other programs' opened
        self._base: Base | None = None  # the frozen weights that checkpoints need not hold
        self._is_checked = False
        super().__init__(
            model=model,
            work_dir=work_dir,
            experiment_name=experiment_name,
            train_dataloader=train_dataloader,
            optim_wrapper=optim_wrapper,
            param_scheduler=param_scheduler,
            train_cfg=train_cfg,
            val_dataloader=val_dataloader,
            val_cfg=val_cfg,
            val_evaluator={} if val_cfg is not None else None,
            strategy=strategy or {'type': 'HybridParallelStrategy'},
            default_hooks=default_hooks,
            custom_hooks=custom_hooks,
            load_from=None if isinstance(resume, str) else load_from,  # MMEngine wants one
            resume=resume,
            launcher=launcher,
            env_cfg=env_cfg or {},
            log_processor={'by_epoch': False, **(log_processor or {})},  # there are no epochs
            log_level=log_level,
            visualizer=visualizer,
            default_scope=default_scope,
            randomness=randomness or {'seed': None},
            cfg=cfg,
        )

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'LLMRunner':
        """Build from a checked config; see `internlm_mm.utils.config.check_config`."""
        init_default_scope(cfg.get('default_scope', 'internlm_mm'))
        kept = {k: v for k, v in cfg.items() if k not in ('runner_type', 'custom_imports')}
        with propose_fit(cfg):
            return cls(**kept, cfg=cfg)

    # -------------------------------------------------------------------------------- running

    def train(self) -> torch.nn.Module:
        """Train from the beginning, from a checkpoint or from where the last run stopped."""
        self.prepare_training()
        self.call_hook('before_run')
        model = self.train_loop.run()
        self.run_state.checkpointer.finish()
        self.call_hook('after_run')
        return model

    def prepare_training(self) -> None:
        """Everything before the first step: build, check, place, load."""
        if self._train_loop is None:
            raise ValueError(
                'train needs train_dataloader, train_cfg and optim_wrapper in the config'
            )
        self.model = self.strategy.build_model(self.model)
        self._choose_start(training=True)
        self._keep_seed()
        self._train_loop = self.build_train_loop(self._train_loop)
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
        loaders = {'train_dataloader': self.train_dataloader}
        if self._val_loop is not None and self.val_dataloader is not None:
            loaders['val_dataloader'] = self.val_dataloader
        self._check_data(loaders)
        self.flops_per_token = model_flops(self.model, self.train_dataloader.dataset.seq_len)
        self._prepare(
            optim_wrapper=self.optim_wrapper,
            param_scheduler=self.param_schedulers,
            dispatch_kwargs={'max_iters': self.max_iters},
        )
        self.optim_wrapper = self.strategy.optim_wrapper
        if self.param_schedulers is not None:
            self.param_schedulers = self.strategy.param_schedulers
        self.load_or_resume()

    def val(self) -> dict[str, float]:
        """Evaluate the weights of `load_from` or `resume`, or untrained ones."""
        if self._val_loop is None:
            raise ValueError('val needs val_cfg, and val_dataloader or tasks, in the config')
        self.model = self.strategy.build_model(self.model)
        self._val_loop = self.build_val_loop(self._val_loop)
        self._choose_start(training=False)
        loader = self.val_dataloader
        self._check_data({} if loader is None else {'val_dataloader': loader})
        self._prepare()
        self.load_or_resume()
        self.call_hook('before_run')
        metrics = self.val_loop.run()
        self.call_hook('after_run')
        return metrics

    def _check_data(self, loaders: Mapping[str, Any]) -> None:
        """Whether model, tokenizer and layout fit all rows, and every size of a ramped-up batch."""
        check_run(self.model, loaders, self.tokenizer)
        check_alignment(self.model, loaders, self.strategy.layout, self.hooks, self._val_loop)
        if self._start is not None:
            check_start_vocabulary(self._start, self.tokenizer, loaders, self.logger)
        for key, loader in loaders.items():
            for count in getattr(loader, 'micro_batch_counts', [None]):
                self.strategy.check_fit(self.model, loader.dataset.seq_len, count, key=key)
            techniques, degree = self.strategy.techniques, self.strategy.layout.context
            max_docs = getattr(loader.dataset, 'max_docs', 1)
            check_documents(techniques.context_attention, degree, max_docs, key)
            check_packed_rows(techniques.attention, max_docs, key)

    def _prepare(self, **arguments: Any) -> None:
        training = 'optim_wrapper' in arguments
        settle_recompute(self, training)
        together(lambda: check_host_memory(self, training))
        self._is_checked = True
        self.dump_config()
        self.strategy.prepare(self.model, **arguments)
        self.model = self.strategy.model
        self.run_state = self.strategy.run_state = RunState(self.strategy)
        self.run_state.base = self._base
        if self.tokenizer is not None and self.rank == 0:
            self.tokenizer.save(Path(self.work_dir) / TOKENIZER_FOLDER)

    # ---------------------------------------------------------------------------- checkpoints

    def _choose_start(self, training: bool) -> None:
        """Decide what to load, before anything is allocated. Resume wins. Collective."""
        self._start = choose_start(
            self._resume, self._load_from, self.work_dir, training, self.logger
        )
        if training:
            agree(lambda: check_reference(self._start, self.model))
        if self._start is not None:
            self._taken = [
                (one, check_start(one, self.model, self.cfg, self.logger))
                for one in self._start.chain()
            ]
        self._base = agree(lambda: base_of(self._start, self.model))
        check_base(self._base, self.model, self.hooks)

    def _keep_seed(self) -> None:
        """Go on with the seed of the run that is resumed: it decides the order of the data."""
        if self._start is None or not self._start.random:
            return
        saved, configured = read_state(self._start.path)['seed'], self._randomness_cfg.get('seed')
        if configured is None:
            self.strategy.adopt_seed(saved)
        elif configured != saved:
            self.logger.warning(
                f'randomness.seed={configured} differs from {saved}, which the checkpoint was '
                'trained with: the data goes on in another order'
            )

    def load_or_resume(self) -> None:
        """Load what was chosen, if anything."""
        if self._start is not None and not self._has_loaded:
            for start, source in self._taken:
                self._take(start, source)
        round_weights(self.model)
        self._has_loaded = True

    def _take(self, start: Start, source: Source | None) -> None:
        path, content = start.path, start.content
        if source is not None:
            read = source.weight
            together(lambda: self.run_state.load_weights(read))
            self.logger.info(f'loaded {source.family} from {path}, {source.form}')
            self._take_adapter(start.adapter)
            return
        parts = [part for part in content if part != 'data'] + (['random'] if start.random else [])
        state = self.run_state.load(
            path, parts, lambda state: self.call_hook('after_load_checkpoint', checkpoint=state)
        )
        # Of an evaluation it is still a config.
        loop = None if isinstance(self._train_loop, Mapping) else self._train_loop
        if loop is not None and 'train_loop' in state:
            position = dict(loop.state_dict())
            if 'data' in content:
                position |= {k: state['train_loop'][k] for k in ('rows', 'consumed_tokens')}
            if 'scheduler' in content:
                position['iter'] = state['train_loop']['iter']
            loop.load_state_dict(position)
        where = f' at iteration {self.iter}' if loop is not None else ''
        self.logger.info(f'loaded {", ".join(content)} from {path}{where}')
        self._take_adapter(start.adapter)

    def _take_adapter(self, folder: Path | None) -> None:
        if folder is not None:
            tensors = read_peft(folder)
            together(lambda: self.run_state.load_weights(tensors.__getitem__, adapters=True))
            self.logger.info(f'loaded adapters from {folder}')

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,  # noqa: ARG002  MMEngine's signature
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = False,
        backend_args: dict | None = None,  # noqa: ARG002
    ) -> None:
        """Save `out_dir/filename`, which must be called `iter_N`. Collective.

        Raises:
            ValueError: If the name is another, which no tool would find again.
        """
        expected = f'iter_{self.train_loop.state_dict()["iter"]}'
        if by_epoch or filename != expected:
            raise ValueError(
                f'checkpoint name {filename!r}: folders are called iter_N, here {expected!r}; '
                "set by_epoch=False and filename_tmpl='iter_{}' on the checkpoint hook"
            )
        python_text, json_text = dump_config(self.cfg)
        tokenizer = Path(self.work_dir) / TOKENIZER_FOLDER
        extra = {
            'meta': {'experiment_name': self.experiment_name, **(meta or {})},
            'train_loop': self.train_loop.state_dict(),
            'texts': {'config.py': python_text, 'config.json': json_text},
            'folders': {TOKENIZER_FOLDER: tokenizer} if self.tokenizer is not None else {},
        }
        self.strategy.save_checkpoint(
            os.path.join(out_dir, filename),
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            extra_ckpt=extra,
            callback=lambda state: self.call_hook('before_save_checkpoint', checkpoint=state),
        )

    def dump_config(self) -> None:
        """Write the resolved config into the work dir; training from that file repeats the run.

        MMEngine calls this before anything is checked; it waits until then, so that a start that
        fails leaves the config of an earlier run alone.
        """
        if self.rank == 0 and self._is_checked:
            name = Path(self.cfg.filename).name if self.cfg.filename else f'{self.timestamp}.py'
            (Path(self.work_dir) / name).write_text(dump_config(self.cfg)[0])
