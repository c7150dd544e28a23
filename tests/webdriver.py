"""A headless Chromium, driven through chromedriver's own protocol, which is JSON over HTTP."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Nothing that looks for the world outside, which is not there in CI.
FLAGS = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-dev-shm-usage',
    '--hide-scrollbars',
]
ENTER = '\ue007'


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    absent = [name for name in ('chromium', 'chromedriver') if shutil.which(name) is None]
    return f'not installed: {" and ".join(absent)}' if absent else None


class Browser:
    """One window.

    Args:
        url: Of chromedriver.
        profile: An empty folder.
        size: Of the window, in pixels.
    """

    def __init__(self, url: str, profile: Path, size: tuple[int, int]) -> None:
        self._url = url
        flags = [*FLAGS, f'--user-data-dir={profile}', f'--window-size={size[0]},{size[1]}']
        options = {'binary': shutil.which('chromium'), 'args': flags}
        wanted = {'capabilities': {'alwaysMatch': {'goog:chromeOptions': options}}}
        self._url = f'{url}/session/{self._call("POST", "/session", wanted)["sessionId"]}'

    def open(self, page: str) -> None:
        self._call('POST', '/url', {'url': page})

    def type(self, selector: str, text: str) -> None:
        """Type into the element, once it is there and takes what is typed."""
        found = self.wait_for(
            'const e = document.querySelector(arguments[0]); return e && !e.disabled ? e : null',
            selector,
        )
        (element,) = found.values()
        self._call('POST', f'/element/{element}/value', {'text': text})

    def run(self, script: str, *args: Any) -> Any:
        """What a script in the page returns."""
        return self._call('POST', '/execute/sync', {'script': script, 'args': list(args)})

    def wait_for(self, script: str, *args: Any, seconds: float = 60) -> Any:
        """What a script returns as soon as that is true."""
        end = time.monotonic() + seconds
        while not (result := self.run(script, *args)):
            assert time.monotonic() < end, self.run('return document.body.innerText')
            time.sleep(0.05)
        return result

    def screenshot(self) -> bytes:
        """A PNG file."""
        return base64.b64decode(self._call('GET', '/screenshot'))

    def close(self) -> None:
        self._call('DELETE', '')

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)['value']
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error


@contextlib.contextmanager
def browser(folder: Path, size: tuple[int, int] = (1100, 800)) -> Iterator[Browser]:
    """A browser that ends with the block.

    Args:
        folder: For the log and what the browser keeps; may hold other things.
        size: Of its window, in pixels.
    """
    log = folder / 'chromedriver.log'
    with log.open('w') as out:
        driver = subprocess.Popen(
            [shutil.which('chromedriver') or '', '--port=0'], stdout=out, stderr=out, text=True
        )
    try:
        port = None
        for _ in range(600):
            port = re.search(r'started successfully on port (\d+)', log.read_text())
            if port is not None or driver.poll() is not None:
                break
            time.sleep(0.05)
        assert port is not None, log.read_text()
        window = Browser(f'http://127.0.0.1:{port[1]}', folder / 'profile', size)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(60)
