"""The web chat as people see it, in a headless Chromium."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import webdriver
from tests.runs import REPOSITORY

MESSAGE = '[data-testid="stChatInputTextArea"]'
SAYS = 'return document.body.innerText.includes(arguments[0])'


@contextlib.contextmanager
def serving(model: Path, folder: Path) -> Iterator[str]:
    """The page over a model, as the documentation starts it."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    log = folder / 'log'
    program = REPOSITORY / 'projects' / 'web_chat' / 'run.py'
    with log.open('w') as out:
        process = subprocess.Popen(
            [sys.executable, program, model, '--device', 'cpu', '--port', str(port)],
            env=os.environ | {'HOME': str(folder), 'OMP_NUM_THREADS': '1'},
            stdout=out,
            stderr=out,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=60).close()
                break
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}/'
    finally:
        process.terminate()
        process.wait(60)
    assert 'Traceback' not in log.read_text(), log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(webdriver.missing() is not None, reason=webdriver.missing() or '')
def test_a_chat(chat_run: Path, tmp_path: Path) -> None:
    with serving(chat_run, tmp_path) as url, webdriver.browser(tmp_path) as window:
        window.open(url)
        window.type(MESSAGE, 'hello' + webdriver.ENTER)
        window.wait_for(SAYS, 'Hello! What can I do for you?')
        window.type(MESSAGE, 'Who are you?' + webdriver.ENTER)
        window.wait_for(SAYS, 'A tiny model, 很小的模型。')
        assert window.run('return document.querySelector("strong").innerText') == 'tiny'
        loaded = window.run('return performance.getEntriesByType("resource").map(e => e.name)')
        assert len(loaded) > 5 and all(name.startswith((url, 'data:')) for name in loaded)
        # What a model may write does not call anybody.
        window.run(
            'window.blocked = [];'
            'document.addEventListener("securitypolicyviolation", e => blocked.push(e.blockedURI));'
            'const i = new Image(); i.src = "http://127.0.0.2:9/x.png"; document.body.append(i)'
        )
        assert window.wait_for('return window.blocked.length && window.blocked') == [
            'http://127.0.0.2:9/x.png'
        ]
        assert window.screenshot().startswith(b'\x89PNG')
