"""Bytes by module and kind, against bytes counted by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.two_tensor import TwoTensor

from internlm_mm.engine.hooks import MemoryHook
from internlm_mm.engine.hooks.memory_hook import (
    KINDS,
    _storage_bytes,
    memory_table,
    memory_tree,
    readable,
)
from tests.helpers import tiny_runner

HIDDEN, INNER, VOCAB, LAYERS = 32, 48, 64, 2
EMBEDDING = VOCAB * HIDDEN
ATTENTION = 4 * (HIDDEN * HIDDEN + HIDDEN)  # q, k, v and o with biases
MLP = 3 * HIDDEN * INNER
LAYER = ATTENTION + MLP + 2 * HIDDEN
TOTAL = 2 * EMBEDDING + LAYERS * LAYER + HIDDEN
TENSORS = 2 + LAYERS * (8 + 3 + 2) + 1


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(work_dir: Path, hook: dict, **changes) -> dict:
    runner = tiny_runner(work_dir, custom_hooks=[dict(type='MemoryHook', **hook)], **changes)
    runner.train()
    (file,) = work_dir.glob('*/memory_rank0.json')
    return json.loads(file.read_text())


def node(tree: dict, *names: str) -> dict:
    for name in names:
        (tree,) = [child for child in tree['children'] if child['name'] == name]
    return tree


def test_parameters_gradients_and_adamw_by_hand(tmp_path: Path) -> None:
    report = measure(tmp_path, dict(depth=3))
    assert report['iteration'] == 2 and report['device'] == 'cpu'
    assert report['bytes']['parameters'] == report['bytes']['gradients'] == 4 * TOTAL
    # Two moments, and a step count of four bytes for every tensor.
    assert report['bytes']['optimizer'] == 4 * (2 * TOTAL + TENSORS)
    assert report['bytes']['gathered_parameters'] == report['bytes']['gathered_gradients'] == 0
    tree = report['modules']
    assert node(tree, 'embed_tokens')['parameters'] == 4 * EMBEDDING
    assert node(tree, 'layers')['gradients'] == 4 * LAYERS * LAYER
    assert node(tree, 'layers', '1', 'self_attn')['parameters'] == 4 * ATTENTION
    assert node(tree, 'layers', '1', 'mlp')['optimizer'] == 4 * (2 * MLP + 3)
    assert node(tree, 'layers', '0', 'input_layernorm')['parameters'] == 4 * HIDDEN


def test_activations_by_hand_where_a_formula_exists(tmp_path: Path) -> None:
    tree = measure(tmp_path, dict(depth=3))['modules']
    rows, seq = 2, 32  # one micro-batch
    # gate, up, silu's result, their product and the input: SwiGLU keeps at most these.
    widest = 4 * rows * seq * (4 * INNER + HIDDEN)
    assert 4 * rows * seq * 3 * INNER <= node(tree, 'layers', '0', 'mlp')['activations'] <= widest
    assert node(tree, 'embed_tokens')['activations'] == 8 * rows * seq  # the token ids
    assert node(tree, 'lm_head')['activations'] == 0  # the objective reads its weight
    total = sum(child['activations'] for child in tree['children'])
    assert tree['activations'] == total


def test_recomputation_shows(tmp_path: Path) -> None:
    tree = measure(tmp_path, dict(depth=2), strategy__recompute=0.5)['modules']
    assert node(tree, 'layers', '0')['activations'] < 0.2 * node(tree, 'layers', '1')['activations']


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    weights = []
    for hooks in ([], [dict(type='MemoryHook')]):
        runner = tiny_runner(tmp_path / str(len(hooks)), custom_hooks=hooks)
        runner.train()
        weights.append({k: v.clone() for k, v in runner.model.state_dict().items()})
        for module in runner.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_step_that_is_passed_over_is_not_measured(tmp_path: Path) -> None:
    report = measure(tmp_path, dict(at_iter=1), train_cfg__skip_batches=[(1, 2)])
    assert report['iteration'] == 4
    assert report['bytes']['gradients'] == 4 * TOTAL


def test_a_step_that_never_comes_is_said(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, custom_hooks=[dict(type='MemoryHook', at_iter=6)])
    runner.train()
    assert 'at_iter=6 was not reached' in next(tmp_path.glob('*/*.log')).read_text()
    assert not list(tmp_path.glob('*/memory*'))


def test_mixed_precision_holds_gathered_copies(tmp_path: Path, no_process_group: None) -> None:
    precision = dict(param='bfloat16', reduce='float32')
    report = measure(tmp_path, dict(), strategy__precision=precision)
    assert report['bytes']['parameters'] == 4 * TOTAL  # masters
    assert report['bytes']['gathered_parameters'] == 2 * TOTAL
    assert report['bytes']['gathered_gradients'] == 4 * TOTAL  # of the first of two micro-batches


def test_an_evaluation_hides_no_optimizer_state(tmp_path: Path, no_process_group: None) -> None:
    """It comes between the update and the look, and leaves gathered parameters behind."""
    changes = dict(strategy__precision=dict(param='bfloat16'))
    evaluation = dict(type='EvaluationHook', interval=1)
    report = measure(tmp_path, dict(), default_hooks__evaluation=evaluation, **changes)
    assert report['bytes']['optimizer'] == 2 * (4 * TOTAL) + 4 * TENSORS


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, custom_hooks=[dict(type='MemoryHook', at_iter=0)])

    def fail(*_) -> None:
        raise FloatingPointError('backward')

    runner.strategy.forward_backward = fail
    with pytest.raises(FloatingPointError):
        runner.train()
    for module in runner.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def train_on_a_rank(work_dir: str) -> None:
    changes = dict(train_cfg__max_iters=2, train_cfg__global_batch_size=8)
    hook = dict(type='MemoryHook', ranks=None)
    tiny_runner(Path(work_dir), custom_hooks=[hook], default_hooks={}, **changes).train()


def test_two_ranks_hold_half_each(two_ranks, tmp_path: Path) -> None:
    two_ranks(train_on_a_rank, str(tmp_path))
    files = sorted(tmp_path.glob('*/memory_rank?.json'))
    reports = [json.loads(file.read_text()) for file in files]
    assert [report['rank'] for report in reports] == [0, 1]
    for kind in ('parameters', 'gradients'):
        assert [report['bytes'][kind] for report in reports] == [2 * TOTAL] * 2
    for report in reports:
        assert report['bytes']['optimizer'] == 2 * (2 * TOTAL) + 4 * TENSORS
        assert report['bytes']['gathered_parameters'] == 4 * TOTAL
        assert report['bytes']['gathered_gradients'] == 4 * TOTAL


def test_tree_adds_up_to_its_depth() -> None:
    found = {
        'parameters': {'a.0.x.weight': 1, 'a.1.weight': 2, 'top': 4},
        'activations': {'': 8, 'a.0.x': 16},
    }
    tree = memory_tree(found, depth=2)
    assert tree['parameters'] == 7 and tree['activations'] == 24
    assert node(tree, 'a')['parameters'] == 3
    assert node(tree, 'a', '0')['activations'] == 16
    assert node(tree, 'a', '0')['children'] == []


def test_table_joins_neighbours_that_are_alike() -> None:
    sizes = {f'layers.{i}.weight': 2048 if i < 3 else 512 for i in range(5)}
    lines = memory_table(memory_tree({'parameters': sizes}, depth=2))
    assert [line.split('  ')[0] for line in lines] == ['module', 'model', '', '', '']
    assert lines[3].split() == ['0', 'to', '2,', 'each', '2.00', 'KiB', '-', '-', '-']
    assert lines[4].split() == ['3', 'to', '4,', 'each', '512', 'B', '-', '-', '-']
    assert 'gathered' not in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert set(KINDS) <= memory_tree({}, 1).keys()


def test_readable_sizes() -> None:
    sizes = [0, 1023, 1024, 1536 * 1024**2, 5 * 1024**5]
    assert [readable(size) for size in sizes] == [
        '0 B',
        '1023 B',
        '1.00 KiB',
        '1.50 GiB',
        '5120.00 TiB',
    ]


@pytest.mark.parametrize(('option', 'value'), [('at_iter', -1), ('depth', 0)])
def test_wrong_options(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f'MemoryHook: {option}={value}'):
        MemoryHook(**{option: value})


def test_a_wrapper_has_the_bytes_of_what_it_wraps() -> None:
    """As weights that are gathered in 8 bits do, which say that they are of bfloat16."""
    narrow, scale = torch.zeros(6, 4, dtype=torch.uint8), torch.zeros(6, 4, dtype=torch.uint8)
    wrapper = TwoTensor(narrow, scale)
    assert _storage_bytes(wrapper) == 2 * 24
    assert _storage_bytes(TwoTensor(wrapper, narrow)) == 3 * 24
    assert _storage_bytes(narrow[:2]) == 24
