"""A config of ours in the making: settings with where they came from, and the text of the file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from internlm_mm.utils.internlm_config_keys import CONSTANTS, DROPPED
from internlm_mm.utils.internlm_reader import InternLMConfig, find_value
from internlm_mm.utils.suggest import did_you_mean

Status = Literal['mapped', 'changed', 'dropped', 'unknown']
Kind = TypeVar('Kind')
_MISSING = object()
_WIDTH = 100
_ORDER = (
    '',
    'model',
    'tokenizer',
    'train_dataloader',
    'val_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'strategy',
    'default_hooks',
)


class Code(str):
    """Text that is written into a config as it is."""


class Row(NamedTuple):
    """What became of one key.

    Attributes:
        key: Dotted, in the original.
        value: Its value there.
        status: 'mapped'; 'changed', where the run will differ; 'dropped', where nothing is lost;
            'unknown'.
        became: Our key with its value, or the reason.
    """

    key: str
    value: Any
    status: Status
    became: str


class _Entry(NamedTuple):
    name: str
    value: Any
    comment: str


@dataclass
class Draft:
    """Takes values out of an InternLM config and settings into one of ours.

    Attributes:
        source: What is converted.
        rows: What became of each key so far.
        bases: Modules that the config inherits from.
        classes: Names that it imports, with their modules.
    """

    source: InternLMConfig
    rows: dict[str, Row] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    _blocks: dict[str, list[_Entry]] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    def take(self, key: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """The value at a dotted key, of a kind, or the default.

        Raises:
            ValueError: If it is of another kind, or missing where there is no default.
        """
        value: Any = self.look(key, _MISSING)
        if value is _MISSING:
            if default is None:
                section, _, name = key.rpartition('.')
                there = find_value(self.source.values, section, {}) if section else {}
                hint = did_you_mean(name, there) if isinstance(there, dict) and there else ''
                raise ValueError(f'{self.source.path} has no {key}, which it needs.{hint}')
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return value  # type: ignore[return-value]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f'{self.source.path}: {key}={value!r}: expected {kind.__name__}')
        return value

    def look(self, key: str, missing: Any = None) -> Any:
        """The value at a dotted key as it is; the key is known from now on."""
        self._known.add(key)
        return find_value(self.source.values, key, missing)

    def put(
        self, block: str, name: str, value: Any, *keys: str, note: str = '', changed: bool = False
    ) -> None:
        """Set an option.

        Args:
            block: 'x' for `x.update(name=value)`, 'x =' for `x = dict(name=value)`, '' for
                `name = value`.
            name: The option.
            value: Its value.
            keys: Where it comes from; those that the original has get a row.
            note: What else to say in the row.
            changed: Whether the run will differ from the original's.
        """
        values = self.source.values
        here = [key for key in keys if find_value(values, key, _MISSING) is not _MISSING]
        self._known.update(keys)
        self._blocks.setdefault(block, []).append(_Entry(name, value, ', '.join(here)))
        target = f'{block.removesuffix(" =")}.{name}'.lstrip('.')
        became = f'{target}={literal(value)}' + (f'; {note}' if note else '')
        for key in here:
            self._row(key, 'changed' if changed else 'mapped', became)

    def say(self, key: str, text: str, status: Status = 'dropped') -> None:
        """Explain a key that the original has; nothing if it has not."""
        self._known.add(key)
        if find_value(self.source.values, key, _MISSING) is not _MISSING:
            self._row(key, status, text)

    def use(self, module: str, name: str) -> Code:
        """The name of a class, which the config will import."""
        self.classes[name] = module
        return Code(name)

    def finish(self) -> None:
        """Explain every key that nobody has taken.

        Raises:
            ValueError: If one asks for something that cannot be had.
        """
        for key, value in _leaves(self.source.values, self.source.used):
            if not any(_inside(key, done) for done in self.rows):
                self._explain(key, value)

    def _explain(self, key: str, value: Any) -> None:
        rule = max((name for name in DROPPED if _inside(key, name)), key=len, default=None)
        if rule is not None:
            self._drop(rule)
        elif '.' not in key and (key in CONSTANTS or key in self.source.used):
            self._constant(key, value)
        elif any(_inside(known, key) or _inside(key, known) for known in self._known):
            self._row(key, 'dropped', 'without effect with these values')
        else:
            known = {*self._known, *DROPPED, *CONSTANTS}
            section = key.rpartition('.')[0]
            near = [name for name in known if name.rpartition('.')[0] == section] or known
            self._row(key, 'unknown', f'not a key of InternLM that we know.{_nearest(key, near)}')

    def _drop(self, key: str) -> None:
        rule, value = DROPPED[key], find_value(self.source.values, key)
        if not rule.only or value in rule.only:
            self._row(key, 'dropped', rule.reason)
        elif rule.refused:
            raise ValueError(f'{self.source.path}: {key}={value!r} cannot be had: {rule.otherwise}')
        else:
            self._row(key, 'changed', rule.otherwise)

    def _constant(self, key: str, value: Any) -> None:
        target = CONSTANTS.get(key)
        actual = find_value(self.source.values, target, value) if target else value
        if target and actual != value and key.isupper() and not isinstance(value, str):
            text = f'a constant; {target}={actual!r} counts, where the original mixed the two'
            self._row(key, 'changed', text)
        else:
            used = key in self.source.used
            text = 'a constant: its value stands where it was used' if used else 'nothing uses it'
            self._row(key, 'dropped', text)

    def _row(self, key: str, status: Status, text: str) -> None:
        self.rows[key] = Row(key, find_value(self.source.values, key), status, text)

    # ---------------------------------------------------------------------------------- text

    def text(self, heading: str) -> str:
        """The config.

        Args:
            heading: Its docstring; lines that begin with "- " are wrapped.
        """
        body = [
            part
            for line in heading.split('\n')
            for part in (_wrap(line, '', '  ') if line.startswith('- ') else [line])
        ]
        lines = ['"""' + '\n'.join(body) + '"""', '']
        lines += self._comments('Different from the original', 'changed')
        lines += self._comments('Not understood, and left out', 'unknown')
        lines += self._comments('Left out, and nothing is lost', 'dropped')
        lines += ['from mmengine.config import read_base', '', 'with read_base():']
        lines += [f'    from internlm_mm.configs.{base} import *' for base in sorted(self.bases)]
        lines.append('')
        for module in sorted(set(self.classes.values())):
            names = sorted(name for name, where in self.classes.items() if where == module)
            lines.append(f'from {module} import {", ".join(names)}')
        lines += ['', *self._settings()]
        return '\n'.join(lines) + '\n'

    def _comments(self, title: str, status: Status) -> Iterator[str]:
        """Rows of one kind; keys with the same reason stand together."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows.values():
            if row.status == status:
                reasons.setdefault(row.became, []).append(f'{row.key}={short(row.value)}')
        if reasons:
            yield f'# {title}:'
            for reason, keys in reasons.items():
                yield from _wrap(f'{", ".join(keys)}: {reason}', '#   ', '#     ')
            yield ''

    def _settings(self) -> Iterator[str]:
        for block in sorted(self._blocks, key=_position):
            entries = self._blocks[block]
            name = block.removesuffix(' =')
            if not block:
                for entry in entries:
                    yield from _line(f'{entry.name} = {literal(entry.value)}', entry.comment, '')
            elif len(entries) == 1 and name == block:
                text = f'{entries[0].name}={literal(entries[0].value)}'
                yield from _line(f'{name}.update({text})', entries[0].comment, '')
            else:
                yield f'{name}.update(' if name == block else f'{block} dict('
                for entry in entries:
                    yield from _line(f'{entry.name}={literal(entry.value)},', entry.comment, '    ')
                yield ')'


