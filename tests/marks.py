"""Parameters that only `make test-slow` takes: others in the fast tests stand for them."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One set of parameters, marked."""
    return pytest.param(*values, marks=pytest.mark.slow)
