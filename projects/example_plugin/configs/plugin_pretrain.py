"""Pre-train the plugin's model on the bytes of Python files, with the plugin's other parts.

PYTHONPATH=projects/example_plugin python tools/train.py \
    projects/example_plugin/configs/plugin_pretrain.py
4096 bytes a step. Importing a class here registers it: nothing else is needed.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.default_runtime import *
    from internlm_mm.configs._base_.schedules.adamw_cosine import *

from my_plugin.dataset import FolderBytes
from my_plugin.hook import UpdateRatioHook
from my_plugin.model import ParallelDecoder
from my_plugin.optim_wrapper import CautiousOptimWrapper

from internlm_mm.datasets import TokenLoader
from internlm_mm.engine import TokenTrainLoop

model = dict(
    type=ParallelDecoder,
    vocab_size=256,
    hidden_size=128,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    max_seq_len=256,
)
_data = dict(type=FolderBytes, data_root='.', suffixes=['.py'], seq_len=256)
train_dataloader = dict(type=TokenLoader, dataset=_data)
train_cfg = dict(type=TokenTrainLoop, max_iters=200, global_batch_size=16, micro_batch_size=16)
optim_wrapper.update(type=CautiousOptimWrapper)
optim_wrapper.optimizer.update(lr=2e-3)
param_scheduler[0].update(warmup=20)
custom_hooks = [dict(type=UpdateRatioHook, interval=10)]
