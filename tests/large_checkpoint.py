"""Checkpoints of any size, written shard by shard, and the memory that converting them takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internlm_mm.checkpoint.disk import write_file
from internlm_mm.checkpoint.step_folders import CONFIG_FILE, MANIFEST_FILE, STATE_FILE
from internlm_mm.checkpoint.storage import METADATA_FILE, write_safetensors
from internlm_mm.models import InternLM

CONVERT = """
import sys
from internlm_mm.__main__ import main
code = main(sys.argv[1:])
status = open('/proc/self/status').read()
print('peak', next(int(line.split()[1]) for line in status.splitlines() if 'VmHWM' in line))
sys.exit(code)
"""


def write_checkpoint(
    path: Path, ranks: int, family: type[nn.Module] = InternLM, **sizes: Any
) -> int:
    """A checkpoint as `ranks` ranks of FSDP2 write it, weights only; one rank's in memory.

    Returns:
        Parameters of the model.
    """
    path.mkdir(parents=True)
    with torch.device('meta'):
        model = family(**sizes)
    tensors: dict[str, dict] = {}
    files = {}
    for rank in range(ranks):
        generator = torch.Generator().manual_seed(rank)
        shard = {}
        for name, parameter in model.named_parameters():
            rows = -(-parameter.shape[0] // ranks)
            start = min(rank * rows, parameter.shape[0])
            shape = (min(rows, parameter.shape[0] - start), *parameter.shape[1:])
            if not shape[0]:
                continue
            part = torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)
            shard[f'model.{name}'] = part + 1 if 'norm' in name else part
            entry = {'dtype': 'float32', 'shape': list(parameter.shape), 'chunks': []}
            tensors.setdefault(f'model.{name}', entry)['chunks'].append(
                {
                    'offsets': [start] + [0] * (parameter.ndim - 1),
                    'sizes': list(shape),
                    'file': f'shard_{rank}.safetensors',
                    'key': f'model.{name}',
                }
            )
        name = f'shard_{rank}.safetensors'
        files[name] = write_safetensors(path / name, shard.items())
    config = {'model': {'type': family.__name__, **sizes}}
    for name, content in (
        (METADATA_FILE, {'version': 1, 'tensors': tensors}),
        (STATE_FILE, {}),
        (CONFIG_FILE, config),
    ):
        files[name] = write_file(path / name, json.dumps(content).encode())
    manifest = {name: {'size': size, 'crc32': crc} for name, (size, crc) in files.items()}
    write_file(path / MANIFEST_FILE, json.dumps({'files': manifest}).encode())
    return sum(parameter.numel() for parameter in model.parameters())


def peak(*arguments: str | Path) -> int:
    """Bytes that a conversion had in memory at most, mapped files included.

    Args:
        arguments: A command of `python -m internlm_mm`.
    """
    argv = [sys.executable, '-c', CONVERT, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split('peak ')[1])


def export_peak(checkpoint: Path, out: Path, *options: str) -> int:
    """`peak` of an export in bfloat16."""
    return peak('convert2hf', checkpoint, out, '--dtype', 'bfloat16', *options)
