"""The web chat without a browser: AppTest, a double, a tiny model and a server on this machine."""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import streamlit as st
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.scriptrunner_utils.script_requests import RerunData
from streamlit.testing.v1 import AppTest

from tests.runs import REPOSITORY

PROJECT = REPOSITORY / 'projects' / 'web_chat'


@pytest.fixture(autouse=True)
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `python projects/web_chat/run.py` and `streamlit run` do to the search path."""
    monkeypatch.syspath_prepend(PROJECT)
    # AppTest makes the page `__main__`, which processes of later tests would run at their start.
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])
    yield
    st.cache_resource.clear()


def png(width: int = 2, height: int = 3) -> bytes:
    """A file that Pillow wrote."""
    file = io.BytesIO()
    Image.new('RGB', (width, height), 'red').save(file, 'PNG')
    return file.getvalue()


class Scripted:
    """A double: plays one script an answer, and remembers what it was asked.

    A script is a list of events, errors to raise, and functions to call in between.
    """

    name = 'scripted'
    templates = ('chatml', 'internlm')
    template = 'internlm'

    def __init__(self, *scripts: list) -> None:
        self.scripts = list(scripts)
        self.asked: list[list[dict]] = []
        self.settings: list = []
        self.closed = 0

    def answer(self, messages, settings):
        self.asked.append(messages)
        self.settings.append(settings)
        try:
            for item in self.scripts.pop(0):
                if isinstance(item, Exception):
                    raise item
                if callable(item):
                    item()
                else:
                    yield item
        finally:
            self.closed += 1


def script(backend) -> None:
    """What AppTest runs in the place of chat.py."""
    from web_chat.page import show

    show(backend)


def page_of(backend: Scripted) -> AppTest:
    page = AppTest.from_function(script, args=(backend,), default_timeout=20).run()
    assert not page.exception
    return page


def say(page: AppTest, text: str) -> AppTest:
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def click(page: AppTest, label: str) -> AppTest:
    (button,) = [button for button in page.button if button.label == label]
    button.click().run()
    assert not page.exception
    return page


def shown(page: AppTest) -> list[tuple[str, list[str]]]:
    """Who said what: questions are plain text, answers Markdown."""
    return [
        (message.name, [part.value for part in [*message.text, *message.markdown]])
        for message in page.chat_message
    ]


def texts(*pieces: str) -> list:
    from web_chat.events import Text

    return [Text(piece) for piece in pieces]


def press_stop() -> None:
    """Streamlit's own Stop, or a page that is closed."""
    get_script_run_ctx().script_requests.request_stop()


def click_anything() -> None:
    """A click while the script runs: it begins anew."""
    get_script_run_ctx().script_requests.request_rerun(RerunData())


def test_an_answer_is_streamed_and_kept() -> None:
    backend = Scripted(texts('Hel', 'lo', ' you'), texts('Again'))
    page = page_of(backend)
    assert not page.chat_message
    say(page, 'Hi')
    assert shown(page) == [('user', ['Hi']), ('assistant', ['Hello you'])]
    say(page, 'And?')
    assert shown(page)[2:] == [('user', ['And?']), ('assistant', ['Again'])]
    assert backend.asked == [
        [{'role': 'user', 'content': 'Hi'}],
        [
            {'role': 'user', 'content': 'Hi'},
            {'role': 'assistant', 'content': 'Hello you'},
            {'role': 'user', 'content': 'And?'},
        ],
    ]
    assert backend.closed == 2
    assert not any(widget.disabled for widget in [*page.button, *page.slider, *page.chat_input])


