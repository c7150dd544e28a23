"""What a run wrote down against the reference: relative differences, tolerances, cells."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from internlm_mm.verify.reference import Reference

TOLERANCE = {'float64': 1e-9, 'float32': 1e-5}
"""Largest relative difference: rounding of sums in another order, with room for long sums."""

LIMIT_OF_ONE = {'float64': 1e-9, 'float32': 1e-4, 'bfloat16': 0.5, 'float16': 0.5}
"""Largest relative difference of one process, which is the measure of rounding for the layouts.

Gradients that nearly cancel (a key's bias: attention does not see what all keys share) are rougher
than others by far. What is lost of a step (a micro-batch, a rank, the clip) makes more."""

_NUMBER = re.compile(r'\d+')

MISSING = 1e30
"""Difference of what is not there or not a number: a number that JSON can hold."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One check of one layout.

    Attributes:
        layout: Its name.
        check: 'initial', 'loss', 'norm', 'gradients', 'weights', 'same resume', 'resume from X'.
        max_relative_difference: Over everything that the check looks at.
        passed: Whether all of it is within tolerance.
        parameter: The first in the model's order that is not; None where none is.
        difference: Of that parameter, or the largest.
        detail: Where, in words.
    """

    layout: str
    check: str
    max_relative_difference: float
    passed: bool
    parameter: str | None = None
    difference: float = 0.0
    detail: str = ''


class Recording:
    """What the ranks of one run wrote.

    Args:
        folder: Has `RANK.json` and `RANK.safetensors` of every rank.
        world_size: How many ranks.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.steps: list[list[dict[str, float]]] = []
        self.tensors: dict[str, list[Tensor]] = {}
        for rank in range(world_size):
            self.steps.append(json.loads((folder / f'{rank}.json').read_text()))
            with safe_open(folder / f'{rank}.safetensors', 'pt') as file:
                for key in file.keys():
                    self.tensors.setdefault(key, []).append(file.get_tensor(key))


Differences = dict[str, dict[str, float]]
"""Largest relative difference by check, then by what was compared: 'step 1', 'NAME in step 0'.

In the order of steps, then of the model: the first that deviates is nearest to the cause."""


def differences(run: Recording, expected: Reference) -> Differences:
    """Everything a run did against the reference. All copies on all ranks are looked at.

    Args:
        run: Of all steps, or of the last ones after a resume.
        expected: The reference.
    """
    found: Differences = {'loss': {}, 'norm': {}, 'gradients': {}, 'weights': {}}
    for steps in run.steps:
        for step in steps:
            index = int(step['step'])
            for check, key, number in (
                ('loss', 'loss', expected.losses[index]),
                ('norm', 'gradient norm', expected.norms[index]),
            ):
                _keep(found[check], f'step {index}', _number(step[key], number))
    done = sorted({int(step['step']) for steps in run.steps for step in steps})
    for index in done:
        for check, wanted in (('gradients', expected.gradients), ('weights', expected.weights)):
            for name in expected.names:
                copies = run.tensors.get(f'{check}.{index}/{name}', [])
                found[check][_key(name, index)] = distance(copies, wanted[index][name])
    return found


def _key(name: str, index: int) -> str:
    return f'{name} in step {index}'


def initial_differences(run: Recording, expected: Reference) -> dict[str, float]:
    """Weights before the first step."""
    return {
        name: distance(run.tensors.get(f'initial/{name}', []), expected.initial[name])
        for name in expected.names
    }


def bitwise_differences(run: Recording, other: Recording) -> dict[str, float]:
    """The steps of a resumed run against the same steps of the run that went on; 0 is equal."""
    found: dict[str, float] = {}
    for steps, others in zip(run.steps, other.steps, strict=True):
        known = {step['step']: step for step in others}
        for step in steps:
            for key in ('loss', 'gradient norm'):
                different = step[key] != known[step['step']][key]
                difference = _number(step[key], known[step['step']][key]) or float(different)
                _keep(found, f'{key} of step {int(step["step"])}', difference)
    for key, copies in run.tensors.items():
        if key.startswith('initial/'):
            continue
        for one, two in zip(copies, other.tensors.get(key, []), strict=True):
            equal = bool((one == two).all())
            difference = 0.0 if equal else distance([one], two.double()) or 1e-30
            _keep(found, key.partition('/')[2], difference)
    return found


def distance(copies: list[Tensor], wanted: Tensor) -> float:
    """Largest ||copy - wanted|| / ||wanted|| over the copies; `MISSING` if there is none."""
    if not copies:
        return MISSING
    scale = wanted.norm().item()
    worst = 0.0
    for copy in copies:
        if copy.shape != wanted.shape:
            return MISSING
        far = (copy.double() - wanted).norm().item()
        worst = max(worst, _finite(far / scale if scale else math.inf if far else 0.0))
    return worst


def _number(value: float, wanted: float) -> float:
    return _finite(abs(value - wanted) / abs(wanted)) if value != wanted else 0.0


def _finite(value: float) -> float:
    return value if math.isfinite(value) else MISSING


def _keep(found: dict[str, float], key: str, value: float) -> None:
    found[key] = max(found.get(key, 0.0), value)


def bounds_of(
    precision: str, single: Differences | None, expected: Reference
) -> Differences | float:
    """What is allowed.

    In float64 it is one number; in float32 it is another, or twice the distance of one process of
    the framework where that is more. In half precision there is no such number: rounding is as
    large as what matters in some gradients. One process is the measure alone: a layout may be twice
    as far from the float64 reference as it, gradient by gradient. A distance is itself a random
    number, and small by luck for some, so that each is taken as no less than

    - for gradients, the median of all, and the largest of its kind: the same parameter of other
      layers and other steps; of biases and of norms, which are short, any of them;
    - for weights, the same in units of how far each has moved;
    - for the norm, the distance of the whole gradient, which bounds it by the triangle inequality;
    - for the loss, one rounding of one number.

    Args:
        precision: Name of the dtype.
        single: Differences of one process in this precision; None for that run itself.
        expected: The reference.
    """
    if single is None or precision == 'float64':
        return LIMIT_OF_ONE[precision]
    if precision in TOLERANCE:
        least = TOLERANCE[precision]
        return {
            check: {key: max(least, 2 * value) for key, value in values.items()}
            for check, values in single.items()
        }
    moved = {
        _key(name, index): _moved(expected.initial[name], weights[name])
        for index, weights in enumerate(expected.weights)
        for name in expected.names
    }
    speeds = {key: single['weights'][key] / moved[key] for key in moved if moved[key]}
    floors = {
        'loss': dict.fromkeys(single['loss'], torch.finfo(getattr(torch, precision)).eps / 2),
        'norm': {key: _whole(single, expected, key) for key in single['norm']},
        'gradients': _largest_of_kind(single['gradients']),
        'weights': {key: value * moved[key] for key, value in _largest_of_kind(speeds).items()}
        | {key: 0.0 for key in moved if not moved[key]},
    }
    return {
        check: {key: 2 * max(value, floors[check][key]) for key, value in values.items()}
        for check, values in single.items()
    }


def _largest_of_kind(values: Mapping[str, float]) -> dict[str, float]:
    """For each key the largest value of the same parameter in any layer and step, or the median."""
    median = _median(values.values())
    largest: dict[str, float] = {}
    for key, value in values.items():
        kind = _kind(key)
        largest[kind] = max(largest.get(kind, median), value)
    return {key: largest[_kind(key)] for key in values}


def _kind(key: str) -> str:
    """Of 'NAME in step N': what its rounding may be compared with."""
    for short in ('.bias', 'norm.weight'):
        if f'{short} in' in key:
            return short
    return _NUMBER.sub('', key)


def _moved(before: Tensor, after: Tensor) -> float:
    """How far a parameter has gone, relative to where it is."""
    return (after - before).norm().item() / (after.norm().item() or 1.0)


def _whole(single: Differences, expected: Reference, key: str) -> float:
    """Distance of all gradients of a step together; `key` is 'step N'."""
    index = int(key.split()[-1])
    squares = [
        (single['gradients'][_key(name, index)] * gradient.norm().item()) ** 2
        for name, gradient in expected.gradients[index].items()
    ]
    return math.sqrt(sum(squares)) / expected.norms[index]


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def judge(
    layout: str,
    check: str,
    found: Mapping[str, float],
    bounds: Mapping[str, float] | float,
    named: bool = True,
) -> Cell:
    """One cell out of differences.

    Args:
        layout: Name of the layout.
        check: Name of the check.
        found: Differences, in the model's order.
        bounds: What is allowed, of each or of all.
        named: Whether the keys begin with names of parameters.
    """
    worst = max(found.values(), default=MISSING)
    for key, value in found.items():
        bound = bounds if isinstance(bounds, (int, float)) else bounds[key]
        if not value <= bound:
            name = key.split(' ')[0] if named else None
            return Cell(layout, check, worst, False, name, value, key)
    return Cell(layout, check, worst, bool(found))
