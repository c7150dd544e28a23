"""A server with OpenAI's protocol on this machine, which says what a script says."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ScriptServer:
    """Says one line an answer; which one is told by how often the assistant has spoken.

    A line is a dict with 'content' and 'calls', pairs of a name and arguments as JSON; bytes are
    the whole response, as is a pair of a status and bytes.

    Attributes:
        asked: What was sent, in order.
    """

    def __init__(self, *lines: object) -> None:
        self.lines = lines
        self.asked: list[dict] = []
        self.models: object = [{'id': 'scripted'}]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.respond(200, json.dumps({'data': server.models}).encode())

            def do_POST(self) -> None:
                size = int(self.headers['Content-Length'])
                request = json.loads(self.rfile.read(size))
                request['key'] = self.headers['Authorization']
                server.asked.append(request)
                said = sum(m['role'] == 'assistant' for m in request['messages'])
                line = server.lines[min(said, len(server.lines) - 1)]
                if isinstance(line, tuple):
                    self.respond(*line)
                elif isinstance(line, bytes):
                    self.respond(200, line, 'text/event-stream')
                else:
                    self.respond(200, streamed(line), 'text/event-stream')

            def respond(self, status: int, body: bytes, kind: str = 'application/json') -> None:
                self.send_response(status)
                self.send_header('Content-Type', kind)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        # How long it looks away is how long `shutdown` takes.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self.url = f'http://127.0.0.1:{self._http.server_port}/v1'

    @contextlib.contextmanager
    def serving(self) -> Iterator['ScriptServer']:
        self._thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()


def streamed(line: dict, done: bool = True) -> bytes:
    """A line as a stream, cut into small pieces."""
    deltas = [{'role': 'assistant', 'content': ''}]
    text = line.get('content') or ''
    deltas += [{'content': text[i : i + 4]} for i in range(0, len(text), 4)]
    for index, (name, arguments) in enumerate(line.get('calls', ())):
        head = {'index': index, 'id': f'c{index}', 'function': {'name': name, 'arguments': ''}}
        deltas.append({'tool_calls': [head]})
        for i in range(0, len(arguments), 5):
            piece = {'index': index, 'function': {'arguments': arguments[i : i + 5]}}
            deltas.append({'tool_calls': [piece]})
    chunks = [{'choices': [{'index': 0, 'delta': delta}]} for delta in deltas]
    if done:
        chunks.append({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})
        chunks.append({'choices': [], 'usage': {'total_tokens': 1}})
    body = b''.join(b'data: ' + json.dumps(chunk).encode() + b'\n\n' for chunk in chunks)
    return body + (b'data: [DONE]\n\n' if done else b'')
