"""Which layouts are compared, and which cannot run with a reason."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from internlm_mm.parallel.data import RESHARD
from internlm_mm.parallel.fit import check_layout
from internlm_mm.parallel.mesh import AXES, Layout
from internlm_mm.parallel.pipeline_plan import read_options
from internlm_mm.utils.suggest import did_you_mean

OPTIONS = ('reshard', 'schedule', 'stages_per_rank', 'layers', 'context_attention', 'offload')
"""What a layout may say besides degrees."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layout to verify: degrees of the axes, and options that go with them.

    Attributes:
        degrees: Degree of each axis that is above 1, as pairs in the order of `AXES`.
        reshard: `strategy.reshard`; the config's own if None.
        schedule: `strategy.pipeline.schedule`; the strategy's default if None.
        stages_per_rank: `strategy.pipeline.stages_per_rank`; what the schedule needs if None.
        layers: `strategy.pipeline.layers`; an even split if None.
        context_attention: `strategy.context_attention`; the config's own if None.
        offload: Whether optimizer state is kept in host memory; as the config has it if None.
    """

    degrees: tuple[tuple[str, int], ...] = ()
    reshard: str | None = None
    schedule: str | None = None
    stages_per_rank: int | None = None
    layers: tuple[int, ...] | None = None
    context_attention: str | None = None
    offload: bool | None = None

    def degree(self, axis: str) -> int:
        """Ranks along an axis."""
        return dict(self.degrees).get(axis, 1)

    @property
    def world_size(self) -> int:
        """Processes it takes."""
        return prod(degree for _, degree in self.degrees)

    @property
    def data(self) -> int:
        """Ranks, or groups of ranks, that read different rows."""
        return self.degree('data_replicate') * self.degree('data_shard')

    @property
    def stages(self) -> int:
        """Pieces that the layers are cut into.

        Raises:
            ValueError: If the schedule is unknown.
        """
        pipeline = self.degree('pipeline')
        if pipeline == 1:
            return 1
        _, per_rank, _ = read_options({'schedule': self.schedule} if self.schedule else None)
        return pipeline * (self.stages_per_rank or per_rank)

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        parts = [f'{axis}={degree}' for axis, degree in self.degrees]
        for key, value in asdict(self).items():
            if key in OPTIONS and value not in (None, False):
                text = '/'.join(map(str, value)) if isinstance(value, tuple) else str(value)
                parts.append(f'{key}={text}')
        return ','.join(parts) or 'one process'

    def options(self, strategy: Mapping[str, Any]) -> dict[str, Any]:
        """A config's `strategy` with this layout in place of its own."""
        changed = dict(strategy)
        # -1 takes what is left over: data axes are always named, so that nothing is guessed.
        changed['parallel'] = {'data_shard': 1, 'data_replicate': 1, **dict(self.degrees)}
        changed.pop('pipeline', None)
        if self.degree('pipeline') > 1:
            pipeline = {
                'schedule': self.schedule,
                'stages_per_rank': self.stages_per_rank,
                'layers': self.layers and list(self.layers),
            }
            changed['pipeline'] = {k: v for k, v in pipeline.items() if v is not None}
        for key in ('reshard', 'context_attention', 'offload'):
            if getattr(self, key) is not None:
                changed[key] = getattr(self, key)
        return changed