def test_it_is_drawn_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every control but Stop waits."""
    from web_chat import page as module

    seen = []

    def look() -> None:
        """At what was sent to the browser so far."""
        widgets = [
            getattr(element, element.WhichOneof('type'))
            for element in deltas()
            if element.WhichOneof('type') in ('button', 'slider', 'chat_input', 'text_area')
        ]
        running = {w.label if hasattr(w, 'label') else 'input' for w in widgets if not w.disabled}
        seen.append((running, [e.markdown.body for e in deltas() if e.HasField('markdown')]))

    def deltas() -> list:
        (runner,) = runners
        messages = [m.delta.new_element for m in runner.forward_msgs() if m.HasField('delta')]
        return messages

    from streamlit.testing.v1 import app_test

    runners: list = []

    class Watched(app_test.LocalScriptRunner):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            runners[:] = [self]

    monkeypatch.setattr(app_test, 'LocalScriptRunner', Watched)
    monkeypatch.setattr(module, 'REDRAW', 0.0)
    one, two, three = texts('One', ' two', ' three')
    say(page_of(Scripted([look, one, look, two, look, three])), 'Count')
    assert [controls for controls, _ in seen] == [{'Stop'}] * 3
    assert [bodies[1:] for _, bodies in seen] == [[], ['One'], ['One two']]  # after the name


def test_the_system_prompt_is_sent_and_may_change() -> None:
    backend = Scripted(texts('a'), texts('b'), texts('c'))
    page = say(page_of(backend), 'Hi')
    page.text_area[0].set_value('Be brief.').run()
    say(page, 'Hi again')
    assert backend.asked[1][0] == {'role': 'system', 'content': 'Be brief.'}
    assert [message['role'] for message in backend.asked[1]] == [
        'system',
        'user',
        'assistant',
        'user',
    ]
    click(page, 'New conversation')
    assert page.text_area[0].value == 'Be brief.'
    page.text_area[0].set_value('Be long.').run()
    say(page, 'Hello')
    assert [message['content'] for message in backend.asked[2]] == ['Be long.', 'Hello']
    page.selectbox(key='current').select_index(0).run()
    assert page.text_area[0].value == 'Be brief.'


def test_settings_reach_the_backend() -> None:
    from web_chat.backend import Settings

    backend = Scripted(texts('a'), texts('b'))
    page = say(page_of(backend), 'Hi')
    assert backend.settings == [Settings(template='internlm')]
    page.slider(key='temperature').set_value(0.0)
    page.slider(key='top_p').set_value(0.5)
    page.number_input(key='top_k').set_value(7)
    page.slider(key='repetition_penalty').set_value(1.2)
    page.number_input(key='max_new_tokens').set_value(9)
    page.text_area(key='stop_strings').set_value('END\n\n  two')
    page.selectbox(key='template').set_value('chatml').run()
    say(page, 'Hi')
    assert backend.settings[1] == Settings(
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        repetition_penalty=1.2,
        max_new_tokens=9,
        stop=('END', '  two'),
        template='chatml',
    )


def test_several_conversations() -> None:
    backend = Scripted(texts('a'), texts('b'), texts('c'))
    page = say(page_of(backend), 'First')
    click(page, 'New conversation')
    assert shown(page) == []
    say(page, 'Second')
    assert backend.asked[1] == [{'role': 'user', 'content': 'Second'}]
    assert page.selectbox(key='current').options == ['First', 'Second']
    page.selectbox(key='current').select('First').run()
    assert shown(page) == [('user', ['First']), ('assistant', ['a'])]
    click(page, 'Delete')
    assert shown(page) == [('user', ['Second']), ('assistant', ['b'])]
    click(page, 'Delete')
    assert shown(page) == []
    assert page.selectbox(key='current').options == ['New conversation']
    say(page, 'Third')
    assert backend.asked[2] == [{'role': 'user', 'content': 'Third'}]


@pytest.mark.parametrize('end', [press_stop, click_anything])
def test_a_stopped_answer_stays_as_far_as_it_came(
    end: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('web_chat.page.REDRAW', 0.0)
    first, second, third = texts('One', ' two', ' three')
    backend = Scripted([first, second, end, third, ValueError('never reached')], texts('Well.'))
    page = page_of(backend)
    page.chat_input[0].set_value('Count').run()
    assert backend.closed == 1  # the model is free for the next visitor
    page.run()
    (text,) = shown(page)[1][1]
    assert text == 'One two three'  # noticed where the third was to be drawn
    assert [caption.value for caption in page.chat_message[1].caption] == ['Stopped.']
    say(page, 'Go on')
    assert backend.asked[1] == [
        {'role': 'user', 'content': 'Count'},
        {'role': 'assistant', 'content': text},
        {'role': 'user', 'content': 'Go on'},
    ]


def test_a_click_while_the_answer_is_written_ends_it() -> None:
    """Streamlit does not wait for the run that writes: the next one begins beside it."""
    first, second, third = texts('One', ' two', ' three')

    def next_run() -> None:
        conversation.append(page.session_state.conversations[page.session_state.current])
        conversation[0].interrupt()

    conversation: list = []
    page = page_of(Scripted([first, second, next_run, third, ValueError('never reached')]))
    say(page, 'Count')
    assert shown(page)[1] == ('assistant', ['One two'])
    (turn,) = conversation[0].turns
    conversation[0].retry()
    turn.add(third)
    turn.finish()
    assert [(turn.state, turn.parts) for turn in conversation[0].turns] == [('waiting', [])]


def test_an_answer_that_was_stopped_before_it_began_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('web_chat.page.REDRAW', 0.0)
    backend = Scripted([*texts(''), press_stop, *texts('')], texts('Yes'))
    page = page_of(backend)
    page.chat_input[0].set_value('Slow').run()
    click(page, 'Stop')  # all else waits still
    say(page, 'Quick')
    assert backend.asked[1] == [{'role': 'user', 'content': 'Quick'}]
    assert shown(page)[0] == ('user', ['Slow'])


def test_an_error_is_a_sentence_and_leaves_the_history_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def logged() -> list:
        return [record for record in caplog.records if record.name == 'web_chat']

    long = ValueError('a prompt of 80 tokens leaves no room in max_seq_len=64\nand more')
    backend = Scripted(
        [*texts('Half'), long], texts('Fine'), [RuntimeError('odd')], texts('Better')
    )
    page = say(page_of(backend), 'Hi')
    assert [error.value for error in page.error] == [
        'a prompt of 80 tokens leaves no room in max_seq_len=64'
    ]
    assert shown(page) == [('user', ['Hi']), ('assistant', ['Half'])]
    say(page, 'Ho')
    assert backend.asked[1] == [{'role': 'user', 'content': 'Ho'}]
    assert not logged()
    say(page, 'Hu')
    assert page.error[1].value == 'RuntimeError: odd'
    assert logged()[0].exc_info  # a surprise: the log has all of it
    click(page, 'Try again')
    assert backend.asked[3] == backend.asked[2]
    assert [error.value for error in page.error] == [page.error[0].value]
    assert shown(page)[-1] == ('assistant', ['Better'])


def test_interpreter_turns_and_images() -> None:
    from web_chat.events import Code, Result, Text

    image, broken = png(), png()[:-4]
    answer = [
        Text('I will '),
        Text('compute.'),
        Code('print(6 * 7)'),
        Result('42', (image, broken)),
        Text('It is 42.'),
    ]
    backend = Scripted(answer, texts('Bye'))
    page = say(page_of(backend), 'What is 6 * 7?')
    message = page.chat_message[1]
    assert [element.value for element in message.markdown] == ['I will compute.', 'It is 42.']
    assert [element.value for element in message.code] == ['print(6 * 7)', '42']
    assert message.code[0].language == 'python'
    assert len(page.image) == 1
    assert [element.value for element in message.caption] == ['Left out: an image is cut off']
    say(page, 'Bye')
    arguments = '{"code": "print(6 * 7)"}'
    call = {
        'id': 'call_0_1',
        'type': 'function',
        'function': {'name': 'python', 'arguments': arguments},
    }
    assert backend.asked[1] == [
        {'role': 'user', 'content': 'What is 6 * 7?'},
        {'role': 'assistant', 'content': 'I will compute.', 'tool_calls': [call]},
        {'role': 'tool', 'tool_call_id': 'call_0_1', 'name': 'python', 'content': '42'},
        {'role': 'assistant', 'content': 'It is 42.'},
        {'role': 'user', 'content': 'Bye'},
    ]


def test_export_is_json_with_images() -> None:
    from web_chat.events import Code, Result, Text
    from web_chat.history import Conversation

    conversation = Conversation('Be exact.')
    conversation.ask('Draw 書')
    assert conversation.turns[0].begin()
    for event in [Code('draw()'), Result('', (png(),)), Text('There.')]:
        conversation.turns[0].add(event)
    conversation.turns[0].finish()
    conversation.ask('This fails')
    conversation.turns[1].begin()
    conversation.turns[1].fail('it did')
    record = json.loads(conversation.export('tiny'))
    assert (record['title'], record['model']) == ('Draw 書', 'tiny')
    assert [message['role'] for message in record['messages']] == [
        'system',
        'user',
        'assistant',
        'tool',
        'assistant',
    ]
    prefix, data = record['messages'][3]['images'][0].split(',')
    assert (prefix, base64.b64decode(data)) == ('data:image/png;base64', png())


def events() -> some.SearchStrategy:
    from web_chat.events import Code, Result, Text

    words = some.text('ab', max_size=3)
    return some.one_of(
        words.map(Text), words.map(Code), words.map(lambda text: Result(text, (b'x',)))
    )


@given(
    some.data(),
    some.lists(some.sampled_from(['finish', 'stop', 'fail', 'retry']), max_size=5),
)
def test_whatever_happens_the_model_sees_whole_turns(data: some.DataObject, ends: list) -> None:
    """Roles take turns, every call has its result, and the last word is the user's."""
    from web_chat.history import Conversation

    conversation = Conversation()
    for number, end in enumerate(ends):
        conversation.ask(f'question {number}')
        turn = conversation.turns[-1]
        turn.begin()
        for event in data.draw(some.lists(events(), max_size=5)):
            turn.add(event)
        if end == 'retry':
            turn.stop()
            conversation.retry()
            conversation.turns[-1].begin()
            conversation.turns[-1].fail('again')
        else:
            turn.fail('reason') if end == 'fail' else getattr(turn, end)()
    conversation.ask('last')
    messages = conversation.messages()
    assert messages[-1]['role'] == 'user'
    following = {'user': {'assistant'}, 'tool': {'assistant', 'user'}}
    for message, after in itertools.pairwise(messages):
        if message['role'] == 'assistant' and 'tool_calls' in message:
            assert after['tool_call_id'] == message['tool_calls'][0]['id']
        elif message['role'] == 'assistant':
            assert after['role'] == 'user' and message['content']
        else:
            assert after['role'] in following[message['role']]
    ids = [call['id'] for message in messages for call in message.get('tool_calls', ())]
    assert len(set(ids)) == len(ids)


