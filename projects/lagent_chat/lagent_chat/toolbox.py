"""Tools as somebody at a terminal uses them: Ctrl-C ends a call, never the chat."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from internlm_mm.agents import Result, Tool, Toolbox, interpreter
from internlm_mm.sandbox import Session
from internlm_mm.tokenizers.chat_messages import CODE_TOOL


class ChatTools(Toolbox):
    """Plugins, and an interpreter.

    Ctrl-C during a cell raises an exception in it, and what was defined stays; once more ends its
    interpreter. During a plugin it is no longer waited for. The model is told either way.

    Args:
        plugins: Tools.
        session: Of the sandbox, where programs run; None for no interpreter.
        max_chars: Longer results lose their middle.

    Raises:
        ValueError: If two have one name.
    """

    def __init__(
        self, plugins: Iterable[Tool] = (), session: Session | None = None, max_chars: int = 20_000
    ) -> None:
        self._session = session
        code = [] if session is None else [interpreter(session.run)]
        super().__init__([*code, *plugins], max_chars=max_chars)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Run a tool; see `Toolbox.call`."""
        try:
            if self._session is None or name != CODE_TOOL:
                return super().call(name, arguments)
            with on_interrupt(self._session.interrupt):
                return super().call(name, arguments)
        except KeyboardInterrupt:
            return Result('error', f'{name!r} was stopped by the user.')


@contextmanager
def on_interrupt(first: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C do something else than raise `KeyboardInterrupt`.

    Only the main thread is told of Ctrl-C; in others this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        first()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
