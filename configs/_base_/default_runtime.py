"""What every run has: the runner, its hooks, where curves go, the seed."""

from mmengine.hooks import ParamSchedulerHook
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend

from internlm_mm.engine import LLMRunner, ScalarVisualizer
from internlm_mm.engine.hooks import (
    GarbageCollectionHook,
    ProgressHook,
    RunInfoHook,
    StepCheckpointHook,
    ThroughputHook,
)
from internlm_mm.parallel import HybridParallelStrategy

runner_type = LLMRunner
default_scope = 'internlm_mm'
strategy = dict(type=HybridParallelStrategy)
default_hooks = dict(
    throughput=dict(type=ThroughputHook, interval=10),  # tokens/s, TFLOP/s, MFU
    run_info=dict(type=RunInfoHook, interval=10),  # for MMEngine's own hooks
    progress=dict(type=ProgressHook, interval=10),  # the line on the screen, and the curves
    param_scheduler=dict(type=ParamSchedulerHook),  # moves the learning rate
    checkpoint=dict(type=StepCheckpointHook, interval=1000, keep_last=3),
    gc=dict(type=GarbageCollectionHook, interval=100),  # all ranks pause at the same step
)
custom_hooks = []  # MemoryHook and TorchProfilerHook look at a few steps: append one to measure
visualizer = dict(
    type=ScalarVisualizer,
    vis_backends=[dict(type=LocalVisBackend), dict(type=TensorboardVisBackend)],
)
randomness = dict(seed=1024)
env_cfg = dict(dist_cfg=dict(timeout=1800))  # seconds until a rank that waits gives up
log_level = 'INFO'
load_from = None
resume = False