def test_blank_questions_are_none() -> None:
    backend = Scripted()
    say(page_of(backend), '  \n ')
    assert not backend.asked


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack('>I', len(content)) + kind + content
        + struct.pack('>I', zlib.crc32(kind + content))
    )  # fmt: skip


def header(width: int, height: int) -> bytes:
    return chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))


@given(some.integers(1, 40), some.integers(1, 40))
def test_png_that_is_whole(width: int, height: int) -> None:
    from web_chat.events import check_png

    assert check_png(png(width, height)) == (width, height)


@given(some.data())
def test_png_with_a_byte_changed_or_cut(data: some.DataObject) -> None:
    from web_chat.events import check_png

    whole = png()
    place = data.draw(some.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match='image'):
        check_png(whole[:place])
    changed = bytearray(whole)
    changed[place] ^= data.draw(some.integers(1, 255))
    with pytest.raises(ValueError, match='image'):
        check_png(bytes(changed))


def test_png_that_should_not_be_shown() -> None:
    from web_chat.events import MAX_BYTES, PNG_MAGIC, check_png

    end = chunk(b'IEND', b'')
    wrong = {
        'not in PNG format': b'<svg onload="alert(1)"/>',
        'larger than': b'\0' * (MAX_BYTES + 1),
        '100000 x 100000 pixels': PNG_MAGIC + header(100_000, 100_000) + end,
        '0 x 5 pixels': PNG_MAGIC + header(0, 5) + end,
        'one header': PNG_MAGIC + end,
        'begin with its one header': PNG_MAGIC + header(2, 2) + header(2, 2) + end,
        '9 bytes behind': png() + b'<script>x',
        'cut off': PNG_MAGIC,
    }
    for reason, data in wrong.items():
        with pytest.raises(ValueError, match=reason):
            check_png(data)


