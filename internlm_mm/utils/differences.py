"""How far the curves of runs lie apart: what a precision, a kernel or a seed does to a loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internlm_mm.utils.curves import Run, align_columns, moving_average, name_runs, read_run


@dataclass(frozen=True)
class Difference:
    """How far a second run lies from a first one over the last of the steps that both logged.

    Attributes:
        first: Step that the comparison begins with.
        last: Step that it ends with.
        count: Records compared.
        mean: Mean of the first run.
        signed: Mean of second less first, as a share of `mean`: how far the level is shifted.
        absolute: Mean of the absolute differences, as a share of `mean`. It holds the noise of
            single steps, too: two models never agree on every batch.
        scatter: Standard deviation of the differences around their mean, as a share of `mean`.
    """

    first: int
    last: int
    count: int
    mean: float
    signed: float
    absolute: float
    scatter: float


def measure_difference(
    first: Run, second: Run, key: str = 'loss', last: float = 0.25, smooth: int = 1
) -> Difference:
    """Compare two runs step by step.

    Args:
        first: The run that shares refer to.
        second: The other.
        key: What to compare.
        last: Share of the first run's steps, from its end, that counts; those of them that both
            have logged are compared.
        smooth: Records in the moving average that is taken of both curves before; 1 takes none.

    Raises:
        KeyError: If a run has not logged the key; names the nearest.
        ValueError: If `last` or `smooth` is out of range, or no step is common.
    """
    if not 0 < last <= 1:
        raise ValueError(f'last={last} must be a share above 0 and at most 1')
    if smooth < 1:
        raise ValueError(f'smooth={smooth} must be at least 1')
    curves = [run.series(key) for run in (first, second)]
    begin = (1 - last) * max(curves[0])
    steps = sorted(step for step in curves[0] if step > begin and step in curves[1])
    if not steps:
        raise ValueError(
            f'{first.path} and {second.path} have logged {key!r} at no common step after {begin:g}'
        )
    smoothed = []
    for curve in curves:
        averages = moving_average(list(curve.values()), smooth)
        values = dict(zip(curve, averages, strict=True))
        smoothed.append(np.asarray([values[step] for step in steps]))
    apart, mean = smoothed[1] - smoothed[0], float(smoothed[0].mean())
    return Difference(
        first=steps[0],
        last=steps[-1],
        count=len(steps),
        mean=mean,
        signed=float(apart.mean() / mean),
        absolute=float(np.abs(apart).mean() / mean),
        scatter=float(apart.std() / mean),
    )


def difference_table(
    paths: Sequence[str | Path], keys: Sequence[str], last: float = 0.25, smooth: int = 1
) -> str:
    """A line for every pair of runs and every key, the earlier run of a pair being the first.

    Raises:
        FileNotFoundError: If a work dir holds no run.
        KeyError: If a run has not logged a key; names the nearest.
        ValueError: If there are fewer than two runs, or see `measure_difference`.
    """
    if len(paths) < 2:
        raise ValueError('differences need two runs at least')
    runs = [read_run(path) for path in paths]
    names = name_runs(runs)
    rows = [['first', 'second', 'of', 'steps', 'mean', 'second - first', 'absolute', 'scatter']]
    for key in keys:
        for a, b in itertools.combinations(range(len(runs)), 2):
            apart = measure_difference(runs[a], runs[b], key, last, smooth)
            rows.append(
                [
                    names[a],
                    names[b],
                    key,
                    f'{apart.first:,} to {apart.last:,}: {apart.count:,}',
                    f'{apart.mean:.4f}',
                    f'{apart.signed:+.3%}',
                    f'{apart.absolute:.3%}',
                    f'{apart.scatter:.3%}',
                ]
            )
    return align_columns(rows, left=4)
