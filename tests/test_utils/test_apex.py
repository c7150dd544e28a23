"""Which apex it is."""

import sys
from collections.abc import Callable, Iterator

import pytest

from internlm_mm.utils.apex import import_apex, missing_apex


@pytest.fixture(autouse=True)
def no_apex() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.split('.')[0] == 'apex']:
        del sys.modules[name]


def test_none_is_installed() -> None:
    with pytest.raises(
        ImportError, match=r"^thing needs NVIDIA's apex, .*on PyPI is another one; b"
    ):
        import_apex('optimizers', 'thing')


def test_the_other_one(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's is a toolkit for logging in to websites. It is not imported."""
    path = write('apex/__init__.py', 'raise SystemExit("was imported")')
    monkeypatch.syspath_prepend(path.parents[1])
    with pytest.raises(ImportError, match=r"called apex on PyPI is not NVIDIA's: pip uninstall"):
        import_apex('optimizers', 'thing')


def test_nvidias(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('apex/__init__.py', '')
    write('apex/optimizers/__init__.py', 'here = True')
    write('apex/broken/__init__.py', 'import amp_C')
    monkeypatch.syspath_prepend(path.parents[1])
    assert missing_apex('optimizers') == []
    assert import_apex('optimizers', 'thing').here
    with pytest.raises(ImportError, match=r"thing needs apex\.broken, which cannot .*'amp_C'; b"):
        import_apex('broken', 'thing')
