"""Differences, tolerances and cells, over numbers written by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from internlm_mm.verify.compare import (
    MISSING,
    Recording,
    _largest_of_kind,
    bitwise_differences,
    bounds_of,
    differences,
    distance,
    initial_differences,
    judge,
)
from internlm_mm.verify.reference import Reference

A, B = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0, 2.0])


def reference() -> Reference:
    return Reference(
        names=['a', 'b'],
        exponents={},
        initial={'a': A.double() / 2, 'b': B.double()},
        max_norm=1.0,
        eps=1.0,
        losses=[2.0, 1.0],
        norms=[4.0, 5.0],
        gradients=[{'a': A.double(), 'b': B.double()}] * 2,
        weights=[{'a': A.double(), 'b': 2 * B.double()}] * 2,
    )


def record(folder: Path, steps=(0, 1), ranks: int = 2, **changes) -> Recording:
    """What each rank writes when all is right, but for `changes`; None leaves something out."""
    folder.mkdir(exist_ok=True)
    tensors = {'initial/a': A / 2, 'initial/b': B}
    for step in steps:
        tensors |= {f'gradients.{step}/a': A, f'gradients.{step}/b': B}
        tensors |= {f'weights.{step}/a': A, f'weights.{step}/b': 2 * B}
    for rank in range(ranks):
        own = dict(tensors)
        if rank == ranks - 1:
            own |= {key: value for key, value in changes.items() if '/' in key}
        numbers = [
            {'step': s, 'loss': [2.0, 1.0][s], 'gradient norm': changes.get('norm', [4.0, 5.0][s])}
            for s in steps
        ]
        kept = {key: value.clone() for key, value in own.items() if value is not None}
        save_file(kept, folder / f'{rank}.safetensors')
        (folder / f'{rank}.json').write_text(json.dumps(numbers))
    return Recording(folder, ranks)


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    run = record(tmp_path)
    found = differences(run, reference())
    assert {check: max(values.values()) for check, values in found.items()} == {
        'loss': 0, 'norm': 0, 'gradients': 0, 'weights': 0,
    }  # fmt: skip
    assert len(found['gradients']) == len(found['weights']) == 4
    assert set(initial_differences(run, reference()).values()) == {0}
    assert set(bitwise_differences(run, run).values()) == {0}


def test_a_copy_on_the_last_rank_counts(tmp_path: Path) -> None:
    changes = {'gradients.1/a': torch.tensor([3.0, 5.0])}
    found = differences(record(tmp_path, **changes), reference())
    assert found['gradients'] == {
        'a in step 0': 0, 'b in step 0': 0, 'a in step 1': pytest.approx(0.2), 'b in step 1': 0,
    }  # fmt: skip
    assert max(found['weights'].values()) == 0


@pytest.mark.parametrize('wrong', [None, torch.tensor([1.0]), torch.tensor([float('nan'), 4.0])])
def test_what_is_not_there_is_as_far_as_can_be(tmp_path: Path, wrong) -> None:
    found = differences(record(tmp_path, ranks=1, **{'gradients.0/a': wrong}), reference())
    assert found['gradients']['a in step 0'] == MISSING
    cell = judge('x', 'gradients', found['gradients'], 1e-9)
    assert (cell.passed, cell.parameter, cell.difference) == (False, 'a', MISSING)
    json.dumps(cell.difference, allow_nan=False)


def test_every_rank_has_the_same_loss_and_norm(tmp_path: Path) -> None:
    found = differences(record(tmp_path, norm=4.4), reference())
    assert found['norm'] == {'step 0': pytest.approx(0.1), 'step 1': pytest.approx(0.12)}
    assert max(found['loss'].values()) == 0


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    run = record(tmp_path / 'one')
    near = torch.nextafter(A, torch.tensor(9.0))
    other = record(tmp_path / 'two', steps=(1,), **{'weights.1/a': near})
    found = bitwise_differences(other, run)
    assert 0 < found['a'] < 1e-6
    cell = judge('x', 'same resume', found, 0.0)
    assert not cell.passed and cell.parameter == 'a'


def test_distance_of_what_should_be_zero() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert distance([torch.zeros(2)], zero) == 0
    assert distance([torch.ones(2)], zero) == MISSING


def test_the_first_in_order_is_named_and_the_largest_told() -> None:
    found = {'a in step 0': 1e-12, 'b in step 0': 1e-3, 'c in step 0': 0.5}
    cell = judge('x', 'gradients', found, 1e-9)
    assert (cell.parameter, cell.difference, cell.max_relative_difference) == ('b', 1e-3, 0.5)
    assert cell.detail == 'b in step 0'
    assert judge('x', 'gradients', found, 0.5).passed
    assert judge('x', 'loss', {'step 0': 1.0}, 0.5, named=False).parameter is None
    assert not judge('x', 'gradients', {}, 1.0).passed  # nothing was compared


def test_wide_precisions_have_one_tolerance() -> None:
    single = {'loss': {'step 0': 0.0}, 'gradients': {'a in step 0': 4e-6, 'b in step 0': 3e-5}}
    assert bounds_of('float64', None, reference()) == 1e-9
    assert bounds_of('float64', single, reference()) == 1e-9
    assert bounds_of('float32', single, reference()) == {
        'loss': {'step 0': 1e-5},
        'gradients': {'a in step 0': 1e-5, 'b in step 0': pytest.approx(6e-5)},
    }


def test_one_process_has_limits_of_its_own() -> None:
    assert bounds_of('float32', None, reference()) == 1e-4
    assert (
        bounds_of('bfloat16', None, reference()) == bounds_of('float16', None, reference()) == 0.5
    )


def test_half_precision_is_bounded_by_one_process() -> None:
    steps = ('in step 0', 'in step 1')
    single = {
        'loss': {'step 0': 0.0, 'step 1': 0.01},
        'norm': {'step 0': 0.0, 'step 1': 0.0},
        'gradients': {f'{n} {s}': v for s in steps for n, v in (('a', 0.03), ('b', 0.01))},
        'weights': {f'{n} {s}': v for s in steps for n, v in (('a', 0.02), ('b', 0.001))},
    }
    bounds = bounds_of('bfloat16', single, reference())
    assert isinstance(bounds, dict)
    assert bounds['loss'] == {'step 0': 2 * 2**-8, 'step 1': 0.02}  # one rounding of 8 bits
    # a's gradient is 5 long and 3 % off, b's is 2 long and 1 % off.
    whole = ((5 * 0.03) ** 2 + (2 * 0.01) ** 2) ** 0.5
    assert bounds['norm'] == {
        'step 0': pytest.approx(2 * whole / 4), 'step 1': pytest.approx(2 * whole / 5),
    }  # fmt: skip
    assert bounds['gradients']['a in step 0'] == pytest.approx(0.06)
    assert bounds['gradients']['b in step 0'] == pytest.approx(0.06)  # the upper median
    # The same parameter of another layer is another draw.
    layers = {'layers.0.k in step 0': 0.01, 'layers.1.k in step 1': 0.3, 'b in step 0': 0.02}
    assert _largest_of_kind(layers) == {
        'layers.0.k in step 0': 0.3, 'layers.1.k in step 1': 0.3, 'b in step 0': 0.02,
    }  # fmt: skip
    # Short parameters are compared with all of their sort.
    biases = {
        'layers.0.q.bias in step 0': 0.01,
        'layers.0.k.bias in step 1': 0.3,
        'w in step 0': 0.1,
    }
    assert _largest_of_kind(biases) == {**biases, 'layers.0.q.bias in step 0': 0.3}
    # Both have moved by half of what they are: 4 % and 0.2 % of the way; the upper median is 4 %.
    assert bounds['weights']['a in step 1'] == pytest.approx(0.04)
    assert bounds['weights']['b in step 1'] == pytest.approx(0.04)