def test_the_terminal_reads_the_same_events() -> None:
    from web_chat.events import Code, Result, Text
    from web_chat.terminal import write_events

    out = io.StringIO()
    write_events([Text('a'), Text('b'), Code('c()'), Result('d', (png(), b'e')), Text('f')], out)
    assert out.getvalue() == (
        'ab\n```python\nc()\n```\nd\n[image, 2 x 3]\n[an image is not in PNG format]\nf\n'
    )


class Server:
    """OpenAI's protocol on 127.0.0.1, as far as the chat uses it; keeps what it was sent."""

    def __init__(self) -> None:
        self.pieces = ['Hel', 'lo', ' 書']
        self.finish: str | None = 'stop'
        self.status = 200
        self.requests: list[dict] = []
        self.gone = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None:
                pass

            def send(self, kind: str, content: bytes) -> None:
                self.send_response(server.status)
                self.send_header('Content-Type', kind)
                self.send_header('Connection', 'close')
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                models = {'object': 'list', 'data': [{'id': 'tiny', 'object': 'model'}]}
                self.send('application/json', json.dumps(models).encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers['Content-Length']))
                server.requests.append(json.loads(body) | {'path': self.path})
                if server.status != 200:
                    error = {'error': {'message': 'context too long', 'type': 'invalid'}}
                    self.send('application/json', json.dumps(error).encode())
                    return
                self.send('text/event-stream', b'')
                try:
                    for piece in server.pieces:
                        self.event({'content': piece}, None)
                    if server.finish:
                        self.event({}, server.finish)
                        self.wfile.write(b'data: [DONE]\n\n')
                except (BrokenPipeError, ConnectionResetError):
                    server.gone.set()

            def event(self, delta: dict, finish: str | None) -> None:
                choice = {'index': 0, 'delta': delta, 'finish_reason': finish}
                chunk = {
                    'id': 'x',
                    'object': 'chat.completion.chunk',
                    'created': 0,
                    'model': 'tiny',
                    'choices': [choice],
                }
                self.wfile.write(f'data: {json.dumps(chunk)}\n\n'.encode())

        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/v1'
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def from_file(monkeypatch: pytest.MonkeyPatch, *argv: object) -> AppTest:
    """The page as Streamlit runs it."""
    monkeypatch.setattr('sys.argv', ['chat.py', *map(str, argv)])
    page = AppTest.from_file(PROJECT / 'chat.py', default_timeout=60).run()
    assert not page.exception
    return page