def parse_case(text: str) -> Case:
    """`'tensor=2,data_shard=2,reshard=layer'` -> a layout.

    Degrees by axis; `reshard`, `context_attention`, `schedule`, `stages_per_rank`, `layers=3/5` and
    `offload=True` as in `strategy`. 'one process' is the layout of one process.

    Raises:
        ValueError: Naming the part that is not understood, and the nearest that is.
    """
    degrees: dict[str, int] = {}
    options: dict[str, Any] = {}
    if text.strip() == 'one process':
        return Case()
    for part in filter(None, (part.strip() for part in text.split(','))):
        key, equals, value = (piece.strip() for piece in part.partition('='))
        if not equals or key not in (*AXES, *OPTIONS):
            hint = did_you_mean(key, (*AXES, *OPTIONS))
            raise ValueError(f'--layouts {text!r}: {part!r} is not understood.{hint}')
        if key in AXES:
            degrees[key] = _positive(text, key, value)
        elif key == 'stages_per_rank':
            options[key] = _positive(text, key, value)
        elif key == 'layers':
            options[key] = tuple(_positive(text, key, piece) for piece in value.split('/'))
        elif key == 'offload':
            if value not in ('True', 'False'):
                raise ValueError(f'--layouts {text!r}: offload={value} must be True or False')
            options[key] = value == 'True'
        elif key == 'reshard' and value not in RESHARD:
            raise ValueError(
                f'--layouts {text!r}: reshard={value!r}.{did_you_mean(value, RESHARD)}'
            )
        else:
            options[key] = value
    ordered = tuple((axis, degrees[axis]) for axis in AXES if degrees.get(axis, 1) > 1)
    return Case(degrees=ordered, **options)


def _positive(text: str, key: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f'--layouts {text!r}: {key}={value!r} must be a positive whole number')
    return int(value)


DEFAULT = """
one process
data_shard=2
data_shard=2,reshard=layer
data_shard=2,reshard=never
data_replicate=2
data_replicate=2,reshard=layer
tensor=2
context=2
pipeline=2,schedule=1f1b
pipeline=2,schedule=gpipe
pipeline=2,schedule=interleaved_1f1b
pipeline=2,schedule=interleaved_zero_bubble
pipeline=2,schedule=zbv_zero_bubble
data_shard=4
data_replicate=2,data_shard=2
data_replicate=2,data_shard=2,reshard=layer
data_replicate=2,data_shard=2,reshard=never
tensor=4
context=4
pipeline=4,schedule=1f1b
data_shard=2,tensor=2
data_replicate=2,tensor=2
data_shard=2,context=2
context=2,tensor=2
pipeline=2,data_shard=2
pipeline=2,data_replicate=2,schedule=interleaved_1f1b
pipeline=2,tensor=2
pipeline=2,context=2
data_replicate=2,data_shard=2,tensor=2
pipeline=2,data_shard=2,tensor=2
pipeline=2,context=2,tensor=2
data_shard=2,context=2,tensor=2
""".strip().splitlines()
"""Every axis alone, the ways it can be set, and products of two and three."""


def default_cases(processes: int, device: str) -> list[Case]:
    """Layouts that fit `processes`; on GPUs torch's ring attention, too."""
    texts = [*DEFAULT, 'context=2,context_attention=ring'] if device == 'cuda' else DEFAULT
    cases = [parse_case(text) for text in texts]
    return [case for case in cases if case.world_size <= processes]


def deepest(cases: Iterable[Case]) -> int:
    """Most stages of any layout."""
    return max((case.stages for case in cases), default=1)


def why_not(
    case: Case,
    model: nn.Module,
    seq_len: int,
    micro_batches: int,
    processes: int,
    packed: bool = False,
) -> str | None:
    """Why a layout cannot run at all; None if nothing is known against it.

    Args:
        case: The layout.
        model: The small model, which divides by what the user's divides by.
        seq_len: Tokens of a row.
        micro_batches: Micro-batches of a step on each rank.
        processes: Processes there are.
        packed: Whether rows hold several documents.
    """
    if case.world_size > processes:
        return f'needs {case.world_size} processes, there are {processes}'
    if packed and case.context_attention == 'ring':
        return 'ring attention takes one document a row, and these rows are packed'
    options = case.options({}).get('pipeline')
    try:
        check_layout(Layout(**dict(case.degrees)), model, seq_len, micro_batches, options)
    except ValueError as error:
        return str(error)
    return None


def names(cases: Sequence[Case]) -> list[str]:
    """Names of layouts, each once.

    Raises:
        ValueError: If one is named twice.
    """
    found = [case.name for case in cases]
    for name in found:
        if found.count(name) > 1:
            raise ValueError(f'--layouts: {name!r} is there twice')
    return found
