"""An installation that cannot work is refused with its cure."""

from importlib import metadata

import pytest

from internlm_mm.utils import installation


def test_this_installation_is_sound() -> None:
    installation.check_mmengine()


@pytest.mark.parametrize('only', ['mmengine', 'mmengine-lite'])
def test_one_of_the_two_is_fine(only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != only:
            raise metadata.PackageNotFoundError(name)
        return '0.10.7'

    monkeypatch.setattr(installation, 'version', version)
    installation.check_mmengine()


def test_both_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, 'version', lambda name: '0.10.7')
    with pytest.raises(ImportError) as caught:
        installation.check_mmengine()
    assert 'mmengine 0.10.7 and mmengine-lite 0.10.7 are both installed' in str(caught.value)
    assert 'pip uninstall -y mmengine mmengine-lite' in str(caught.value)
