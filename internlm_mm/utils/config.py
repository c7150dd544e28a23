"""Configs: found by path or by name, read, overridden from the command line, written back."""

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.utils import import_modules_from_strings

from internlm_mm.utils.config_check import MASK, check_config
from internlm_mm.utils.config_reader import ConfigError, ConfigReader, shipped_configs
from internlm_mm.utils.suggest import did_you_mean

__all__ = [
    'MASK',
    'ConfigError',
    'apply_options',
    'check_config',
    'dump_config',
    'find_config',
    'load_config',
    'parse_cfg_options',
    'to_plain',
]

_SECRET = re.compile(
    r'(^|_)(password|passwd|secret|secrets|credentials?|authorization|(api|access|private|secret)_?key'
    r'|(api|auth|access|refresh|bearer|hf|hub|huggingface|wandb|github)_token)$|^token$',
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r'(?<=://)[^/@\s]+:[^/@\s]+(?=@)')


def find_config(path: str | Path) -> Path:
    """The config file that a user means.

    Args:
        path: A file; or the name of one of our own configs with or without `configs/` and `.py`,
            which is found from any folder.

    Raises:
        FileNotFoundError: If there is none; names the nearest of our own and of the files beside.
    """
    given = Path(path)
    if given.is_file():
        return given.resolve()
    shipped = shipped_configs()
    parts = given.with_suffix('').parts if given.suffix == '.py' else given.parts
    name = Path(*(parts[1:] if parts[:1] == ('configs',) else parts))
    if parts and not given.is_absolute() and (shipped / f'{name}.py').is_file():
        return (shipped / f'{name}.py').resolve()
    if given.is_dir():
        raise FileNotFoundError(f'no config {str(path)!r}: it is a folder')
    known = []
    if given.suffix == '.py' or len(parts) == 1:
        known = [file.name for file in given.parent.glob('*.py')]
    if given.suffix == '.py' or len(name.parts) == 1:  # another path means no config of ours
        known += [file.stem for file in shipped.glob('*.py')]
    raise FileNotFoundError(f'no config {str(path)!r}.{did_you_mean(name.name, known)}')


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config with everything it inherits.

    Names that begin with `_` are the config's own helpers and are dropped; modules named in
    `custom_imports` are imported. Whether the options exist is `check_config`'s to say.

    Args:
        path: A file or the name of one of our own configs, see `find_config`. A `.json` file
            written by `dump_config` is read too.
        options: Overrides by dotted key, as from `parse_cfg_options`.

    Raises:
        FileNotFoundError: If there is no such config.
        ConfigError: If it is not a valid config or an override does not fit.
    """
    file = find_config(path)
    if file.suffix == '.json':
        values, imported = json.loads(file.read_text(encoding='utf-8-sig')), set()
    else:
        names = ConfigReader().read(file)
        values, imported = names.values, names.imported
    settings = {
        key: value
        for key, value in dict.items(values)
        if not key.startswith('_') and key not in imported
    }
    try:
        cfg = Config(settings, filename=str(file))
    except KeyError as error:
        raise ConfigError(f'{file}: {error.args[0]}') from error
    apply_options(cfg, options or {})
    if custom := cfg.get('custom_imports'):
        if isinstance(custom, (str, list, tuple)):
            custom = {'imports': custom}
        try:
            import_modules_from_strings(**custom)
        except ImportError as error:
            raise ConfigError(
                f'custom_imports={custom["imports"]!r}: {error}; is it on PYTHONPATH?'
            ) from error
    return cfg


def parse_cfg_options(items: Sequence[str], option: str = '--cfg-options') -> dict[str, Any]:
    """`['a.b=1', 'c=(x,y)']` as `{'a.b': 1, 'c': ('x', 'y')}`, in MMEngine's syntax.

    Args:
        items: What followed the option.
        option: Its name, for messages.

    Raises:
        ConfigError: If an item is not `key=value`, or its value nothing that can be written so.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition('=')
        if not equals or not all(key.split('.')):
            raise ConfigError(f'{option} {item!r} is not of the form a.b=value')
        # Not the braces of a prompt.
        if re.match(r'\s*(\{\s*[\'"}]|dict\(.*\)\s*$)', text, re.DOTALL):
            raise ConfigError(
                f'{option} {item!r}: write a dict key by key: {key}.KEY=VALUE, after {key}=None '
                'where it is none yet'
            )
        plain = ' ' in text and not re.search(r'[,\[\]()]', text)
        # MMEngine deletes blanks, which is right for lists and wrong for text.
        try:
            options[key] = text if plain else DictAction._parse_iterable(text)
        except (AssertionError, RecursionError) as error:  # how MMEngine stumbles over calls
            raise ConfigError(
                f'{option} {item!r}: values are numbers, True, False, None, text, '
                f'[a,b] or (a,b); write a dict key by key: {key}.KEY=VALUE'
            ) from error
    return options


