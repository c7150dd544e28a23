"""What one process writes down."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from internlm_mm.utils.config import dump_config
from internlm_mm.verify.compare import Recording
from internlm_mm.verify.worker import RefusedError, holds_first_shard, run_task
from tests.helpers import tiny_config


def task(folder: Path, **changes) -> dict:
    config = tiny_config(folder, train_cfg__max_iters=3, val_dataloader=None, val_cfg=None)
    path = folder / 'config.json'
    path.write_text(dump_config(Config(dict(config._cfg_dict)))[1])
    names = ('embed_tokens.weight', 'lm_head.weight', 'norm.weight')
    layers = [
        f'layers.{layer}.{name}'
        for layer in range(2)
        for name in (
            'input_layernorm.weight', 'post_attention_layernorm.weight',
            'mlp.gate_proj.weight', 'mlp.up_proj.weight', 'mlp.down_proj.weight',
            *(f'self_attn.{p}_proj.{kind}' for p in 'qkvo' for kind in ('weight', 'bias')),
        )
    ]  # fmt: skip
    exponents = dict.fromkeys((*names, *layers), 0) | {'embed_tokens.weight': 3}
    run = folder / 'run'
    run.mkdir()
    return {
        'config': str(path),
        'options': {'strategy': {'type': 'HybridParallelStrategy'}},
        'folder': str(run),
        'exponents': exponents,
        'resume': None,
    } | changes


def test_a_run_is_written_down(tmp_path: Path) -> None:
    asked = task(tmp_path)
    run_task(asked, 'none')
    run = Recording(tmp_path / 'run', 1)
    kinds = {key.partition('/')[0] for key in run.tensors}
    steps = range(3)
    assert kinds == {
        'initial', *(f'gradients.{s}' for s in steps), *(f'weights.{s}' for s in steps),
    }  # fmt: skip
    for kind in kinds:
        names = {key.partition('/')[2] for key in run.tensors if key.startswith(f'{kind}/')}
        assert names == set(asked['exponents'])
    assert [step['step'] for step in run.steps[0]] == [0, 1, 2]
    embedding = run.tensors['initial/embed_tokens.weight'][0]
    assert embedding.std().item() == pytest.approx(8 * 0.0052, rel=0.1)
    norm = sum(t[0].square().sum() for k, t in run.tensors.items() if k.startswith('gradients.1/'))
    assert norm.sqrt().item() == pytest.approx(run.steps[0][1]['gradient norm'], rel=1e-5)
    before, after = (run.tensors[f'weights.{s}/norm.weight'][0] for s in (0, 1))
    assert not torch.equal(before, after)
    assert (tmp_path / 'run' / 'iter_2').is_dir()


def test_a_resumed_run_repeats_the_last_step(tmp_path: Path) -> None:
    asked = task(tmp_path)
    run_task(asked, 'none')
    folder = tmp_path / 'again'
    folder.mkdir()
    resumed = asked | {'folder': str(folder), 'resume': str(tmp_path / 'run' / 'iter_2')}
    run_task(resumed, 'none')
    first, second = Recording(tmp_path / 'run', 1), Recording(folder, 1)
    assert second.steps[0] == first.steps[0][2:]
    for key, (tensor,) in second.tensors.items():
        if not key.startswith('initial/'):
            assert torch.equal(tensor, first.tensors[key][0])
    assert not (folder / 'iter_3').exists()
    assert json.loads((folder / '0.json').read_text())[0]['step'] == 2


def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    wrong = {'strategy': {'type': 'HybridParallelStrategy', 'parallel': {'data_shard': 3}}}
    with pytest.raises(RefusedError, match='data_shard'):
        run_task(task(tmp_path, options=wrong), 'none')


def first_shards() -> list[bool]:
    """On each of two ranks: who writes a plain tensor, a whole one, a cut one, a sum."""
    mesh = init_device_mesh('cpu', (2,))
    tensor = torch.ones(4)
    placed = [distribute_tensor(tensor, mesh, [p]) for p in (Replicate(), Shard(0))]
    part = torch.distributed.tensor.DTensor.from_local(tensor, mesh, [Partial()])
    return [holds_first_shard(t) for t in (tensor, *placed, part)]


def test_each_copy_is_written_by_one_rank(two_ranks) -> None:
    assert two_ranks(first_shards) == [[True, True, True, True], [True, True, False, False]]
