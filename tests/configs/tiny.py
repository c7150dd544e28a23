"""The smallest run that has every part: six steps of a two-layer InternLM on random tokens."""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.default_runtime import *
    from internlm_mm.configs._base_.models.internlm_tiny import *
    from internlm_mm.configs._base_.schedules.adamw_cosine import *

from internlm_mm.datasets import EvalLoader, RandomTokens, TokenLoader
from internlm_mm.engine import PerplexityLoop, TokenTrainLoop

model.update(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    max_seq_len=64,
)
_data = dict(type=RandomTokens, vocab_size=64, seq_len=32, document_lengths=[5, 9, 14])
train_dataloader = dict(type=TokenLoader, dataset=_data)
train_cfg = dict(type=TokenTrainLoop, max_iters=6, global_batch_size=4, micro_batch_size=2)
val_dataloader = dict(
    type=EvalLoader,
    dataset=dict(type=RandomTokens, vocab_size=64, seq_len=32, num_rows=6, seed=7),
    micro_batch_size=2,
)
val_cfg = dict(type=PerplexityLoop)
optim_wrapper.optimizer.update(lr=1e-2)
param_scheduler[0].update(warmup=2)
default_hooks.update(checkpoint=None)
for _name in ('throughput', 'run_info', 'progress'):
    default_hooks[_name].update(interval=2)
visualizer.update(
    vis_backends=visualizer['vis_backends'][:1]
)  # TensorBoard takes a second to import
