"""Curves and summaries of finished and running runs, from the scalars they have logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.utils.suggest import did_you_mean

X_AXES = {
    'iter': 'iteration',
    'tokens': 'tokens',
    'time': 'seconds of training steps',
}
"""What curves can be drawn over, with the axis's label."""

_HIGHER_IS_BETTER = ('tokens_per_second', 'tgs', 'tflops', 'mfu', 'accuracy')
_LOWER_IS_BETTER = ('loss', 'perplexity', 'time', 'data_share', 'num_skipped')


@dataclass(frozen=True)
class Run:
    """Everything one run has logged, its restarts joined.

    Attributes:
        path: The folder it was read from.
        scalars: Name -> step -> value; steps ascend.
    """

    path: Path
    scalars: Mapping[str, Mapping[int, float]]

    def keys(self) -> list[str]:
        """Names of what was logged."""
        return list(self.scalars)

    def series(self, key: str) -> Mapping[int, float]:
        """Values by step.

        Raises:
            KeyError: If there is none of this name; says which is nearest.
        """
        if key not in self.scalars:
            raise KeyError(f'{self.path} has logged no {key!r}.{did_you_mean(key, self.scalars)}')
        return self.scalars[key]

    def positions(self, steps: Sequence[int], x: str) -> np.ndarray:
        """Where steps lie on an axis of `X_AXES`; between records linearly.

        Raises:
            ValueError: If the run has not logged what the axis needs.
        """
        if x not in X_AXES:
            raise ValueError(f'x={x!r} is no axis.{did_you_mean(x, X_AXES)}')
        if x == 'iter':
            return np.asarray(steps, float)
        known = self.tokens() if x == 'tokens' else self.seconds()
        if not known:
            needed = 'consumed_tokens' if x == 'tokens' else 'consumed_tokens and tokens_per_second'
            raise ValueError(f'{self.path} cannot be drawn over {x}: it has not logged {needed}')
        return np.interp(steps, list(known), list(known.values()))

    def tokens(self) -> dict[int, float]:
        """Tokens consumed over all ranks, by step, from step 0."""
        consumed = self.scalars.get('consumed_tokens', {})
        return {0: 0.0, **consumed} if consumed else {}

    def seconds(self) -> dict[int, float]:
        """Seconds spent in training steps so far, by step; evaluations and checkpoints are none.

        Between two records every step is taken to be as fast as the speed logged at the second.
        """
        speeds = self.scalars.get('tokens_per_second', {})
        found, total, last = {0: 0.0}, 0.0, 0.0
        for step, tokens in self.tokens().items():
            if step in speeds:
                total, last = total + (tokens - last) / speeds[step], tokens
                found[step] = total
        return found if len(found) > 1 else {}

    def mean_speed(self) -> float:
        """Tokens a second over all ranks and the steps whose speed was logged; NaN if none was."""
        seconds = self.seconds()
        return self.tokens()[max(seconds)] / seconds[max(seconds)] if seconds else math.nan


def read_run(path: str | Path) -> Run:
    """Read the scalars of a work dir, or of one start of a run in it.

    A run that was resumed has one folder for each start. A later one replaces what earlier ones
    logged from its first step on: those steps were done again.

    Raises:
        FileNotFoundError: If nothing was logged there.
        ValueError: If a log is damaged; names the line.
    """
    path = Path(path)
    files = sorted(path.glob('*/vis_data/scalars.json')) or sorted(
        path.glob('vis_data/scalars.json')
    )
    scalars: dict[str, dict[int, float]] = {}
    for file in files:
        records = _read_records(file)
        if not records:
            continue
        first = min(step for step, _ in records)
        for key, series in scalars.items():
            scalars[key] = {step: value for step, value in series.items() if step < first}
        for step, values in records:
            for key, value in values.items():
                scalars.setdefault(key, {})[step] = value
    scalars = {key: dict(sorted(series.items())) for key, series in scalars.items() if series}
    if not scalars:
        raise FileNotFoundError(
            f'{path}: no run has logged here; expected {path}/TIMESTAMP/vis_data/scalars.json'
        )
    return Run(path, scalars)


