"""Two GPUs over NCCL, compiled, in bf16: as close to float64 as one of them is, twice at most.

`make test-gpu` runs it where there are two. The judge is that of `tools/verify_parallel.py`.
"""

import json
from pathlib import Path

import pytest
import torch

from internlm_mm.verify.cli import main
from tests.helpers import TINY

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices'),
]

PACKED = [
    'data_shard=2',
    'data_shard=2,reshard=layer',
    'data_shard=2,reshard=never',
    'data_replicate=2',
    'tensor=2',
    'pipeline=2,schedule=1f1b',
    'pipeline=2,schedule=interleaved_1f1b',
    'context=2',
]
DENSE = ['data_shard=2', 'context=2', 'context=2,context_attention=ring']


def verify(path: Path, layouts: list[str], device: str, *options: str) -> dict:
    arguments = [str(TINY), '--layouts', *layouts, '--device', device, '--json', str(path)]
    half = ['--precision', 'bfloat16', '--processes', '2']
    # Wide enough for the kernels: a head of 16 numbers is the least that all of them take.
    sizes = ['model.num_heads=2', 'model.intermediate_size=48', *options]
    code = main([*arguments, *half, '--cfg-options', *sizes])
    report = json.loads(path.read_text())
    assert code == (not report['passed'])
    return report


@pytest.mark.parametrize('rows', ['packed', 'dense'])
def test_two_gpus_train_as_one(tmp_path: Path, rows: str) -> None:
    layouts = PACKED if rows == 'packed' else DENSE
    options = ['strategy.compile=True']
    if rows == 'dense':
        options.append('train_dataloader.dataset.document_lengths=None')
    report = verify(tmp_path / 'cells.json', layouts, 'cuda', *options)
    assert [cell for cell in report['cells'] if not cell['passed']] == []
    assert not report['skipped'] and not report['errors']
    assert {cell['layout'] for cell in report['cells']} == {'one process', *layouts}
    assert {cell['check'] for cell in report['cells']} > {'loss', 'gradients', 'weights'}
