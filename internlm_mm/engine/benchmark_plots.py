"""Records of benchmarks side by side in one picture: speed, where time goes, memory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_mm.engine.breakdown import KINDS
from internlm_mm.utils.suggest import nearest_path

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a picture shows of a record.

    Attributes:
        label: What it is called.
        device: What it ran on, with how many of it.
        speed: Tokens a second and device.
        utilisation: MFU with attention in full; None where the device's peak is not known.
        parts: Microseconds of a device for each of its tokens, by kind of work; empty for a record
            without a breakdown.
        held: GiB of tensors.
        taken: GiB taken from the device; None where that is not known.
    """

    label: str
    device: str
    speed: float
    utilisation: float | None
    parts: Mapping[str, float]
    held: float
    taken: float | None


def read_record(path: Path, label: str | None = None) -> Measurement:
    """Read what `tools/benchmark.py` has kept, or what it printed with `--json`.

    Args:
        path: The file.
        label: What to call it; by default the name of its config.

    Raises:
        FileNotFoundError: If it is not there.
        OSError: If it cannot be read; with the system's reason.
        ValueError: If it is no record of a benchmark.
    """
    if not path.exists():
        raise FileNotFoundError(f'there is no record {path}{nearest_path(path)}')
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        speed, devices = record['tgs'], record['devices']
        tokens = record['tokens_per_second'] * record['framework']['median'] / devices
        parts = (record.get('breakdown') or {}).get('parts_ms', {})
        taken = record.get('reserved_memory_bytes')
        return Measurement(
            label=label or record.get('name') or path.stem,
            device=f'{devices} x {record["device"]}',
            speed=speed,
            utilisation=record.get('mfu_full'),
            parts={kind: 1e3 * value / tokens for kind, value in parts.items() if value},
            held=record['peak_memory_bytes'] / GIB,
            taken=None if taken is None else taken / GIB,
        )
    except OSError as error:
        raise type(error)(f'record {path} cannot be read: {error.strerror}') from error
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, ValueError) as error:
        raise ValueError(
            f'{path} is no record of tools/benchmark.py: {type(error).__name__}: {error}'
        ) from error


def read_records(paths: Sequence[Path], labels: Sequence[str] | None = None) -> list[Measurement]:
    """Read several, in this order.

    Raises:
        ValueError: If there are as many labels as records neither, nor none; see `read_record`.
    """
    if labels is not None and len(labels) != len(paths):
        raise ValueError(f'--labels has {len(labels)} names for {len(paths)} records')
    names: list[str | None] = [*labels] if labels else [None] * len(paths)
    return [read_record(path, name) for path, name in zip(paths, names, strict=True)]


def draw_records(found: Sequence[Measurement], out: Path) -> Path:
    """Draw a PNG: a bar for each record in each panel, the first record on top.

    Args:
        found: What to draw.
        out: The file to write; its folder is made.

    Returns:
        `out`.

    Raises:
        OSError: If it cannot be written; with the system's reason.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_parts = any(one.parts for one in found)
    figure = Figure(figsize=(12, 1.4 + 0.42 * len(found)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if with_parts else 2, sharey=True)
    _draw_speeds(axes[0], found)
    if with_parts:
        _draw_parts(axes[1], found)
    _draw_memory(axes[-1], found)
    axes[0].set_yticks(range(len(found)), [one.label for one in found])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(axis='x', alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(', '.join(dict.fromkeys(one.device for one in found)), fontsize='medium')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, format='png')
    except OSError as error:
        raise type(error)(f'--out {out} cannot be written: {error.strerror}') from error
    return out


def _draw_speeds(axis: Any, found: Sequence[Measurement]) -> None:
    bars = axis.barh(range(len(found)), [one.speed for one in found], color='C0')
    texts = [
        f'{one.speed:,.0f}'
        + ('' if one.utilisation is None else f' ({one.utilisation:.1%} MFU in full)')
        for one in found
    ]
    axis.bar_label(bars, texts, label_type='center', color='white', fontsize='small')
    axis.set_xlabel('tokens a second and device')


def _draw_parts(axis: Any, found: Sequence[Measurement]) -> None:
    """Kinds of work next to one another in each bar; the small ones are told by the legend."""
    start = [0.0] * len(found)
    for number, kind in enumerate(KINDS):
        widths = [one.parts.get(kind, 0.0) for one in found]
        if any(widths):
            axis.barh(range(len(found)), widths, left=start, color=f'C{number}', label=kind)
            start = [left + width for left, width in zip(start, widths, strict=True)]
    axis.set_xlabel('microseconds a token')
    axis.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, fontsize='x-small')


def _draw_memory(axis: Any, found: Sequence[Measurement]) -> None:
    rows = range(len(found))
    if any(one.taken for one in found):  # of a CPU nothing but what the process holds is known
        axis.barh(rows, [one.taken or 0.0 for one in found], color='lightgrey', label='taken')
    axis.barh(rows, [one.held for one in found], color='C2', height=0.5, label='tensors')
    axis.set_xlabel('GiB')
    axis.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2, fontsize='x-small')
