"""Servers of others over our exports: started, asked, and ended."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import openai
import pytest

from internlm_mm.api import from_pretrained
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.inference import Chat, Sampling, template_for
from tests.chatting import FIRST

MISSING = [name for name in ('fastapi', 'uvicorn', 'accelerate') if find_spec(name) is None]
QUESTION = FIRST[:1]
ANSWER = FIRST[1]['content']


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@contextmanager
def served(command, port, log):
    """A server's address, once it answers; it is ended with the block."""
    environment = os.environ | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    with open(log, 'wb') as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 240
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, f'not ready: {log.read_text()}'
            try:
                with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5):
                    break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f'transformers[serving] lacks {", ".join(MISSING)}')
def test_transformers_serve_answers_as_we_do(chat_run, tmp_path):
    folder = tmp_path / 'hf'
    convert_to_hf(chat_run, folder, dtype='float32')
    generator = from_pretrained(folder)
    chat = Chat(generator, template_for(folder))
    assert ''.join(chat.stream(QUESTION, Sampling())) == ANSWER
    port = free_port()
    command = [sys.executable, '-m', 'transformers.cli.transformers', 'serve', '--device', 'cpu']
    command += ['--host', '127.0.0.1', '--port', str(port)]
    with served(command, port, tmp_path / 'log') as address:
        with openai.OpenAI(base_url=address, api_key='none', timeout=120) as client:
            options = {'model': str(folder), 'messages': QUESTION, 'temperature': 0}
            whole = client.chat.completions.create(**options, max_tokens=60)
            assert whole.choices[0].message.content == ANSWER
            pieces = [
                chunk.choices[0].delta.content or ''
                for chunk in client.chat.completions.create(**options, max_tokens=60, stream=True)
                if chunk.choices
            ]
            assert ''.join(pieces) == ANSWER
            assert sum(map(bool, pieces)) > 1
