"""What the browser may load: from this server, and from nowhere else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

POLICY = '; '.join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""Answers are Markdown, and an image in them, `![](https://...)`, would call whoever it names."""

HEADERS = [
    (b'content-security-policy', POLICY.encode()),
    (b'referrer-policy', b'no-referrer'),
    (b'x-content-type-options', b'nosniff'),
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class NothingFromOutside:
    """Middleware of ASGI that puts `HEADERS` on every response.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message['type'] == 'http.response.start':
                names = [name for name, _ in HEADERS]
                kept = [pair for pair in message.get('headers', ()) if pair[0] not in names]
                message['headers'] = [*kept, *HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)