def table(rows: Iterable[Row]) -> str:
    """What became of each key, a line each."""
    found = [(row.status, f'{row.key}={short(row.value)}', row.became) for row in rows]
    if not found:
        return ''
    width = min(max(len(left) for _, left, _ in found), 60)
    return '\n'.join(f'{status:8} {left:{width}}  {text}' for status, left, text in found)


def literal(value: Any) -> str:
    """How a value is written in a config."""
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, Mapping):
        return f'dict({", ".join(f"{key}={literal(item)}" for key, item in value.items())})'
    if isinstance(value, (list, tuple)):
        left, right = '[]' if isinstance(value, list) else '()'
        comma = ',' if isinstance(value, tuple) and len(value) == 1 else ''
        return f'{left}{", ".join(map(literal, value))}{comma}{right}'
    if isinstance(value, float) and value - value != 0:  # inf and nan have no literal
        return f'float({str(value)!r})'
    if isinstance(value, (int, float)) and 10_000 <= abs(value) < 1e15 and value == int(value):
        return f'{value:_}'
    return repr(value)


def short(value: Any) -> str:
    """A value in a line of a table."""
    text = repr(value)
    return text if len(text) <= 40 else f'{text[:37]}...'


def _position(block: str) -> int:
    first = block.partition('.')[0].partition('[')[0].removesuffix(' =')
    return _ORDER.index(first) if first in _ORDER else len(_ORDER)


def _wrap(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _line(code: str, comment: str, indent: str) -> Iterator[str]:
    whole = f'{indent}{code}  # {comment}' if comment else f'{indent}{code}'
    if len(whole) > _WIDTH and comment:
        yield f'{indent}# {comment}'
        whole = f'{indent}{code}'
    yield whole


def _leaves(
    values: Mapping[str, Any], constants: set[str], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a dict is its items, unless it only served to build others."""
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and value
        if is_section and (prefix or key not in constants or f'{key}.' in _SECTIONS):
            yield from _leaves(value, set(), f'{prefix}{key}.')
        elif not (prefix == '' and key.startswith('_')):
            yield f'{prefix}{key}', value


_SECTIONS = {f'{key.partition(".")[0]}.' for key in (*DROPPED, *CONSTANTS.values()) if '.' in key}


def _inside(key: str, of: str) -> bool:
    return key == of or key.startswith(f'{of}.')


def _nearest(key: str, names: Iterable[str]) -> str:
    hint = did_you_mean(key, names)
    return hint if hint.startswith(' Did you mean') else ''