def test_a_server_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    page = from_file(monkeypatch, server.url)
    assert 'template' not in page.session_state  # the server's own
    page.text_area(key='stop_strings').set_value('END').run()
    say(page, 'Hi')
    assert shown(page) == [('user', ['Hi']), ('assistant', ['Hello 書'])]
    assert server.requests == [
        {
            'path': '/v1/chat/completions',
            'model': 'tiny',
            'messages': [{'role': 'user', 'content': 'Hi'}],
            'stream': True,
            'temperature': 0.7,
            'top_p': 0.8,
            'max_tokens': 512,
            'stop': ['END'],
        }
    ]
    page.number_input(key='top_k').set_value(5)
    page.slider(key='repetition_penalty').set_value(1.1)
    page.text_area(key='stop_strings').set_value('').run()
    say(page, 'Ho')
    request = server.requests[1]
    assert (request['top_k'], request['repetition_penalty']) == (5, 1.1)
    assert 'stop' not in request
    assert [message['role'] for message in request['messages']] == ['user', 'assistant', 'user']


def test_a_server_that_fails_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    page = from_file(monkeypatch, server.url, '--model-name', 'tiny')
    server.status = 400
    say(page, 'Hi')
    assert 'answered 400' in page.error[0].value and 'context too long' in page.error[0].value
    server.status, server.finish = 200, None
    say(page, 'Ho')
    assert page.error[1].value == f'{server.url} broke off in the middle of an answer'
    server.finish = 'length'
    click(page, 'Try again')
    assert len(page.error) == 1
    server.stop()
    say(page, 'Hu')
    assert page.error[1].value.startswith(f'no answer from {server.url}: ')
    assert len(server.requests) == 3
    assert server.requests[2]['messages'] == [{'role': 'user', 'content': 'Ho'}]
    server.stop = lambda: None


def test_closing_the_answer_closes_the_connection(server: Server) -> None:
    from web_chat.backend import Settings
    from web_chat.server_backend import ServerBackend

    server.pieces = ['word '] * 500_000
    events = ServerBackend(server.url, 'tiny').answer([], Settings())
    assert next(events).text == 'word '
    events.close()
    assert server.gone.wait(30)


