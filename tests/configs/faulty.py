"""The tiny run with a trace, a checkpoint after every step, and room for a fault."""

from mmengine.config import read_base

with read_base():
    from .tiny import *

custom_imports = dict(imports=['tests.faults'])
train_cfg.update(max_iters=8)
val_dataloader = None
val_cfg = None
custom_hooks = [dict(type='TraceHook'), dict(type='FaultHook')]
default_hooks.update(checkpoint=dict(type='StepCheckpointHook', interval=1))
visualizer = dict(type='ScalarVisualizer', vis_backends=[dict(type='LocalVisBackend')])
env_cfg = dict(dist_cfg=dict(timeout=60))
