"""What `load_from` says, and which weights a run then takes in which order."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.checkpoint.base import Base, describe_base, find_base, recorded_base, sees_all
from internlm_mm.checkpoint.foreign import is_foreign
from internlm_mm.checkpoint.step_folders import read_model_state
from internlm_mm.engine.hooks.checkpoint_hook import StepCheckpointHook
from internlm_mm.utils.adapters import is_adapter
from internlm_mm.utils.suggest import did_you_mean

CONTENT = ('model', 'optimizer', 'data', 'scheduler')
"""What `load_from=dict(path=..., content=[...])` can take from a checkpoint."""

FOREIGN = ('format', 'settings')
"""Further keys of `load_from` where the path is of another program; see `open_source`."""

ADAPTERS = ('base', 'adapter')
"""Further keys of `load_from`: where the frozen weights of a checkpoint of adapters are now; a
folder of PEFT whose adapters are laid over the weights."""


class Start(NamedTuple):
    """A checkpoint, or the weights of another program, to begin from.

    Attributes:
        path: Its folder.
        content: What to take from it; names of `CONTENT`.
        random: Whether random generators go on where they were.
        foreign: Options of `open_source` for weights of another program; None for a checkpoint of
            ours.
        base: Of a checkpoint of adapters: where its frozen weights come from, before it.
        adapter: A folder of PEFT whose adapters are laid over the weights.
    """

    path: Path
    content: tuple[str, ...]
    random: bool
    foreign: Mapping[str, Any] | None = None
    base: 'Start | None' = None
    adapter: Path | None = None

    def chain(self) -> list['Start']:
        """All that is loaded, in its order."""
        return [self] if self.base is None else [self.base, self]


def parse_load_from(
    load_from: str | Mapping[str, Any],
) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Path, content and further options of the key `load_from`; a path alone means the weights.

    Raises:
        ValueError: If a key or a part is unknown.
    """
    if isinstance(load_from, str):
        return load_from, ('model',), {}
    rest = dict(load_from)
    path = rest.pop('path', None)
    content = tuple(rest.pop('content', ('model',)))
    options = {key: rest.pop(key) for key in FOREIGN + ADAPTERS if key in rest}
    for key, value in rest.items():
        hint = did_you_mean(key, ('path', 'content', *FOREIGN, *ADAPTERS))
        raise ValueError(f'load_from.{key}={value!r} is unknown.{hint}')
    if path is None:
        raise ValueError(f'load_from={dict(load_from)}: expected dict(path=..., content=[...])')
    for part in content:
        if part not in CONTENT:
            raise ValueError(
                f'load_from.content: {part!r} is unknown.{did_you_mean(part, CONTENT)}'
            )
    return path, content, options


def with_base(start: Start, load_from: str | Mapping[str, Any] | None) -> Start:
    """Add the frozen weights that a checkpoint of adapters was trained over, if it is one.

    Args:
        start: A checkpoint, or weights of another program.
        load_from: The run's, which may say where frozen weights are now.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If others are there.
    """
    if start.foreign is not None or 'model' not in start.content:
        return start
    said = recorded_base(start.path)
    if said is None:
        return start
    named = {'path': load_from} if isinstance(load_from, str) else dict(load_from or {})
    instead = named.get('base')
    if instead is None and start.random and not said.path.is_dir():
        instead = named.get('path')  # what the run that is resumed began with has been moved
    base = find_base(start.path, instead, 'load_from' if start.random else 'load_from.base')
    assert base is not None
    foreign = base.options if base.options or is_foreign(base.path) else None
    return start._replace(base=Start(base.path, ('model',), False, foreign))


def base_of(start: Start | None, model: Any) -> Base | None:
    """The frozen weights that a run's checkpoints need not hold, since others do.

    Args:
        start: What the run begins with.
        model: The run's, whole.

    Returns:
        None where nothing is frozen under adapters, or what is frozen lies nowhere else.
    """
    has_adapters = any(is_adapter(name) for name, _ in model.named_parameters())
    if start is None or 'model' not in start.content or not has_adapters:
        return None
    first = start.chain()[0]
    said = recorded_base(start.path) if start.base is not None else None
    if said is not None and sees_all(said._replace(path=first.path)):
        return said._replace(path=first.path)  # compared when the start was chosen
    if first.foreign is not None:
        return describe_base(first.path, first.foreign)
    holds_all = any(is_adapter(name) for name in read_model_state(first.path))
    return None if holds_all else describe_base(first.path)


def check_base(base: Base | None, model: Any, hooks: Iterable[Any]) -> None:
    """Refuse to save adapters over weights in 4 bits that nobody else holds as they are.

    Args:
        base: From `base_of`.
        model: The run's, whole.
        hooks: Of the run, which without a `StepCheckpointHook` saves nothing.

    Raises:
        ValueError: Saying what to set.
    """
    if base is not None or not any(isinstance(hook, StepCheckpointHook) for hook in hooks):
        return
    if any(getattr(module, 'four_bit', False) for module in model.modules()):
        raise ValueError(
            'model.adapter.four_bit=True rounds frozen weights, and checkpoints hold the adapters '
            'alone: set load_from to the weights that they belong to'
        )