def test_a_missing_model_is_told_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = from_file(monkeypatch, tmp_path / 'none')
    assert [error.value for error in page.error] == [f'there is no folder {tmp_path / "none"}']
    assert not page.chat_input


def test_mistakes_are_told_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    import run

    assert run.main([str(tmp_path / 'none')]) == 2
    assert capsys.readouterr().err == f'error: there is no folder {tmp_path / "none"}\n'
    (tmp_path / 'empty').mkdir()
    assert run.main([str(tmp_path / 'empty')]) == 2
    assert f'error: {tmp_path / "empty"} holds no' in capsys.readouterr().err
    find = importlib.util.find_spec
    absent = {'streamlit', 'openai'}
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name in absent else find(name)
    )
    install = "pip install 'streamlit>=1.67,<2' openai"
    assert run.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f'error: streamlit not installed: {install}\n'
    assert run.main(['http://127.0.0.1:1/v1']) == 2
    assert capsys.readouterr().err == f'error: streamlit and openai not installed: {install}\n'
    assert run.main(['http://127.0.0.1:1/v1', '--ask', 'Hi']) == 2
    assert capsys.readouterr().err == f'error: openai not installed: {install}\n'


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['hf', '--port', '99999'], '--port 99999: a port is 1 to 65535'),
        (['hf', '--prt', '80'], "unrecognized arguments: --prt 80. Did you mean '--port'?"),
        (['htp://127.0.0.1:8000/v1'], 'a server begins with http:// or https://'),
        (['hf', '--model-name', 'x'], '--model-name x does nothing where hf answers'),
        (['http://a/v1', '--device', 'cpu'], '--device cpu does nothing where http://a/v1 answers'),
        (['my:Agent', '--template', 'chatml'], '--template chatml does nothing where my:Agent'),
    ],
)
def test_what_is_wrong_with_options(arguments: list[str], error: str, capsys) -> None:
    import run

    with pytest.raises(SystemExit) as left:
        run.main(arguments)
    assert left.value.code == 2 and error in capsys.readouterr().err


