import base64
import json
from typing import Any

import pytest

from internlm_mm.sandbox import Limits, Reply
from internlm_mm.sandbox.reply import ProtocolError, clean, read_outcome
from tests.pictures import RIGHT

LIMITS = Limits(output_chars=10, images=2, image_mb=1)
TOKEN = 'f' * 32


def answer(**changes: Any) -> dict[str, Any]:
    return {
        'token': TOKEN, 'status': 'ok', 'result': None, 'rich': {}, 'images': [], 'error': None
    } | changes  # fmt: skip


def read(data: bytes | dict[str, Any]) -> Any:
    return read_outcome(
        data if isinstance(data, bytes) else json.dumps(data).encode(), TOKEN, LIMITS
    )


def test_an_answer() -> None:
    image = base64.b64encode(RIGHT).decode()
    outcome = read(answer(result='5', rich={'text/html': '<b>'}, images=[image], error='no'))
    assert (outcome.result, outcome.error, outcome.status) == ('5', 'no', 'ok')
    assert outcome.rich == {'text/html': '<b>'} and outcome.images == (RIGHT,)
    assert not outcome.truncated and outcome.notes == ()


@pytest.mark.parametrize(
    'data',
    [
        b'', b'{', b'[]', b'5', b'null', b'\xff\xfe', b'[' * 10**6, b'{"a":' * 10**5,
        b'1' * 10_000, b'{"token": NaN}',
        *(json.dumps(value).encode() for value in (
            answer(token='e' * 32), answer(token=''), answer(token=None), answer(token='\ud800'),
            answer(status='fine'), answer(status=None), answer(result=5), answer(result=['5']),
            answer(error={}), answer(rich=[]), answer(rich=None), answer(images={}),
            answer(images=None), answer(more=5), {'token': TOKEN}, {'ready': [3, 11]},
        )),
    ],
)  # fmt: skip
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(data)


def test_values_without_end_are_not_read() -> None:
    """They take twenty times their size in memory."""
    for value in (b'[]', b'{}', b'1'):
        with pytest.raises(ProtocolError, match='more values than a worker sends'):
            read(b'[' + b','.join([value] * 2000) + b']')
    commas = ',' * 10  # an honest one may be full of them
    texts = dict.fromkeys(('text/html', 'text/latex', 'text/markdown', 'image/svg+xml'), commas)
    assert read(answer(result=commas + ',', rich=texts, error=commas)).result == commas


def test_long_texts_are_cut() -> None:
    outcome = read(answer(result='x' * 50, error='y' * 50, rich={'text/html': 'z' * 50}))
    assert (outcome.result, outcome.error, outcome.rich) == ('x' * 10, 'y' * 10, {})
    assert outcome.truncated


def test_rich_forms_are_the_known_ones() -> None:
    rich = {'text/html': 'a', 'application/javascript': 'b', 'text/latex': 5, 'text/markdown': 'c'}
    assert read(answer(rich=rich)).rich == {'text/html': 'a', 'text/markdown': 'c'}


@pytest.mark.parametrize('image', ['', 'AAAA', 'é', '\ud800', 5, None, {}, 'A' * 10**7, 'AA=A'])
def test_images_that_are_none(image: object) -> None:
    outcome = read(answer(images=[image]))
    assert outcome.images == () and outcome.notes[0].startswith('[left out: ')


def test_more_images_than_are_shown() -> None:
    image = base64.b64encode(RIGHT).decode()
    outcome = read(answer(images=[image] * 9))
    assert outcome.images == (RIGHT, RIGHT)
    assert outcome.notes == ('[left out: 7 images; 2 are shown]',)


def test_halves_of_characters_are_replaced() -> None:
    assert clean('a\ud800b\0\U0001f600') == 'a?b\0\U0001f600'
    assert read(answer(result='\udfff')).result == '?'


def test_the_text_a_model_is_shown() -> None:
    reply = Reply('error', stdout='a\n', stderr='b', result='c', error='d\n', truncated=True)
    assert reply.text == 'a\nb\nc\nd\n[output truncated]'
    assert Reply('ok', fresh=True, stdout='a').text.startswith('[the interpreter was restarted')
    assert Reply('ok').text == ''
    assert Reply('killed', limit='cpu_seconds').timed_out and Reply('killed').state_lost
    assert Reply('ok').ok and not Reply('interrupted').ok
