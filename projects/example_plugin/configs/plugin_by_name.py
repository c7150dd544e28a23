"""The same run with the plugin's parts named by strings; `custom_imports` registers them.

PYTHONPATH=projects/example_plugin python tools/train.py \
    projects/example_plugin/configs/plugin_by_name.py
"""

from mmengine.config import read_base

with read_base():
    from .plugin_pretrain import *

custom_imports = dict(
    imports=['my_plugin.dataset', 'my_plugin.hook', 'my_plugin.model', 'my_plugin.optim_wrapper']
)
model.update(type='ParallelDecoder')
train_dataloader.dataset.update(type='FolderBytes')
optim_wrapper.update(type='CautiousOptimWrapper')
custom_hooks = [dict(type='UpdateRatioHook', interval=10)]
