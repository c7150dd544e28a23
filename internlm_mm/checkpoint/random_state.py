"""The state of a process's random generators, as tensors that a checkpoint can hold."""

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """State of this process's random generators, as uint8 tensors."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy_state
    text = json.dumps(
        {
            'python': [version, list(internal), gauss],
            'numpy': [kind, keys.tolist(), position, has_gauss, cached],
        }
    )
    state = {
        'python': torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Undo of `random_state`."""
    content = json.loads(bytes(state['python'].tolist()))
    version, internal, gauss = content['python']
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = content['numpy']
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
