"""From what a config writes as `type` to the class or function."""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry

from internlm_mm import registry as registries
from internlm_mm.utils.config_reader import ConfigError
from internlm_mm.utils.suggest import did_you_mean


def resolve_type(named: Any, registry: Registry | None, where: str) -> Callable[..., Any]:
    """The class or function that a `type` names.

    Args:
        named: A class, a lazy import of one, a dotted path, or a registered name.
        registry: Where names are looked up; None is any of ours.
        where: The key that messages begin with.

    Raises:
        ConfigError: If there is none; names the nearest registered name.
    """
    if isinstance(named, (LazyObject, LazyAttr)):
        named = import_lazy(named, where)
    if callable(named):
        return named
    if not isinstance(named, str):
        raise ConfigError(f'{where}={named!r}: expected a class or the name of one')
    found = _imported(named) if '.' in named else None
    searched = _all_registries() if registry is None else [registry]
    for candidate in searched:
        found = found or _lookup(candidate, named)
    if found is None:
        names = sorted({name for one in searched for name in _names(one)})
        kind = 'class' if registry is None else registry.name
        raise ConfigError(
            f'{where}={named!r}: no {kind} is registered under this name.'
            f'{did_you_mean(named.split(".")[-1], names)}'
        )
    return found


def _lookup(registry: Registry, name: str) -> Callable[..., Any] | None:
    for one in _ancestors(registry):
        one.import_from_location()
    return registry.get(name)


def _names(registry: Registry) -> list[str]:
    return [name for one in _ancestors(registry) for name in one.module_dict]


def _ancestors(registry: Registry) -> Iterator[Registry]:
    one: Registry | None = registry
    while one is not None:
        yield one
        one = one.parent


def _all_registries() -> list[Registry]:
    return [value for value in vars(registries).values() if isinstance(value, Registry)]


def _imported(dotted: str) -> Callable[..., Any] | None:
    """The class or function at a dotted path such as `torch.nn.Linear`, if there is one."""
    parts = dotted.split('.')
    for cut in range(len(parts) - 1, 0, -1):
        module = '.'.join(parts[:cut])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if f'{module}.'.startswith(f'{error.name}.'):
                continue
            raise ConfigError(f'{dotted!r} cannot be imported: {error}') from error
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found if callable(found) else None
    return None


def import_lazy(lazy: LazyObject | LazyAttr, where: str) -> Any:
    """Import what a config imported lazily; `where` is the key it stands at.

    Raises:
        ConfigError: If it cannot be imported; names the line of the import.
    """
    try:
        return lazy.build()
    except ImportError as error:
        try:
            names = dir(import_module(str(lazy.module)))
        except ImportError:
            names = []
        hint = did_you_mean(str(lazy), names)
        if find_spec(str(lazy.module).partition('.')[0]) is None:
            hint = ' Is it on PYTHONPATH?'
        location = lazy.location or 'the config'
        raise ConfigError(
            f'{where}: {location} imports {lazy} from {lazy.module}: {error}.{hint}'
        ) from error
