"""What was found, judged and told: a JSON file, a table, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from learning_proof.tasks import TASKS

RECORD = 'results.json'
PICTURE = 'curves.png'
BEGIN, END = '<!-- results: written by run.py --page -->', '<!-- end of results -->'
"""Between these lines of a page stands what was found."""


class Target(NamedTuple):
    """What a stage must reach, on the held-out questions, with every seed.

    Attributes:
        stage: Which.
        key: Of a point of its curve.
        first: Whether the first point counts, what was there before training, or the last.
        least: The share that it must at least be; None for no bound.
        most: The share that it may at most be.
        says: In words.
    """

    stage: str
    key: str
    first: bool
    least: float
    most: float
    says: str

    def value(self, results: Mapping[str, Any]) -> float:
        """What one seed's results say."""
        return results[self.stage]['curve'][0 if self.first else -1][self.key]

    def is_met(self, results: Mapping[str, Any]) -> bool:
        """Whether one seed's results reach it."""
        return self.least <= self.value(results) <= self.most


TARGETS = (
    Target('base', 'exact', False, 0.0, 0.05, 'base model: exact answers'),
    Target('sft', 'exact', False, 0.95, 1.0, 'all weights fine-tuned: exact answers'),
    Target('lora', 'exact', False, 0.90, 1.0, 'LoRA: exact answers'),
    Target('dpo', 'bracketed', True, 0.0, 0.50, 'before DPO: right and in brackets'),
    Target('dpo', 'bracketed', False, 0.95, 1.0, 'after DPO: right and in brackets'),
)


def judge(seeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every target that a seed misses, in words; none if learning is proven."""
    return [
        f'seed {seed}: {target.says} {target.value(results):.2%}, {bounds(target)}'
        for seed, results in seeds.items()
        for target in TARGETS
        if not target.is_met(results)
    ]


def bounds(target: Target) -> str:
    """What is asked, in words."""
    return f'at least {target.least:.0%}' if target.least else f'at most {target.most:.0%}'


def table(seeds: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what is asked and what each seed gives, and the tasks apart."""
    names = list(seeds)
    rows = [['', 'asked', *(f'seed {name}' for name in names)]]
    rows += [
        [target.says, bounds(target), *(_percent(target.value(seeds[name])) for name in names)]
        for target in TARGETS
    ]
    rows.append(
        ['after DPO: the chosen answer has the higher implicit reward', '']
        + [_percent(seeds[name]['dpo']['preference']['after']) for name in names]
    )
    for stage, name in (('base', 'base'), ('sft', 'all weights'), ('lora', 'LoRA'), ('dpo', 'DPO')):
        seconds = [f'{seeds[seed][stage]["seconds"]:.0f}' for seed in names]
        rows.append([f'seconds of training, {name}', '', *seconds])
    tasks = [['exact answers, mean of the seeds', 'base', 'all weights', 'LoRA', 'DPO']]
    for task in TASKS:
        means = [
            sum(seeds[name][stage]['by_task'][task]['exact'] for name in names) / len(names)
            for stage in ('base', 'sft', 'lora', 'dpo')
        ]
        tasks.append([f'`{task}`', *map(_percent, means)])
    return f'{_markdown(rows)}\n\n{_markdown(tasks)}\n'


def draw(seeds: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """One PNG: exact answers over the steps of fine-tuning, and the preference over DPO's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    lines = (
        (left, 'sft', 'exact', 'all weights', 'C0', '-'),
        (left, 'lora', 'exact', 'LoRA', 'C1', '-'),
        (right, 'dpo', 'bracketed', 'right and in brackets', 'C2', '-'),
        (right, 'dpo', 'exact', 'right in either form', 'C3', '--'),
    )
    for axis, stage, key, label, color, style in lines:
        for number, results in enumerate(seeds.values()):
            curve = results[stage]['curve']
            axis.plot(
                [point['step'] for point in curve],
                [100 * point[key] for point in curve],
                color=color,
                linestyle=style,
                marker='o',
                markersize=3,
                linewidth=1.2,
                label=None if number else label,
            )
    for axis, title, asked in ((left, 'fine-tuning', (95, 90)), (right, 'DPO', (95,))):
        for share in asked:
            axis.axhline(share, color='grey', linewidth=0.7, linestyle=':')
        axis.set(title=title, xlabel='step', ylim=(-3, 103))
        axis.grid(alpha=0.3)
        axis.legend(loc='lower right')
    left.set_ylabel('% of held-out questions')
    figure.savefig(out, dpi=150, format='png')


def fill_page(page: Path, record: Mapping[str, Any], picture: Path) -> None:
    """Write what was found into a page: date, builds, tables, the picture.

    Args:
        page: Markdown that holds the lines `BEGIN` and `END`; what is between them is replaced.
        record: As `RECORD` holds it.
        picture: What `draw` has drawn; is copied to `assets` beside the page.

    Raises:
        ValueError: See `split_page`.
    """
    before, after = split_page(page)
    copied = page.parent / 'assets' / 'learning_proof.png'
    copied.parent.mkdir(exist_ok=True)
    copied.write_bytes(picture.read_bytes())
    version = record['builds']['torch'].partition('+')[0]
    found = (
        f'{record["date"]}, {record["device"]}, PyTorch {version}:\n\n{table(record["seeds"])}\n'
        f'![Held-out questions over the steps of each run](assets/{copied.name})\n'
    )
    page.write_text(f'{before}{BEGIN}\n\n{found}\n{END}\n{after}', encoding='utf-8')


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the results of a page.

    Raises:
        ValueError: If the page lacks one of the lines between which they stand.
    """
    before, begin, rest = page.read_text(encoding='utf-8').partition(f'{BEGIN}\n')
    _, end, after = rest.partition(f'{END}\n')
    if not begin or not end:
        raise ValueError(f'{page} has no line {END if begin else BEGIN}')
    return before, after


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what was found as JSON."""
    path.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %'


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    lines.insert(1, '|' + '---|' * len(rows[0]))
    return '\n'.join(lines)
