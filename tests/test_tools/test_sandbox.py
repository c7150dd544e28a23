import io
from pathlib import Path

import pytest

from internlm_mm.sandbox import Sandbox, SandboxError
from internlm_mm.sandbox.png import MAGIC
from internlm_mm.sandbox.reply import Reply
from tools import sandbox


@pytest.fixture
def _works() -> None:
    try:
        Sandbox(spare=0).close()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures('_works')
def test_files_in_one_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, code in (('a', 'x = 6'), ('b', 'print("so")\nx * 7'), ('c', '1 / 0')):
        (tmp_path / name).write_text(code)
    assert sandbox.main(['run', str(tmp_path / 'a'), str(tmp_path / 'b')]) == 0
    assert capsys.readouterr().out == 'so\n42\n'
    assert sandbox.main(['run', str(tmp_path / 'c')]) == 1
    assert 'ZeroDivisionError' in capsys.readouterr().out


@pytest.mark.usefixtures('_works')
def test_statements_of_several_lines_are_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = (
        'x = 3\nfor i in range(2):\n    print(i + x)\n\n(x +\n1)\ndef f(:\nif x:\n    print("end")'
    )
    monkeypatch.setattr('sys.stdin', io.StringIO(typed))
    assert sandbox.main(['run']) == 0
    shown = capsys.readouterr().out
    assert shown.startswith('3\n4\n4\n') and shown.endswith('end\n')
    assert shown.count('SyntaxError') == 1


@pytest.mark.usefixtures('_works')
def test_check_and_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert sandbox.main(['check']) == 0
    assert 'confines, as its canary proved' in capsys.readouterr().out
    assert sandbox.main(['benchmark', '--starts', '2', '--cells', '5']) == 0
    assert 'p95' in capsys.readouterr().out


def test_what_cannot_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sandbox.main(['run', '--backend', 'docker']) == 2
    assert "error: backend='docker' is unknown" in capsys.readouterr().err
    assert sandbox.main(['run', '--python', str(tmp_path)]) == 2
    assert sandbox.main(['make', '--base', str(tmp_path / 'none')]) == 2
    assert capsys.readouterr().err.count('is no interpreter') == 2


def test_images_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert sandbox.show(Reply('ok', result='5', images=(MAGIC,)))
    assert capsys.readouterr().out == '5\n[an image of 8 bytes]\n'
