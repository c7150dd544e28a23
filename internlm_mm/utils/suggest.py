"""What error messages say of a value: the nearest valid name, and what it is."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """End of an error message that proposes the choice closest to `value`.

    Args:
        value: What the user wrote.
        choices: What would have been valid.

    Returns:
        " Did you mean 'x'?", or every choice where none is close and there are at most 20, or ''.
    """
    names = [str(choice) for choice in choices]
    if hint := nearest(value, names):
        return hint
    if names and len(names) <= 20:
        return f' Valid: {", ".join(sorted(names))}.'
    return ''


def nearest(value: object, choices: Iterable[object]) -> str:
    """As `did_you_mean`, where the message has told of all choices already.

    Args:
        value: What the user wrote.
        choices: What would have been valid.

    Returns:
        " Did you mean 'x'?", or '' where none is close.
    """
    close = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f' Did you mean {close[0]!r}?' if close else ''


def misspelt_key(keys: Iterable[str], known: Iterable[str]) -> str:
    """End of an error message about a record whose keys are of no form that is known.

    Args:
        keys: Which it has.
        known: Which any form has.

    Returns:
        " Did you mean 'x' by 'y'?" of the first that is nearly a known one, or ''.
    """
    known = list(known)
    for key in keys:
        close = get_close_matches(key, known, n=1, cutoff=0.75)
        if close and close[0] != key:
            return f' Did you mean {close[0]!r} by {key!r}?'
    return ''


def kind(value: object) -> str:
    """What a value from a file is, where a message tells that something else is expected."""
    return 'null or missing' if value is None else type(value).__name__


def nearest_path(path: str | os.PathLike) -> str:
    """End of an error message that proposes the path closest to one that is not there.

    Args:
        path: What the user wrote.

    Returns:
        ". Did you mean 'x'?", or '' where nothing is close.
    """
    path = Path(path)
    gone = next((one for one in (*reversed(path.parents), path) if not one.exists()), None)
    if gone is None or not gone.parent.is_dir() or not os.access(gone.parent, os.R_OK):
        return ''
    close = get_close_matches(gone.name, os.listdir(gone.parent), n=1, cutoff=0.6)
    if not close:
        return ''
    near = gone.with_name(close[0])
    whole = near / path.relative_to(gone)
    return f'. Did you mean {str(whole if whole.exists() else near)!r}?'
