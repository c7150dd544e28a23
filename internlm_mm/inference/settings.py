"""Sampling as somebody types it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

from internlm_mm.inference.sampling import Sampling
from internlm_mm.utils.suggest import did_you_mean


def change_sampling(sampling: Sampling, key: str, value: str) -> Sampling:
    """One setting changed.

    Args:
        sampling: As it is.
        key: Name of one of its fields.
        value: A number; 'none' where that is possible; for several strings or tokens a JSON list,
            or one of them as it is.

    Raises:
        ValueError: If there is no such field, or this is no value for it.
    """
    kinds = typing.get_type_hints(Sampling)
    if key not in kinds:
        raise ValueError(f'there is no setting {key!r}.{did_you_mean(key, kinds)}')
    kind = kinds[key]
    try:
        read = _read(kind, value)
    except ValueError:
        raise ValueError(f'{key} takes {_say(kind)}, not {value!r}') from None
    return dataclasses.replace(sampling, **{key: read})


def show_sampling(sampling: Sampling) -> str:
    """Every setting in a line of its own, as `change_sampling` reads it."""
    return '\n'.join(
        f'{name} {_write(value)}' for name, value in dataclasses.asdict(sampling).items()
    )


def _read(kind: Any, value: str) -> Any:
    if isinstance(kind, types.UnionType):
        if value.lower() == 'none':
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is not tuple:
        return kind(value)
    item: type = typing.get_args(kind)[0]
    if value.lower() == 'none':
        return ()
    items = json.loads(value) if value.startswith('[') else [item(value)]
    if any(type(one) is not item for one in items):
        raise ValueError(f'not all are of {item}')
    return tuple(items)


def _say(kind: Any) -> str:
    names = {int: 'a whole number', float: 'a number', str: 'a text'}
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        return f"{names[kind]} or 'none'"
    if typing.get_origin(kind) is tuple:
        return f"{names[typing.get_args(kind)[0]]}, a JSON list or 'none'"
    return names[kind]


def _write(value: Any) -> str:
    if value is None or value == ():
        return 'none'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)
