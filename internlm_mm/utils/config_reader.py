"""Reads a pure Python config: bases through `read_base`, everything imported left unimported.

The language is MMEngine's new style. MMEngine's own reader is not used because it finds absolute
bases through pkg_resources (gone from setuptools 82 on), takes parts of the standard library for
lazy objects, and cannot say which line set a value.
"""

import ast
import sys
import traceback
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyObject

from internlm_mm.utils.suggest import did_you_mean

PACKAGE = 'internlm_mm'


class ConfigError(ValueError):
    """A config that cannot be read, or says something that nothing understands."""


def shipped_configs() -> Path:
    """Folder of our own configs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / 'configs'
    return inside if inside.is_dir() else package.parent / 'configs'


@dataclass
class Names:
    """What a config file defines.

    Attributes:
        values: Every name of the file, those of its bases included.
        imported: Names that stand for imports and are no settings.
    """

    values: dict[str, Any]
    imported: set[str] = field(default_factory=set)


class ConfigReader:
    """Executes a config file and its bases, one statement after the other.

    `inherited` and `executed` are called after the statement that they name; a subclass overrides
    them to watch.
    """

    def __init__(self) -> None:
        self._open: list[Path] = []  # files that are being read, outermost first

    def read(self, path: Path) -> Names:
        """Names that the config at `path` defines.

        Raises:
            ConfigError: If the file or a base is not a valid config; names the file and the line.
        """
        path = path.resolve()
        if path in self._open:
            chain = ' -> '.join(file.name for file in [*self._open, path])
            raise ConfigError(f'{path}: configs inherit from each other in a circle: {chain}')
        try:
            tree = ast.parse(path.read_text(encoding='utf-8-sig'), str(path))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ConfigError(f'{path} is not valid Python: {error}') from error
        names = Names({'__file__': str(path), '__name__': path.stem})
        lazy = ConfigDict.lazy
        ConfigDict.lazy = True  # otherwise touching a class in a dict would import it
        self._open.append(path)
        try:
            for statement in tree.body:
                self._run(path, statement, names)
        finally:
            self._open.pop()
            ConfigDict.lazy = lazy
        values = {k: v for k, v in names.values.items() if not k.startswith('__')}
        return Names(_as_config(values), names.imported)

    def inherited(self, path: Path, node: ast.ImportFrom, base: Path, names: Names) -> None:
        """`node` of the file at `path` has copied names of the config `base` into `names`."""

    def executed(self, path: Path, statement: ast.stmt, names: Names) -> None:
        """`statement` of the file at `path` has run and changed `names`."""

    def _run(self, path: Path, statement: ast.stmt, names: Names) -> None:
        where = f'{path}, line {statement.lineno}'
        match statement:
            case ast.With(items=[ast.withitem(ast.Call(ast.Name('read_base')))]):
                for node in statement.body:
                    if not isinstance(node, ast.ImportFrom):
                        raise ConfigError(
                            f'{path}, line {node.lineno}: inside read_base() only '
                            '`from <config> import <names>` is understood'
                        )
                    self._inherit(path, node, names)
            case ast.With():
                raise ConfigError(f'{where}: the only `with` in a config is `with read_base():`')
            case ast.Import() | ast.ImportFrom():
                _import(where, statement, names)
            case ast.Assign(targets=[ast.Name('_base_')]):
                raise ConfigError(
                    f'{where}: text bases (_base_ = [...]) are not read; write '
                    '`with read_base(): from .base import *`'
                )
            case _:
                _execute(path, statement, names)
                self.executed(path, statement, names)

    def _inherit(self, path: Path, node: ast.ImportFrom, names: Names) -> None:
        where = f'{path}, line {node.lineno}'
        base = base_path(path, node)
        if not base.is_file():
            choices = [file.stem for file in base.parent.glob('*.py')]
            raise ConfigError(
                f'{where}: no config {base} to inherit from.{did_you_mean(base.stem, choices)}'
            )
        found = self.read(base)
        for alias in node.names:
            if alias.name == '*':
                names.values |= found.values
                names.imported |= found.imported
            elif alias.name in found.values:
                names.values[alias.asname or alias.name] = found.values[alias.name]
                if alias.name in found.imported:
                    names.imported.add(alias.asname or alias.name)
            else:
                hint = did_you_mean(alias.name, found.values)
                raise ConfigError(f'{where}: {base} defines no {alias.name!r}.{hint}')
        self.inherited(path, node, base, names)


def base_path(path: Path, node: ast.ImportFrom) -> Path:
    """File that an import inside `read_base()` of the config at `path` means.

    Relative imports start at the config; `internlm_mm.configs.x` is our own config wherever it
    was installed; any other package is looked up where Python would find it, and not imported.
    """
    where = f'{path}, line {node.lineno}'
    if node.module is None:
        raise ConfigError(f'{where}: name the config: `from .<config> import <names>`')
    parts = node.module.split('.')
    if node.level:
        folder = path.parents[node.level - 1]
    elif parts[:2] == [PACKAGE, 'configs']:
        folder, parts = shipped_configs(), parts[2:]
    else:
        spec = find_spec(parts[0])
        locations = list(spec.submodule_search_locations or ()) if spec else []
        if not locations:
            raise ConfigError(
                f'{where}: no package {parts[0]!r} to inherit from; is it on PYTHONPATH?'
            )
        files = [Path(location).joinpath(*parts[1:]).with_suffix('.py') for location in locations]
        return next((file for file in files if file.is_file()), files[0])
    return folder.joinpath(*parts[:-1], f'{parts[-1]}.py') if parts else folder


def _import(where: str, node: ast.Import | ast.ImportFrom, names: Names) -> None:
    """Bind an import outside `read_base()`: the standard library really, others lazily."""
    module = '.' * getattr(node, 'level', 0) + (getattr(node, 'module', None) or '')
    if module == 'mmengine.config' or module == '__future__':
        return  # read_base itself
    if module.startswith('.'):
        raise ConfigError(f'{where}: inherit from another config inside `with read_base():`')
    for alias in node.names:
        root = (module or alias.name).split('.')[0]
        if alias.name == '*':
            raise ConfigError(f'{where}: `import *` is for configs inside `with read_base():`')
        bound = alias.asname or (alias.name if module else root)
        names.imported.add(bound)
        if root in sys.stdlib_module_names:
            code = ast.Module([_only(node, alias)], [])
            exec(compile(code, where, 'exec'), names.values)
        elif module:
            names.values[bound] = LazyObject(module, alias.name, where)
        elif alias.asname:
            names.values[bound] = LazyObject(alias.name, location=where)
        else:
            earlier = names.values.get(bound)
            modules = list(earlier._module) if isinstance(earlier, LazyObject) else []
            names.values[bound] = LazyObject([*modules, alias.name], location=where)


def _only(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(node, ast.Import):
        return ast.copy_location(ast.Import([alias]), node)
    return ast.copy_location(ast.ImportFrom(node.module, [alias], node.level), node)


def _execute(path: Path, statement: ast.stmt, names: Names) -> None:
    try:
        exec(compile(ast.Module([statement], []), str(path), 'exec'), names.values)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        message = f'{type(error).__name__}: {error}'
        if isinstance(error, RuntimeError) and not error.args:
            message = 'an imported name is called; write dict(type=Name, option=...) instead'
        elif isinstance(error, NameError):
            message = f'{error}.{did_you_mean(error.name, names.values)}'
        raise ConfigError(f'{path}, line {line or statement.lineno}: {message}') from error
    names.values.pop('__builtins__', None)


def _as_config(value: Any) -> Any:
    """`value` with every dict in it made a ConfigDict, so that a child's `update` merges deeply."""
    if isinstance(value, dict):
        made = ConfigDict()
        for key, item in dict.items(value):
            made[key] = _as_config(item)
        return made
    if type(value) in (list, tuple):
        return type(value)(_as_config(item) for item in value)
    return value
