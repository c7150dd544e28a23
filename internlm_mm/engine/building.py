"""How a runner builds the loaders and hooks of a config, and what it tells of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner, Priority

from internlm_mm.engine.preflight import build_data_part
from internlm_mm.engine.stock_hooks import check_hook
from internlm_mm.registry import DATALOADERS, DATASETS, HOOKS


class BuildingRunner(FlexibleRunner):
    """MMEngine's FlexibleRunner, whose loaders and hooks are those of language models.

    Attributes:
        tokenizer: The run's, built; None where data is tokenised already.
    """

    tokenizer: Any

    def build_token_loader(
        self,
        loader: Any,
        global_batch_size: int,
        micro_batch_size: int,
        rampup: Mapping[str, int] | None,
    ) -> Any:
        """The training loader, told this rank's share. Called by the training loop."""
        return self._build_loader(
            loader,
            'train_dataloader',
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rampup=rampup,
        )

    def build_eval_loader(self, loader: Any) -> Any:
        """A loader that passes once over held-out data. Called by the evaluation loop."""
        return self._build_loader(loader, 'val_dataloader')

    def _build_loader(self, loader: Any, key: str, **options: Any) -> Any:
        if not isinstance(loader, dict):
            return loader
        config = dict(loader)
        if isinstance(config['dataset'], dict):
            config['dataset'] = build_data_part(
                DATASETS, config['dataset'], f'{key}.dataset', self.tokenizer, seed=self.seed
            )
        return DATALOADERS.build(
            config,
            default_args={
                'data_rank': self.strategy.data_rank,
                'data_world_size': self.strategy.data_world_size,
                'pin_memory': self.strategy.device.type == 'cuda',
                **options,
            },
        )

    def get_hooks_info(self) -> str:
        """The hooks in their order, a line; MMEngine logs this when the runner is built."""
        return '  ' + ' -> '.join(type(hook).__name__ for hook in self.hooks)

    def _log_env(self) -> None:
        """Keep what the run ran on and with beside its log; the screen is for progress."""
        if self.rank != 0:
            return
        system, runtime = self.strategy.collect_env()
        lines = [f'{key}: {value}' for part in (system, runtime) for key, value in part.items()]
        Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        (Path(self.log_dir) / 'environment.txt').write_text('\n'.join(lines) + '\n')
        self.logger.info(
            f'{self.world_size} process{"es" if self.world_size > 1 else ""} on '
            f'{self.strategy.device.type}, '
            f'seed {self.seed}, work dir {self.work_dir}'
        )

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the config's hooks by role; MMEngine's own defaults are for images."""
        for hook in (hooks or {}).values():
            if hook is not None:
                self.register_hook(hook)

    def register_hook(
        self, hook: Hook | dict, priority: int | str | Priority | None = None
    ) -> None:
        """Register a hook, of ours or MMEngine's.

        Raises:
            ValueError: If it is a stock hook that cannot work here; names what to use instead.
        """
        if isinstance(hook, dict):
            config = dict(hook)
            priority = config.pop('priority', None) if priority is None else priority
            hook = HOOKS.build(config)
        check_hook(hook)
        super().register_hook(hook, priority)
