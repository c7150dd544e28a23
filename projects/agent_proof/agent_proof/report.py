"""What was found, judged and told: a JSON file, a table, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agent_proof.tasks import GROUPS

RECORD = 'results.json'


class Target(NamedTuple):
    """What every seed must reach, on the held-out questions, by the last checkpoint.

    Attributes:
        key: Of a point of its curve.
        least: The share that it must at least be.
        most: The share that it may at most be.
        says: In words.
    """

    key: str
    least: float
    most: float
    says: str

    def is_met(self, point: Mapping[str, float]) -> bool:
        """Whether a point of a curve reaches it."""
        return self.least <= point[self.key] <= self.most


TARGETS = (
    Target('valid_call', 0.99, 1.0, 'valid calls, where a tool is needed'),
    Target('right', 0.90, 1.0, 'right answers, where a tool is needed'),
    Target('not_called', 0.95, 1.0, 'no call, where none is needed'),
    Target('unseen_schema_valid', 0.80, 1.0, 'unseen tools: calls valid by their schema'),
    Target('without_tools', 0.0, 0.05, 'the same questions without tools: right answers'),
)
FIGURES = (
    ('right_untooled', 'right answers, where no tool is needed'),
    ('schema_valid', 'calls valid by their schema, where a tool is needed'),
    ('unseen_valid_call', 'unseen tools: valid calls'),
    ('unseen_ast_match', 'unseen tools: the very call that is right'),
    ('unseen_right', 'unseen tools: right answers in the end'),
)
"""What is told and has no bound."""


def last(results: Mapping[str, Any]) -> Mapping[str, float]:
    """The last point of a seed's curve."""
    return results['curve'][-1]


def judge(seeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every target that a seed misses, in words; none if learning is proven."""
    return [
        f'seed {seed}: {target.says} {last(results)[target.key]:.2%}, {bounds(target)}'
        for seed, results in seeds.items()
        for target in TARGETS
        if not target.is_met(last(results))
    ]


def bounds(target: Target) -> str:
    """What is asked, in words."""
    return f'at least {target.least:.0%}' if target.least else f'at most {target.most:.0%}'


def table(seeds: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what is asked and what each seed gives, and the groups of tasks apart."""
    points = [last(results) for results in seeds.values()]
    rows = [['', 'asked', *(f'seed {name}' for name in seeds)]]
    rows += [
        [target.says, bounds(target), *(_percent(point[target.key]) for point in points)]
        for target in TARGETS
    ]
    rows += [[says, '', *(_percent(point[key]) for point in points)] for key, says in FIGURES]
    for key, says in (('cases', 'questions'), ('unseen_cases', 'questions about unseen tools')):
        rows.append([says, '', *(str(point[key]) for point in points)])
    rows.append(['steps of training', '', *(f'{point["step"]:,}' for point in points)])
    seconds = (f'{results["seconds"]:.0f}' for results in seeds.values())
    rows.append(['seconds of training', '', *seconds])
    groups = [['right answers, mean of the seeds', 'with tools', 'without']]
    for group in GROUPS:
        means = [
            _mean(results['by_group'][key].get(group) for results in seeds.values())
            for key in ('right', 'without_tools')
        ]
        groups.append([group, *('' if mean is None else _percent(mean) for mean in means)])
    return f'{_markdown(rows)}\n\n{_markdown(groups)}\n'


def draw(seeds: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """One PNG: shares of the held-out questions over the steps, and the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lines = (
        ('valid_call', 'valid call', 'C0', '-'),
        ('right', 'right answer', 'C2', '-'),
        ('not_called', 'no call where none is needed', 'C1', '--'),
        ('unseen_schema_valid', 'unseen tools: valid by schema', 'C4', '-.'),
        ('without_tools', 'right without tools', 'C3', ':'),
    )
    for number, results in enumerate(seeds.values()):
        steps = [point['step'] for point in results['curve']]
        for key, label, color, style in lines:
            left.plot(
                steps,
                [100 * point[key] for point in results['curve']],
                color=color,
                linestyle=style,
                marker='o',
                markersize=3,
                linewidth=1.2,
                label=None if number else label,
            )
        right.plot(*zip(*results['loss'], strict=True), linewidth=0.9, label=f'seed {number}')
    left.set(title='held-out questions', xlabel='step', ylabel='%', ylim=(-3, 103))
    right.set(title='training', xlabel='step', ylabel='loss', yscale='log')
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=150, format='png')


def page(text: str, results: str, begin: str, end: str) -> str:
    """A page with what stands between two of its lines replaced.

    Raises:
        ValueError: If the lines are not there.
    """
    before, found, rest = text.partition(f'{begin}\n')
    _, closed, after = rest.partition(f'{end}\n')
    if not found or not closed:
        raise ValueError(f'the page has no lines {begin!r} and {end!r}')
    return f'{before}{begin}\n{results}{end}\n{after}'


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what was found as JSON."""
    path.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %'


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    lines.insert(1, '|' + '---|' * len(rows[0]))
    return '\n'.join(lines)
