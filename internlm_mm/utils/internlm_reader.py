"""Reads a config of InternLM or InternEvo without running it.

Such a config is a Python program. Of the language only what configs are made of is understood:
literals, names that are defined above, arithmetic, `dict(...)` and its like, f-strings of names,
and InternEvo's `read_base()`. Anything else is an error that names the line.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from internlm_mm.utils.suggest import did_you_mean

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_CALLS: dict[str, Callable[..., Any]] = {
    'dict': dict,
    'list': list,
    'tuple': tuple,
    'int': int,
    'float': float,
    'str': str,
    'bool': bool,
    'round': round,
    'min': min,
    'max': max,
}
_LONGEST = 4096
"""Bits of the largest number: a power of powers would take all memory."""

UNDERSTOOD = (
    'literals, names defined above, arithmetic, dict(...), list(...), tuple(...), int(...) '
    'and f-strings of names'
)


@dataclass
class InternLMConfig:
    """What a config file defines.

    Attributes:
        path: The file.
        values: Every name at its top level, those of its bases included.
        used: Names that later lines have used, as constants.
    """

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def read_internlm_config(path: str | Path) -> InternLMConfig:
    """Read a config with its bases.

    Args:
        path: The file. `from configs._base_.x import *` inside `read_base()` is looked for from
            its folder upwards.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not of the language above; names file, line and what was found.
    """
    file = Path(path)
    if not file.is_file():
        choices = [other.name for other in file.parent.glob('*.py')]
        raise FileNotFoundError(f'no config {str(path)!r}.{did_you_mean(file.name, choices)}')
    return _read(file.resolve(), ())


def _read(path: Path, opened: tuple[Path, ...]) -> InternLMConfig:
    if path in opened:
        chain = ' -> '.join(file.name for file in (*opened, path))
        raise ValueError(f'{path}: configs inherit from each other in a circle: {chain}')
    try:
        tree = ast.parse(path.read_text(encoding='utf-8-sig'), str(path))
        return _Reader(path, opened).run(tree)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not valid Python: {error}') from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f'{path}: an expression is nested too deeply') from error


class _Reader:
    """Evaluates one file, statement by statement.

    Args:
        path: The file.
        opened: Files that inherit from it, outermost first.
    """

    def __init__(self, path: Path, opened: tuple[Path, ...]) -> None:
        self.config = InternLMConfig(path)
        self._opened = (*opened, path)
        self._imported: set[str] = set()

    def run(self, tree: ast.Module) -> InternLMConfig:
        """Evaluate the whole file."""
        for statement in tree.body:
            self._statement(statement)
        return self.config

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(ast.Constant()) | ast.Pass():
                pass  # docstrings, and texts that stand for comments
            case ast.Expr(ast.Call(ast.Attribute(value=target, attr='update')) as call):
                self._update(target, call)
            case ast.Assign(targets=targets, value=value):
                result = self._value(value)
                for target in targets:
                    self._assign(target, result)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._value(value))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                right = self._value(value)
                self.config.values[name] = self._calculate(node, op, self._name(node, name), right)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                self._imported |= {(alias.asname or alias.name).split('.')[0] for alias in names}
            case ast.With(items=[ast.withitem(ast.Call(ast.Name('read_base')))], body=body):
                for line in body:
                    self._inherit(line)
            case _:
                self._refuse(node, type(node).__name__)

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self.config.values[name] = value
            case ast.Subscript(value=container, slice=index):
                holder = self._value(container)
                if not isinstance(holder, (dict, list)):
                    self._refuse(target, f'a {type(holder).__name__}')
                self._try(target, holder.__setitem__, self._value(index), value)
            case ast.Tuple(elts=parts) if isinstance(value, (list, tuple)) and len(parts) == len(
                value
            ):
                for part, item in zip(parts, value, strict=True):
                    self._assign(part, item)
            case _:
                self._refuse(target, type(target).__name__)

    def _update(self, target: ast.expr, call: ast.Call) -> None:
        holder = self._value(target)
        if not isinstance(holder, dict):
            self._refuse(call, f'an update of a {type(holder).__name__}')
        positional, named = self._arguments(call)
        self._try(call, holder.update, *positional, **named)

    def _inherit(self, node: ast.stmt) -> None:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            self._refuse(node, 'no `from CONFIG import *`')
        base = self._base(node)
        found = _read(base, self._opened)
        self.config.used |= found.used
        for alias in node.names:
            if alias.name == '*':
                public = {k: v for k, v in found.values.items() if not k.startswith('_')}
                self.config.values |= public
            elif alias.name in found.values:
                self.config.values[alias.asname or alias.name] = found.values[alias.name]
            else:
                hint = did_you_mean(alias.name, found.values)
                raise ValueError(f'{self._where(node)}: {base} defines no {alias.name!r}.{hint}')

    def _base(self, node: ast.ImportFrom) -> Path:
        """File of a base: beside the config where the import is relative, else from there up."""
        path = self.config.path
        inside = Path(*(node.module or '').split('.')).with_suffix('.py')
        folders = [path.parents[node.level - 1]] if node.level else list(path.parents)
        for folder in folders:
            if (folder / inside).is_file():
                return folder / inside
        raise ValueError(
            f'{self._where(node)}: no {inside} in {folders[0]}'
            f'{"" if node.level else " or above"}; put the base there, as it was beside train.py'
        )

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value) if value is None or isinstance(
                value, (bool, int, float, str)
            ):
                return value
            case ast.Name(id=name):
                self.config.used.add(name)
                return self._name(node, name)
            case ast.Tuple(elts=items):
                return tuple(self._items(items))
            case ast.List(elts=items):
                return self._items(items)
            case ast.Dict(keys=keys, values=values):
                return self._dict(node, keys, values)
            case ast.BinOp(left=left, op=op, right=right):
                return self._calculate(node, op, self._value(left), self._value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
                return self._try(node, _SIGNS[type(op)], self._value(operand))
            case ast.Subscript(value=container, slice=index):
                return self._try(node, operator.getitem, self._value(container), self._value(index))
            case ast.JoinedStr(values=parts):
                return ''.join(map(self._piece, parts))
            case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
                positional, named = self._arguments(node)
                return self._try(node, _CALLS[name], *positional, **named)
            case ast.Attribute():
                self._refuse(node, 'an attribute of something imported')
            case ast.Call(func=function):
                self._refuse(node, f'a call of {ast.unparse(function)}')
            case _:
                self._refuse(node, type(node).__name__)

    def _name(self, node: ast.AST, name: str) -> Any:
        if name in self.config.values:
            return self.config.values[name]
        if name in self._imported:
            self._refuse(node, 'imported')
        hint = did_you_mean(name, self.config.values)
        raise ValueError(f'{self._where(node)}: {name!r} is not defined above.{hint}')

    def _items(self, nodes: list[ast.expr]) -> list[Any]:
        items: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                items += self._value(node.value)
            else:
                items.append(self._value(node))
        return items

    def _dict(
        self, node: ast.AST, keys: list[ast.expr | None], values: list[ast.expr]
    ) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in zip(keys, values, strict=True):
            if key is None:
                self._try(node, made.update, self._value(value))
            else:
                self._try(node, made.__setitem__, self._value(key), self._value(value))
        return made

    def _arguments(self, call: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        named: dict[str, Any] = {}
        for keyword in call.keywords:
            value = self._value(keyword.value)
            if keyword.arg is None:
                self._try(call, named.update, value)
            else:
                named[keyword.arg] = value
        return self._items(call.args), named

    def _piece(self, node: ast.expr) -> str:
        """One part of an f-string."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return str(self._value(value))
        self._refuse(node, 'a format')

    def _calculate(self, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, (int, float)) for value in (left, right))
        joins = isinstance(op, ast.Add) and isinstance(left, (str, list, tuple))
        if type(op) not in _ARITHMETIC or not (numbers or joins):
            self._refuse(node, f'{type(op).__name__} of {type(left).__name__}')
        if isinstance(op, ast.Pow) and abs(right) > _LONGEST:
            self._refuse(node, 'a number too large')
        result = self._try(node, _ARITHMETIC[type(op)], left, right)
        if isinstance(result, int) and result.bit_length() > _LONGEST:
            self._refuse(node, 'a number too large')
        if isinstance(result, complex) or (joins and len(result) > 16 * _LONGEST):
            self._refuse(node, 'no number' if isinstance(result, complex) else 'too long')
        return result

    def _try(self, node: ast.AST, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f'{self._where(node)}: {type(error).__name__}: {error}') from error

    def _refuse(self, node: ast.AST, what: str) -> NoReturn:
        raise ValueError(
            f'{self._where(node)} is {what}. Configs are read without running them: write the '
            f'value itself. Understood are {UNDERSTOOD}'
        )

    def _where(self, node: ast.AST) -> str:
        text = ast.unparse(node).partition('\n')[0]
        text = text if len(text) <= 80 else f'{text[:77]}...'
        return f'{self.config.path}, line {getattr(node, "lineno", "?")}: {text!r}'


def find_value(values: Mapping[str, Any], dotted: str, missing: Any = None) -> Any:
    """The value at `a.b.c` of nested dicts, or `missing`."""
    node: Any = values
    for key in dotted.split('.'):
        if not isinstance(node, Mapping) or key not in node:
            return missing
        node = node[key]
    return node
