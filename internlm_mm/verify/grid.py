"""The grid of layouts and checks, as text and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internlm_mm.verify.compare import MISSING, Cell

COLUMNS = ('initial', 'loss', 'norm', 'gradients', 'weights', 'resume', 'same resume')
"""What each column shows: the worst of the checks whose name begins with it."""


def render(title: str, cells: Sequence[Cell], errors: Mapping[str, str]) -> str:
    """The grid of one precision, then each failing cell in words.

    Args:
        title: First line.
        cells: All checks.
        errors: What went wrong by layout.
    """
    layouts = list(dict.fromkeys(cell.layout for cell in cells))
    width = max([len(layout) for layout in layouts], default=0)
    lines = [title, '  '.join([' ' * width, *(f'{column:>12}' for column in COLUMNS)])]
    for layout in layouts:
        texts = [
            _cell([c for c in cells if c.layout == layout and _column(c) == column], layout, errors)
            for column in COLUMNS
        ]
        lines.append('  '.join([f'{layout:{width}}', *(f'{text:>12}' for text in texts)]))
    failing = [cell for cell in cells if not cell.passed and cell.layout not in errors]
    if failing:
        lines += ['', 'What deviates first, in the order of steps and of the model:']
        lines += [f'  {cell.layout}: {describe(cell)}' for cell in failing]
    return '\n'.join(lines)


def render_rest(skipped: Mapping[str, str], errors: Mapping[str, str]) -> str:
    """What failed to run and what was left out, and why; empty where nothing was.

    Args:
        skipped: Reasons by layout.
        errors: What went wrong by layout.
    """
    lines = []
    for layout, error in errors.items():
        lines += ['', f'{layout} did not run: {error}']
    if skipped:
        lines += ['', 'Left out:']
        lines += [f'  {layout}: {reason}' for layout, reason in skipped.items()]
    return '\n'.join(lines)


def describe(cell: Cell) -> str:
    """A failing cell in words."""
    if cell.difference >= MISSING:
        amount = 'is missing, or not a number'
    else:
        amount = f'differs by {cell.difference:.1e}'
    return f'{cell.check}: {cell.detail} {amount}'


def _column(cell: Cell) -> str:
    return 'resume' if cell.check.startswith('resume from') else cell.check


def _cell(cells: Sequence[Cell], layout: str, errors: Mapping[str, str]) -> str:
    if not cells:
        return '-'
    if layout in errors and not all(cell.passed for cell in cells):
        return 'error'
    worst = max(cell.max_relative_difference for cell in cells)
    text = 'missing' if worst >= MISSING else f'{worst:.1e}' if worst else '0'
    return text + (' ok' if all(cell.passed for cell in cells) else ' XX')


def write_json(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write one report, or a list of them.

    Args:
        path: File to write.
        reports: As from `as_json`.
    """
    content = reports[0] if len(reports) == 1 else {'reports': list(reports)}
    path.write_text(json.dumps(content, indent=1) + '\n')


def as_json(
    config: str,
    precision: str,
    device: str,
    cells: Sequence[Cell],
    skipped: Mapping[str, str],
    errors: Mapping[str, str],
) -> dict[str, Any]:
    """The report of one precision."""
    return {
        'config': config,
        'precision': precision,
        'device': device,
        'passed': all(cell.passed for cell in cells),
        'cells': [asdict(cell) for cell in cells],
        'skipped': [{'layout': name, 'reason': reason} for name, reason in skipped.items()],
        'errors': [{'layout': name, 'error': error} for name, error in errors.items()],
    }
