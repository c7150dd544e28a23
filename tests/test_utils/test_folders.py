from pathlib import Path

import pytest

from internlm_mm.utils import folders
from internlm_mm.utils.folders import why_not_writable


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_the_systems_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').touch()
    assert why_not_writable(tmp_path / 'file') == 'Not a directory'
    assert why_not_writable(tmp_path / 'none') == 'No such file or directory'

    def refuse(**_options) -> None:  # root may write anywhere
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(folders.tempfile, 'NamedTemporaryFile', refuse)
    assert why_not_writable(tmp_path) == 'Permission denied'
