"""Fields of a row, or an error that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from internlm_mm.utils.suggest import did_you_mean, kind


def as_object(row: Any) -> Mapping[str, Any]:
    """A row that must have named fields.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f'an object with named fields is expected, not {kind(row)}')
    return row


def need(row: Mapping[str, Any], key: str, field: str | None = None) -> Any:
    """A field that must be there.

    Raises:
        ValueError: If it is missing or null; names the nearest that there is.
    """
    if key in row and row[key] is None:
        raise ValueError(f'field {field or repr(key)} is null')
    if key not in row:
        raise ValueError(f'field {field or repr(key)} is missing.{did_you_mean(key, row)}')
    return row[key]


def text_of(value: Any, field: str) -> str:
    """A text, without white space at both ends.

    Raises:
        ValueError: If it is none, or empty.
    """
    if not isinstance(value, str):
        raise ValueError(f'{field}: a text, not {kind(value)}')
    if not value.strip():
        raise ValueError(f'{field}: the text is empty')
    return value.strip()


def need_text(row: Mapping[str, Any], key: str) -> str:
    """A text that must be there; as `need` and `text_of`."""
    return text_of(need(row, key), key)


def texts_of(value: Any, field: str) -> tuple[str, ...]:
    """Two texts or more, at most as many as there are letters.

    Raises:
        ValueError: If it is no list of texts, too short or too long.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f'{field}: a list, not {kind(value)}')
    if len(value) < 2:
        raise ValueError(f'{field}: two options at least, not {len(value)}')
    if len(value) > len(ascii_uppercase):
        most = len(ascii_uppercase)
        raise ValueError(f'{field}: {most} options at most, one a letter, not {len(value)}')
    return tuple(text_of(item, f'{field}[{index}]') for index, item in enumerate(value))


def subject_of(row: Mapping[str, Any], key: str) -> str:
    """What a row says that it is about, a text or a whole number; '' where it says nothing.

    Raises:
        ValueError: If it is something else.
    """
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'{key}: a text, not {kind(value)}')
    return value or ''


def choice_of(value: Any, field: str, count: int) -> int:
    """Which option is right: its letter, or its number counted from 0.

    Raises:
        ValueError: If there is no such option.
    """
    letters = ascii_uppercase[:count]
    if isinstance(value, str):
        found = letters.find(value.strip().upper()) if len(value.strip()) == 1 else -1
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value if value < count else -1
    else:
        raise ValueError(f'{field}: a letter or a number, not {kind(value)}')
    if found < 0:
        valid = f'{letters[0]} to {letters[-1]}, or 0 to {count - 1}'
        raise ValueError(f'{field} {value!r}: expected {valid}')
    return found


def whole_number(value: Any, field: str, least: int, most: int) -> int:
    """A whole number, also as its digits.

    Raises:
        ValueError: If it is none or out of range.
    """
    if isinstance(value, str) and value.strip().lstrip('-').isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f'{field} {value!r}: expected {least} to {most}')
    return value
