"""What every run has: the runner, its hooks, where curves go, the seed."""

from mmengine.hooks import ParamSchedulerHook
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend

from internlm_mm.engine import LLMRunner, ScalarVisualizer
from internlm_mm.engine.hooks import (
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
    throughput=dict(type=ThroughputHook, interval=10),
    run_info=dict(type=RunInfoHook, interval=10),  # for MMEngine's own hooks
    progress=dict(type=ProgressHook, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=StepCheckpointHook, interval=1000, keep_last=3),
)
custom_hooks = []
visualizer = dict(
    type=ScalarVisualizer,
    vis_backends=[dict(type=LocalVisBackend), dict(type=TensorboardVisBackend)],
)
randomness = dict(seed=1024)
env_cfg = dict(dist_cfg=dict(timeout=1800))  # seconds until a rank that waits gives up
log_level = 'INFO'
load_from = None
resume = False
