"""The nearest valid name, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """End of an error message that proposes the choice closest to `value`.

    Args:
        value: What the user wrote.
        choices: What would have been valid.

    Returns:
        " Did you mean 'x'?", or every choice where none is close and there are at most 20, or ''.
    """
    names = [str(choice) for choice in choices]
    close = get_close_matches(str(value), names, n=1, cutoff=0.5)
    if close:
        return f' Did you mean {close[0]!r}?'
    if names and len(names) <= 20:
        return f' Valid: {", ".join(sorted(names))}.'
    return ''