def draw_curves(
    paths: Sequence[str | Path],
    keys: Sequence[str],
    out: str | Path,
    x: str = 'iter',
    smooth: int = 1,
) -> Path:
    """Draw runs into one PNG: a panel for each quantity, a colour for each run.

    `val/loss` shares a panel with `loss`, and domains with their total.

    Args:
        paths: Work dirs.
        keys: What to draw.
        out: The file to write.
        x: One of `X_AXES`.
        smooth: Points in the moving average that is drawn over the faint raw curve; 1 draws raw.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: If a work dir holds no run.
        KeyError: If no run has logged a key; names the nearest.
        ValueError: If `smooth` or `x` is out of range.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if smooth < 1:
        raise ValueError(f'smooth={smooth} must be at least 1')
    runs = [read_run(path) for path in paths]
    names = name_runs(runs)
    panels: dict[str, list[str]] = {}
    for key in keys:
        if not any(key in run.scalars for run in runs):
            runs[0].series(key)
        panels.setdefault(key.removeprefix('val/').split('/')[0], []).append(key)
    figure = Figure(figsize=(7, 0.5 + 3.5 * len(panels)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, group) in zip(axes, panels.items(), strict=True):
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            for line, key in zip(_line_styles(group), group, strict=True):
                if key in run.scalars:
                    label = name if len(group) == 1 else f'{name}: {key}'
                    _draw(axis, run, key, x, smooth, label, f'C{number % 10}', line)
        axis.set(ylabel=title.replace('_', ' '), xlabel=X_AXES[x])
        axis.grid(alpha=0.3)
        if len(runs) > 1 or len(group) > 1:
            axis.legend()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format='png')
    return out


def summary_table(paths: Sequence[str | Path], keys: Sequence[str]) -> str:
    """A line for each run: steps, tokens, mean speed, and of each key the last and the best value.

    Raises:
        FileNotFoundError: If a work dir holds no run.
        KeyError: If no run has logged a key; names the nearest.
    """
    runs = [read_run(path) for path in paths]
    header = ['run', 'steps', 'tokens', 'tokens/s']
    for key in keys:
        if not any(key in run.scalars for run in runs):
            runs[0].series(key)
        header += [f'{key} last', f'{key} best'] if _better(key) else [f'{key} last']
    rows = [header]
    for run, name in zip(runs, name_runs(runs), strict=True):
        steps = max(step for series in run.scalars.values() for step in series)
        tokens = run.tokens()
        row = [
            name,
            f'{steps:,}',
            f'{max(tokens.values()):,.0f}' if tokens else '-',
            '-' if math.isnan(run.mean_speed()) else f'{run.mean_speed():,.0f}',
        ]
        for key in keys:
            row += _last_and_best(key, run.scalars.get(key, {}))
        rows.append(row)
    return align_columns(rows)


def align_columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of cells below one another, the first `left` columns from the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def moving_average(values: Sequence[float], points: int) -> np.ndarray:
    """Mean of each value and the `points - 1` before it, of fewer at the beginning."""
    array = np.asarray(values, float)
    sums = np.concatenate([[0.0], np.cumsum(array)])
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - points, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def name_runs(runs: Sequence[Run]) -> list[str]:
    """Short labels: the folder's own name, or the whole path where two runs share it."""
    short = [run.path.resolve().name for run in runs]
    return [
        name if short.count(name) == 1 else str(run.path)
        for name, run in zip(short, runs, strict=True)
    ]


def _read_records(file: Path) -> list[tuple[int, dict[str, float]]]:
    records = []
    lines = file.read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record.pop('step'))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                continue  # the process was killed while it wrote
            raise ValueError(f'{file}, line {number}: not a record of scalars: {error}') from error
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
        records.append((step, numbers))
    return records


def _draw(
    axis: Any, run: Run, key: str, x: str, smooth: int, label: str, color: str, line: str
) -> None:
    series = run.series(key)
    positions, values = run.positions(list(series), x), list(series.values())
    # An evaluation every thousand steps is few points: show where they are.
    marker = 'o' if len(values) <= 30 else None
    style = {'color': color, 'linestyle': line, 'marker': marker, 'markersize': 3}
    if smooth > 1:
        axis.plot(positions, values, alpha=0.25, linewidth=0.8, **style)
        values = list(moving_average(values, smooth))
    axis.plot(positions, values, label=label, linewidth=1.3, **style)


def _line_styles(group: Sequence[str]) -> list[str]:
    styles = ['-', '--', ':', '-.']
    return [styles[index % len(styles)] for index in range(len(group))]


def _better(key: str) -> int:
    """1 if more is better, -1 if less is, 0 if neither."""
    parts = key.removeprefix('val/').split('/')
    if any(part.startswith(_HIGHER_IS_BETTER) for part in parts):
        return 1
    lower = any(part.startswith(_LOWER_IS_BETTER) or part == 'domain_loss' for part in parts)
    return -1 if lower else 0


def _last_and_best(key: str, series: Mapping[int, float]) -> list[str]:
    better = _better(key)
    if not series:
        return ['-', '-'] if better else ['-']
    last = _number(series[max(series)])
    if not better:
        return [last]
    finite = {step: value for step, value in series.items() if math.isfinite(value)}
    if not finite:
        return [last, '-']
    best = max(finite, key=lambda step: better * finite[step])
    return [last, f'{_number(finite[best])} at {best:,}']


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 10_000 else f'{value:.4g}'
