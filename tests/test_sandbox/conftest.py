"""Sandboxes that the tests of this folder attack: each backend, as root and as an ordinary user."""

import os
from collections.abc import Iterator

import pytest

from internlm_mm.sandbox.backends import missing
from tests.sandbox_host import ORDINARY, Host

AS_ROOT = os.getuid() == 0
WAYS = [('bubblewrap', 'as-it-is'), ('landlock', 'as-it-is')]
if AS_ROOT:  # fast tests take each backend once, slow ones the other two pairs
    WAYS = [
        ('bubblewrap', 'as-it-is'),
        ('landlock', 'ordinary'),
        pytest.param(('bubblewrap', 'ordinary'), marks=pytest.mark.slow),
        pytest.param(('landlock', 'as-it-is'), marks=pytest.mark.slow),
    ]


@pytest.fixture(scope='module', params=WAYS, ids='-'.join)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A process that holds a sandbox with one session."""
    backend, who = request.param
    reason = missing(backend)
    if reason is not None:
        pytest.skip(f'{backend}: {reason}')
    one = Host(backend, ORDINARY if who == 'ordinary' else None)
    if one.failed is not None:
        one.close()
        pytest.skip(f'{backend}: {one.failed}')
    yield one
    assert one.close() == 0
