"""Strategies to test parts of the package with."""

import shutil
import tempfile
from multiprocessing.util import Finalize

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


def scratch_folder() -> str:
    """A folder that goes with its process, also with one that `multiprocessing` started."""
    folder = tempfile.mkdtemp()
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={'ignore_errors': True}, exitpriority=0)
    return folder


def strategy(**options) -> HybridParallelStrategy:
    folder = scratch_folder()
    options.setdefault('env_kwargs', {'launcher': 'none', 'randomness': {'seed': 3}})
    return HybridParallelStrategy(
        work_dir=folder,
        experiment_name=folder.replace('/', '_'),
        log_kwargs={'log_level': 'WARNING'},
        **options,
    )
