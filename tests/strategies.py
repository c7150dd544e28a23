"""Strategies to test parts of the package with."""

import atexit
import shutil
import tempfile

from torch.optim import AdamW

from internlm_mm.models import InternLM
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper
from internlm_mm.parallel import HybridParallelStrategy

MODEL = dict(
    type=InternLM, vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
)
OPTIM = dict(
    type=HybridZeroOptimWrapper,
    constructor=DecayGroupsConstructor,
    optimizer=dict(type=AdamW, lr=0.1),
)


def strategy(**options) -> HybridParallelStrategy:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options.setdefault('env_kwargs', {'launcher': 'none', 'randomness': {'seed': 3}})
    return HybridParallelStrategy(
        work_dir=folder,
        experiment_name=folder.replace('/', '_'),
        log_kwargs={'log_level': 'WARNING'},
        **options,
    )
