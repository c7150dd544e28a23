"""The fine-tuned model, by DPO with adapters, towards answers in brackets."""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.datasets.preferences import *
    from internlm_mm.configs._base_.schedules.adamw_finetune import *

    from ._base_.small_model import *

from internlm_mm.engine import PreferenceLoop
from internlm_mm.engine.hooks import EvaluationHook
from internlm_mm.models import DPO, LoRA

model.update(
    adapter=dict(type=LoRA, rank=16, alpha=32.0),
    # Without the answer's own loss the model soon forgets what it answers.
    objective=dict(type=DPO, beta=0.3, reference='adapters_off', sft_weight=1.0),
)
train_dataloader.dataset.update(seq_len=128)
train_dataloader.update(num_workers=0)
val_dataloader.dataset.update(seq_len=128)
val_dataloader.update(micro_batch_size=16)
train_cfg.update(max_iters=100)
val_cfg = dict(type=PreferenceLoop)
optim_wrapper.optimizer.update(lr=3e-4)
param_scheduler[0].update(warmup=10)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=20, at_start=True))
default_hooks.checkpoint.update(interval=20, keep_last=None, save_optimizer=False)
