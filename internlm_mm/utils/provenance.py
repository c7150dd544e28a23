"""Which file and line set a value of a config.

The config is run as usual, one statement after the other, and the value in question is compared
before and after each: what changed it is found however it was written. The statement's syntax
then tells the line inside it, and the statements that repeated the value already there.
"""

import ast
import linecache
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_mm.utils.config import apply_options, find_config, load_config, to_plain
from internlm_mm.utils.config_reader import ConfigError, ConfigReader, Names
from internlm_mm.utils.suggest import did_you_mean

_MISSING = '(nothing)'
_MERGING = ('update', 'merge', 'setdefault')


@dataclass(frozen=True)
class Setting:
    """One place that set a value.

    Attributes:
        file: The config file; None for the command line.
        line: Line in it, from 1; 0 for the command line.
        source: The text of that line.
        value: The value afterwards, in built-in types; None too where it was removed.
        removed: Whether the value was there before and is gone now.
        through: Settings of the helper variable whose value was taken, if one was.
    """

    file: Path | None
    line: int
    source: str
    value: Any
    removed: bool = False
    through: tuple['Setting', ...] = ()

    def __str__(self) -> str:
        if self.file is None:
            return f'--cfg-options: {self.source}'
        text = f'{self.file}:{self.line}: {self.source}'
        if isinstance(self.value, (dict, list)):  # longer than it helps
            return text
        return f'{text}  -> {_MISSING if self.removed else repr(self.value)}'


def explain(path: str | Path, key: str, options: Mapping[str, Any] | None = None) -> list[Setting]:
    """Every place that set the value at a dotted key, first to last; the last one holds.

    Args:
        path: The config, as for `load_config`.
        key: Such as `model.num_layers` or `param_scheduler.0.end`.
        options: Overrides by dotted key, as from `parse_cfg_options`.

    Raises:
        ConfigError: If the config has no such key; names the nearest.
    """
    cfg = load_config(path, options)
    keys = tuple(key.split('.'))
    _require(to_plain(cfg._cfg_dict), keys)
    file = find_config(path)
    if file.suffix == '.json':
        settings = [Setting(file, 1, '(JSON)', _at(to_plain(cfg._cfg_dict), keys))]
    else:
        settings = _history(file, keys)
    before = load_config(path)
    for dotted, value in (options or {}).items():
        given = tuple(dotted.split('.'))
        if given[: len(keys)] != keys and keys[: len(given)] != given:
            continue
        apply_options(before, {dotted: value})
        now = _at(to_plain(before._cfg_dict), keys)
        settings.append(Setting(None, 0, f'{dotted}={value}', now, now == _MISSING))
    return settings


def _require(values: Any, keys: tuple[str, ...]) -> None:
    for depth in range(1, len(keys) + 1):
        if _at(values, keys[:depth]) == _MISSING:
            node = _at(values, keys[: depth - 1])
            choices = range(len(node)) if isinstance(node, (list, tuple)) else node
            hint = did_you_mean(keys[depth - 1], choices) if not isinstance(node, str) else ''
            raise ConfigError(f'the config has no {".".join(keys[:depth])!r}.{hint}')


def _at(node: Any, keys: Sequence[str]) -> Any:
    """Value at `keys` inside built-in containers, or `_MISSING`."""
    for key in keys:
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, (list, tuple)) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return _MISSING
    return node


def _history(
    path: Path, keys: tuple[str, ...], before_line: int | None = None, depth: int = 0
) -> list[Setting]:
    historian = _Historian(keys, before_line, depth)
    historian.read(path)
    return historian.settings