def test_a_backend_of_ones_own(
    write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one in the documentation."""
    import run

    page = (REPOSITORY / 'docs' / 'en' / 'web_chat.md').read_text(encoding='utf-8')
    (source,) = re.findall(r'```python\n# my_agent.py\n(.*?)```', page, re.S)
    monkeypatch.syspath_prepend(write('my_agent.py', source).parent)
    assert run.main(['my_agent:Agent', '--ask', 'What is 6 * 7?']) == 0
    answer = 'Let me see. \n```python\nprint(6 * 7)\n```\n42\nIt is 42.\n'
    assert capsys.readouterr().out == answer
    assert run.main(['my_agent:Agnet', '--ask', 'Hi']) == 2
    assert "no attribute 'Agnet'. Did you mean 'Agent'?" in capsys.readouterr().err
    for page_or_not in ([], ['--ask', 'Hi']):
        assert run.main(['no_agent:Agent', *page_or_not]) == 2
        assert 'is its folder on PYTHONPATH?' in capsys.readouterr().err
    page = say(from_file(monkeypatch, 'my_agent:Agent'), 'Hi')
    assert shown(page)[1] == ('assistant', ['Let me see.', 'It is 42.'])


@pytest.mark.parametrize(
    ('source', 'error'),
    [
        ('def Agent(: pass', ': SyntaxError at {}:1: invalid syntax'),
        ('import math\nmath.sqrt(-1)', ': ValueError at {}:2: math domain error'),
        ('def Agent():\n    raise KeyError(7)', ': KeyError at {}:2: 7'),
        ('def Agent(x): pass', ": TypeError: Agent() missing 1 required positional argument: 'x'"),
        ('Agent = 3', ": module 'faulty_agent' has no function 'Agent'."),
        ('class Agent: pass', ' gives an object of Agent, which has no method `answer`'),
    ],
)
def test_a_faulty_backend_is_told_in_a_sentence(
    source: str, error: str, write, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import run

    file = write('faulty_agent.py', source)
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.delitem(sys.modules, 'faulty_agent', raising=False)
    assert run.main(['faulty_agent:Agent', '--ask', 'Hi']) == 2
    assert capsys.readouterr().err.startswith(f'error: faulty_agent:Agent{error.format(file)}')


def test_a_page_that_has_no_place_is_told(chat_run: Path, capsys) -> None:
    import run

    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert run.main([str(chat_run), '--port', str(port)]) == 2
    assert f'--host 127.0.0.1 --port {port}: ' in capsys.readouterr().err
    assert run.main([str(chat_run), '--host', 'no..host']) == 2
    assert 'error: --host no..host --port 8501: ' in capsys.readouterr().err


def test_a_misspelt_template_is_told_before_there_is_a_page(chat_run: Path, capsys) -> None:
    import run

    assert run.main([str(chat_run), '--template', 'interlm2']) == 2
    assert "'interlm2'. Did you mean 'internlm2'?" in capsys.readouterr().err


def test_the_install_command_is_that_of_the_extra() -> None:
    from web_chat.options import INSTALL

    lines = (REPOSITORY / 'requirements' / 'optional.txt').read_text().splitlines()
    web = [line.split(': ')[1] for line in lines if line.startswith('web: ')]
    assert shlex.split(INSTALL) == ['pip', 'install', *web]


def test_ask_answers_in_the_terminal(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    import run

    assert run.main([server.url, '--ask', 'Hi']) == 0
    assert capsys.readouterr().out == 'Hello 書\n'


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')
def test_a_checkpoint_answers(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model that knows its lines, from the terminal and on the page."""
    import run

    options = [str(chat_run), '--device', 'cpu']
    assert run.main([*options, '--ask', 'hello']) == 0
    assert capsys.readouterr().out == 'Hello! What can I do for you?\n'
    assert run.main([*options, '--ask', 'hello', '--template', 'interlm2']) == 2
    assert "'interlm2'. Did you mean 'internlm2'?" in capsys.readouterr().err
    page = from_file(monkeypatch, *options)
    assert page.selectbox(key='template').value == 'internlm2'
    page.slider(key='temperature').set_value(0.0).run()
    say(say(page, 'hello'), 'Who are you?')
    assert shown(page)[1] == ('assistant', ['Hello! What can I do for you?'])
    assert shown(page)[3] == ('assistant', ['A **tiny** model, 很小的模型。'])
    page.text_area[0].set_value('Shout.').run()
    click(page, 'New conversation')
    say(page, 'hello')
    assert shown(page)[1] == ('assistant', ['HELLO!'])
    page.text_area(key='stop_strings').set_value('LO').run()
    click(page, 'New conversation')
    say(page, 'hello')
    assert shown(page)[1] == ('assistant', ['HEL'])


def test_one_model_answers_one_at_a_time(chat_run: Path) -> None:
    from web_chat.backend import Settings
    from web_chat.local_backend import load

    backend = load(str(chat_run), None, 'cpu', 'float32')
    question = [{'role': 'user', 'content': 'hello'}]
    first = backend.answer(question, Settings(temperature=0.0))
    second = backend.answer(question, Settings(temperature=0.0))
    assert next(first).text == ''  # it has the model
    assert next(second).text == ''  # waits
    first.close()
    answer = ''.join(event.text for event in second)
    assert answer == 'Hello! What can I do for you?'
    assert ''.join(event.text for event in backend.answer(question, Settings(temperature=0.0))) == (
        answer
    )


def test_it_serves_on_this_machine_only(server: Server, tmp_path: Path) -> None:
    """As a program, from another folder, until it is told to stop."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    log = tmp_path / 'log'
    with log.open('w') as out:
        process = subprocess.Popen(
            [sys.executable, PROJECT / 'run.py', server.url, '--port', str(port)],
            cwd=tmp_path,
            env=os.environ | {'HOME': str(tmp_path)},  # no settings of whoever runs the tests
            stdout=out,
            stderr=out,
        )
    try:
        response = None
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                response = urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=60)
                break
            time.sleep(0.1)
        assert response is not None, log.read_text()
        with response:
            policy = response.headers['Content-Security-Policy']
        assert "default-src 'self'" in policy and 'http' not in policy
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(('127.0.0.2', port))
    finally:
        process.terminate()
        process.wait(60)
    assert 'Traceback' not in log.read_text()
    assert not list(tmp_path.rglob('.streamlit'))
