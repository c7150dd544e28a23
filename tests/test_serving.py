"""Servers of others over our exports: started, asked, and ended."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest

from internlm_mm.api import from_pretrained
from internlm_mm.checkpoint.gguf import write_gguf
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.inference import Chat, Sampling, template_for
from internlm_mm.tokenizers import build_template
from tests.chatting import FIRST, SECOND, THIRD, learn_chat

MISSING = [name for name in ('fastapi', 'uvicorn', 'accelerate') if find_spec(name) is None]
QUESTION = FIRST[:1]
ANSWER = FIRST[1]['content']
SYSTEM = [{'role': 'system', 'content': 'Be brief.'}]
SERVING = Path(__file__).parents[1] / 'configs' / 'serving'
TEMPLATES = {
    'lmdeploy_internlm.json': ('internlm', FIRST[:3]),
    'lmdeploy_internlm_v1_1.json': ('internlm_v1_1', SYSTEM + FIRST[:3]),
}


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


@pytest.mark.slow
@pytest.mark.parametrize('template', ['internlm', 'internlm2'])
def test_llama_cpp_answers_by_the_template_in_the_file(tmp_path, template):
    reason = 'llama.cpp is not installed: pip install llama-cpp-python'
    llama_cpp = pytest.importorskip('llama_cpp', reason=reason)
    convert_to_hf(learn_chat(tmp_path, template), tmp_path / 'hf', dtype='float32')
    write_gguf(tmp_path / 'hf', tmp_path / 'model.gguf')
    model = llama_cpp.Llama(str(tmp_path / 'model.gguf'), n_ctx=192, n_threads=1, verbose=False)
    for messages in (FIRST, SECOND, THIRD):
        asked, answer = messages[:-1], messages[-1]['content']
        whole = model.create_chat_completion(asked, temperature=0.0, max_tokens=60)
        assert whole['choices'][0]['message']['content'] == answer
        assert whole['choices'][0]['finish_reason'] == 'stop'
    model.close()


def lmdeploy_prompt(template, messages):
    """A prompt as LMDeploy spells it: BaseChatTemplate.messages2prompt of lmdeploy/model.py."""
    begin = dict(user='user', assistant='assistant', system='system', tool='tool')
    end = dict(user='eoh', assistant='eoa', system='eosys', tool='eotool')
    text = ''
    if messages[0]['role'] != 'system':
        text = template['system'] + template['meta_instruction'] + template['eosys']
    for message in messages:
        role = message['role']
        text += template[begin[role]] + message['content'] + template[end[role]]
        text += template['separator'] if role == 'assistant' else ''
    return text + template['assistant']


@pytest.mark.parametrize('file', TEMPLATES)
def test_template_files_for_lmdeploy_spell_what_our_templates_do(file):
    name, messages = TEMPLATES[file]
    template = json.loads((SERVING / file).read_text())
    ours = build_template(name)
    expected = ours.text(messages, add_generation_prompt=True)
    assert lmdeploy_prompt(template, messages) == expected
    assert template['stop_words'] == list(ours.stop)
    assert '.' not in template['model_name']  # LMDeploy would look for a scope of MMEngine's


def test_all_template_files_are_tested():
    assert {file.name for file in SERVING.iterdir()} == set(TEMPLATES)


LMDEPLOY_RENDERS = """
import json, sys
from lmdeploy.model import ChatTemplateConfig, get_chat_template
folder, tasks = json.loads(sys.argv[1])
print()
for file, messages in tasks:
    config = ChatTemplateConfig.from_json(file) if file else None
    template = get_chat_template(folder, config)
    print(json.dumps([template.messages2prompt(messages), template.stop_words]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec('lmdeploy') is None, reason='lmdeploy is not installed')
def test_lmdeploy_spells_what_our_templates_do(chat_run, tmp_path):
    folder = tmp_path / 'hf'
    convert_to_hf(chat_run, folder, dtype='float32')
    ours = build_template(template_for(folder))
    tasks = [(str(SERVING / file), messages) for file, (_, messages) in TEMPLATES.items()]
    tasks += [(None, FIRST[:3]), (None, SYSTEM + FIRST[:3])]  # by the export's own template
    expected = [
        build_template(name).text(messages, add_generation_prompt=True)
        for name, messages in TEMPLATES.values()
    ]
    expected += [ours.text(messages, add_generation_prompt=True) for _, messages in tasks[2:]]
    command = [sys.executable, '-c', LMDEPLOY_RENDERS, json.dumps([str(folder), tasks])]
    environment = os.environ | {'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    rendered = [json.loads(line) for line in done.stdout.splitlines()[-len(tasks) :]]
    bos = ['', '', '<s>', '<s>']  # the export's own begins with it; with a file LMDeploy adds it
    assert [text for text, _ in rendered] == [a + b for a, b in zip(bos, expected, strict=True)]
    assert [stop for _, stop in rendered[:2]] == [['<eoa>']] * 2