def apply_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Set the value at each dotted key; numbers step into lists.

    Raises:
        ConfigError: If a key leads through something that holds no keys, or past a list's end.
    """
    for dotted, value in options.items():
        keys = dotted.split('.')
        node: Any = cfg._cfg_dict
        for depth, key in enumerate(keys):
            last, where = depth == len(keys) - 1, '.'.join(keys[:depth])
            if isinstance(node, list):
                if not key.isdigit() or int(key) >= len(node):
                    raise ConfigError(
                        f'--cfg-options {dotted}={value!r}: {where} is a list of {len(node)}; '
                        f'{key!r} is none of its places'
                    )
                place: Any = int(key)
            elif isinstance(node, dict):
                place = key
                if not last and (key not in node or node[key] is None):
                    node[key] = {}
            else:
                raise ConfigError(
                    f'--cfg-options {dotted}={value!r}: {where}={to_plain(node)!r} holds no keys; '
                    f'{where}=None before it makes room for some'
                )
            if last:
                node[place] = to_plain(value)  # classes by name, so that the dump loads again
            else:
                node = node[place]


def to_plain(value: Any) -> Any:
    """`value` in built-in types only: classes and lazy imports become dotted names."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(to_plain(item) for item in value)
    if isinstance(value, (LazyObject, LazyAttr)):
        return f'{value.module}.{value}'
    if callable(value) and '<' not in getattr(value, '__qualname__', '<'):
        return f'{value.__module__}.{value.__qualname__}'
    return value


def dump_config(cfg: Config) -> tuple[str, str]:
    """The resolved config as Python, which loads again and repeats the run, and as JSON for tools.

    Secrets are masked in both: values of keys such as `password` and `api_key`, logins in URLs.

    Raises:
        ConfigError: If a value cannot be written as a literal; names its key.
    """
    plain = _masked(to_plain(cfg._cfg_dict))
    lines = [f'{key} = {_literal(value, key)}\n' for key, value in plain.items()]
    return ''.join(lines), json.dumps(plain, indent=2) + '\n'


def _masked(value: Any, key: str = '') -> Any:
    if isinstance(value, dict):
        return {name: _masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_masked(item, key) for item in value)
    if isinstance(value, str):
        return MASK if value and _SECRET.search(key) else _URL_LOGIN.sub(MASK, value)
    return value


def _literal(value: Any, where: str, indent: str = '') -> str:
    inner = indent + '    '
    if isinstance(value, dict):
        if not value:
            return 'dict()'
        items = [(key, _literal(item, f'{where}.{key}', inner)) for key, item in value.items()]
        if all(isinstance(key, str) and _is_name(key) for key in value):
            body = ''.join(f'{inner}{key}={item},\n' for key, item in items)
            return f'dict(\n{body}{indent})'
        body = ''.join(f'{inner}{key!r}: {item},\n' for key, item in items)
        return f'{{\n{body}{indent}}}'
    if isinstance(value, (list, tuple)):
        left, right = '[]' if isinstance(value, list) else '()'
        texts = [_literal(item, f'{where}.{i}', inner) for i, item in enumerate(value)]
        if not any('\n' in text for text in texts) and sum(map(len, texts)) < 80:
            comma = ',' if isinstance(value, tuple) and len(value) == 1 else ''
            return f'{left}{", ".join(texts)}{comma}{right}'
        return f'{left}\n' + ''.join(f'{inner}{text},\n' for text in texts) + f'{indent}{right}'
    if isinstance(value, float) and value - value != 0:  # inf and nan have no literal
        return f'float({str(value)!r})'
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ConfigError(f'{where}={value!r}: a {type(value).__name__} cannot be written in a config')


def _is_name(key: str) -> bool:
    return key.isidentifier() and not keyword.iskeyword(key)
