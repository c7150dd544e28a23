"""One hook a file. A hook reads and writes the `outputs` it is handed."""

from internlm_mm.engine.hooks.checkpoint_hook import StepCheckpointHook
from internlm_mm.engine.hooks.evaluation_hook import EvaluationHook
from internlm_mm.engine.hooks.gc_hook import GarbageCollectionHook
from internlm_mm.engine.hooks.memory_hook import MemoryHook
from internlm_mm.engine.hooks.progress_hook import ProgressHook
from internlm_mm.engine.hooks.reference_hook import ReferenceHook
from internlm_mm.engine.hooks.run_info_hook import RunInfoHook
from internlm_mm.engine.hooks.throughput_hook import ThroughputHook
from internlm_mm.engine.hooks.torch_profiler_hook import TorchProfilerHook

__all__ = [
    'EvaluationHook',
    'GarbageCollectionHook',
    'MemoryHook',
    'ProgressHook',
    'ReferenceHook',
    'RunInfoHook',
    'StepCheckpointHook',
    'ThroughputHook',
    'TorchProfilerHook',
]
