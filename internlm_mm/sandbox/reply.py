"""What a cell gave: read from a process that nobody trusts."""

import binascii
import json
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any

from internlm_mm.sandbox.limits import MIB, Limits
from internlm_mm.sandbox.png import check_png

RICH = ('text/html', 'text/markdown', 'text/latex', 'image/svg+xml', 'application/json')
"""Forms besides plain text that the value of a cell's last expression may have."""

_KEYS = {'token': str, 'status': str, 'result': str, 'rich': dict, 'images': list, 'error': str}
_STATUSES = ('ok', 'error', 'interrupted')


class ProtocolError(Exception):
    """The worker sent what no worker of ours sends."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one cell.

    Text may hold any character, terminal escapes included, and `rich` any HTML: both were written
    by the program. Whoever shows them has to escape them.

    Attributes:
        status: 'ok', 'error' (the code raised), 'interrupted' (it went over a limit and what was
            defined stays) or 'killed' (its processes ended and what was defined is lost).
        stdout: What it printed.
        stderr: What it wrote to standard error.
        result: The value of the last expression as text, None if there is none.
        rich: Other forms of that value by MIME type, of those in `RICH`.
        images: PNG files: open figures, images shown and the image that the last expression is.
        error: Traceback, or which limit was reached and what to do; None if all went well.
        limit: 'seconds', 'cpu_seconds', 'memory_mb', 'output_mb', 'disk_mb' or 'files', the limit
            that ended the cell; 'asked' if `Session.interrupt` did; or None.
        truncated: Whether output, result or error were longer than what is here.
        fresh: Whether the cell began without what earlier cells defined, because their
            interpreter was killed or had been idle for too long.
        notes: What was left out, and why.
        elapsed: Wall-clock time in seconds.
    """

    status: str
    stdout: str = ''
    stderr: str = ''
    result: str | None = None
    rich: dict[str, str] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()
    error: str | None = None
    limit: str | None = None
    truncated: bool = False
    fresh: bool = False
    notes: tuple[str, ...] = ()
    elapsed: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end."""
        return self.status == 'ok'

    @property
    def timed_out(self) -> bool:
        """Whether time ran out, by the clock or on the processor."""
        return self.limit in ('seconds', 'cpu_seconds')

    @property
    def state_lost(self) -> bool:
        """Whether the next cell will begin without what this one and earlier ones defined."""
        return self.status == 'killed'

    @property
    def text(self) -> str:
        """All of it as one text, as a model is shown it."""
        lines = [self.stdout, self.stderr, self.result or '', self.error or '', *self.notes]
        shown = [line.removesuffix('\n') for line in lines if line]
        if self.truncated:
            shown.append('[output truncated]')
        if self.fresh:
            shown.insert(0, '[the interpreter was restarted: define again what you need]')
        return '\n'.join(shown)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A worker's own account of a cell, checked for form."""

    status: str
    result: str | None
    rich: dict[str, str]
    images: tuple[bytes, ...]
    error: str | None
    truncated: bool
    notes: tuple[str, ...]


def read_outcome(data: bytes, token: str, limits: Limits) -> Outcome:
    """Read what a worker sent.

    Args:
        data: JSON.
        token: What was sent behind the cell and has to come back.
        limits: Larger texts are cut, images that are too large or none are left out.

    Raises:
        ProtocolError: If it is not the answer of a worker of ours to that cell.
    """
    # Each value takes a multiple of its text in memory, and an honest answer has few: its texts
    # have no more of these characters than they are long, and images have none.
    if sum(map(data.count, (b',', b'[', b'{'))) > 8 * limits.output_chars + 1000:
        raise ProtocolError('more values than a worker sends')
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f'no JSON: {type(error).__name__}') from None
    if not isinstance(answer, dict) or answer.keys() - _KEYS.keys():
        raise ProtocolError('not what a worker sends')
    for key, kind in _KEYS.items():
        value = answer.get(key)
        if not isinstance(value, kind) and not (value is None and key in ('result', 'error')):
            raise ProtocolError(f'{key} is not {kind.__name__}')
    if not compare_digest(answer['token'].encode('utf-8', 'replace'), token.encode()):
        raise ProtocolError('the answer to another cell')
    if answer['status'] not in _STATUSES:
        raise ProtocolError('no such status')
    cut = _Cutter(limits.output_chars)
    images, notes = _read_images(answer['images'], limits)
    rich = {
        mime: text
        for mime, text in answer['rich'].items()
        if mime in RICH and isinstance(text, str) and len(text) <= limits.output_chars
    }
    return Outcome(
        status=answer['status'],
        result=cut(answer['result']),
        rich={mime: clean(text) for mime, text in rich.items()},
        images=images,
        error=cut(answer['error']),
        truncated=cut.happened,
        notes=notes,
    )


def clean(text: str) -> str:
    """The same without halves of characters, which no file and no terminal could take."""
    return text.encode('utf-8', 'replace').decode('utf-8')


class _Cutter:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.happened = False

    def __call__(self, text: str | None) -> str | None:
        if text is None:
            return None
        if len(text) > self.limit:
            self.happened = True
            text = text[: self.limit]
        return clean(text)


def _read_images(listed: list[Any], limits: Limits) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
    images, notes = [], []
    for one in listed[: limits.images]:
        try:
            if not isinstance(one, str) or len(one) > limits.image_mb * MIB * 4 // 3 + 4:
                raise ValueError(f'an image is larger than {limits.image_mb} MiB')
            data = binascii.a2b_base64(one.encode('ascii'), strict_mode=True)
            check_png(data, limits.image_mb * MIB, limits.image_megapixels * 1_000_000)
        except ValueError as error:  # UnicodeEncodeError and binascii.Error are some
            notes.append(f'[left out: {error}]')
        else:
            images.append(data)
    if len(listed) > limits.images:
        notes.append(f'[left out: {len(listed) - limits.images} images; {limits.images} are shown]')
    return tuple(images), tuple(notes)