class _Historian(ConfigReader):
    """Watches one dotted key while a config runs.

    Args:
        keys: The key.
        before_line: Statements of the outermost file from this line on are not watched.
        depth: How many variables have been followed to get here.
    """

    def __init__(self, keys: tuple[str, ...], before_line: int | None, depth: int) -> None:
        super().__init__()
        self.keys = keys
        self.before_line = before_line
        self.depth = depth
        self.settings: list[Setting] = []
        self._value: list[Any] = []  # the value as it was, one a file that is open

    def read(self, path: Path) -> Names:
        self._value.append(_MISSING)
        try:
            return super().read(path)
        finally:
            self._value.pop()

    def inherited(self, path: Path, node: ast.ImportFrom, base: Path, names: Names) -> None:
        del path
        for alias in node.names:
            bound = alias.asname or alias.name
            if alias.name == '*' or bound == self.keys[0]:
                name = self.keys[0] if alias.name == '*' else alias.name
                inner = (name, *self.keys[1:])
                self.settings += [] if self._nested() else _history(base, inner, None, self.depth)
        self._value[-1] = _at(_plain(names, self.keys[0]), self.keys)

    def executed(self, path: Path, statement: ast.stmt, names: Names) -> None:
        if self._nested() or (self.before_line and statement.lineno >= self.before_line):
            return
        now, before = _at(_plain(names, self.keys[0]), self.keys), self._value[-1]
        spots = list(_spots(statement, self.keys))
        self._value[-1] = now
        if now == before and not any(spot.whole for spot in spots):
            return
        spot = spots[-1] if spots else _Spot(statement.lineno, False, None)
        through: list[Setting] = []
        if spot.name and self.depth < 5:
            through = _history(path, spot.name, statement.lineno, self.depth + 1)
        self.settings.append(
            Setting(
                path,
                spot.line,
                linecache.getline(str(path), spot.line).strip(),
                None if now == _MISSING else now,
                now == _MISSING,
                tuple(through),
            )
        )

    def _nested(self) -> bool:
        return len(self._value) > 1


def _plain(names: Names, key: str) -> dict[str, Any]:
    return {key: to_plain(names.values[key])} if key in names.values else {}


@dataclass(frozen=True)
class _Spot:
    """Where a statement speaks of a key: the line, whether of all of it, and a name it copies."""

    line: int
    whole: bool
    name: tuple[str, ...] | None


def _spots(statement: ast.AST, keys: tuple[str, ...]) -> Iterator[_Spot]:
    """Places inside a statement that name the key or what holds it, in the order they run."""
    for node in ast.walk(statement):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from _assigned(target, value, keys)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                yield from _assigned(target, value, keys)
            case ast.AugAssign(target=target):
                if (chain := _chain(target)) and keys[: len(chain)] == chain:
                    yield _Spot(node.lineno, chain == keys, None)
            case ast.Call(func=ast.Attribute(value=holder, attr=method)):
                chain = _chain(holder)
                if chain and keys[: len(chain)] == chain:
                    rest = keys[len(chain) :]
                    if method in _MERGING and rest:
                        yield from _merged(node, rest)
                    elif method not in _MERGING:
                        yield _Spot(node.lineno, False, None)


def _assigned(target: ast.expr, value: ast.expr, keys: tuple[str, ...]) -> Iterator[_Spot]:
    chain = _chain(target)
    if chain and keys[: len(chain)] == chain:
        yield _inside(value, keys[len(chain) :], target.lineno)


def _merged(call: ast.Call, rest: tuple[str, ...]) -> Iterator[_Spot]:
    """Spots of `holder.update(...)`: in its keywords, or in a dict that it is given."""
    for argument in call.args:
        spot = _inside(argument, rest, call.lineno)
        if spot.whole or spot.line != call.lineno:
            yield spot
    for keyword in call.keywords:
        if keyword.arg == rest[0]:
            yield _inside(keyword.value, rest[1:], keyword.lineno)


def _inside(value: ast.expr, rest: tuple[str, ...], line: int) -> _Spot:
    """The spot of `rest` inside the expression that gives the value of what holds it."""
    if not rest:
        return _Spot(line, True, _chain(value))
    match value:
        case ast.Call(func=ast.Name('dict'), keywords=keywords):
            for keyword in keywords:
                if keyword.arg == rest[0]:
                    return _inside(keyword.value, rest[1:], keyword.lineno)
        case ast.Dict(keys=names, values=values):
            for name, item in zip(names, values, strict=True):
                if isinstance(name, ast.Constant) and str(name.value) == rest[0]:
                    return _inside(item, rest[1:], name.lineno)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            if rest[0].isdigit() and int(rest[0]) < len(items):
                item = items[int(rest[0])]
                return _inside(item, rest[1:], item.lineno)
    copied = _chain(value)
    return _Spot(line, copied is not None, (*copied, *rest) if copied else None)


def _chain(node: ast.AST) -> tuple[str, ...] | None:
    """`a.b['c'][0]` as ('a', 'b', 'c', '0'); None for any other expression."""
    match node:
        case ast.Name(name):
            return (name,)
        case ast.Attribute(value=holder, attr=name):
            found = _chain(holder)
            return (*found, name) if found else None
        case ast.Subscript(value=holder, slice=ast.Constant(value=key)):
            found = _chain(holder)
            return (*found, str(key)) if found else None
    return None
