"""Calls that go well, and all that may go wrong with one."""

import threading
import time
from dataclasses import dataclass

import pytest

from internlm_mm.agents.tools import Result, Tool, Toolbox, interpreter, tool
from internlm_mm.tokenizers.chat_messages import read_conversation


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def fail(how: str) -> str:
    """Fail."""
    if how == 'exit':
        raise SystemExit(3)
    if how == 'timeout':
        raise TimeoutError('of its own')
    if how == 'spell':
        return Unspeakable()  # type: ignore[return-value]
    raise KeyError(how)


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError('no words')


@dataclass
class Shown:
    text: str
    images: tuple[bytes, ...] = ()
    ok: bool = True


def test_declarations():
    box = Toolbox([add, tool(fail, seconds=1)])
    first, second = box.declarations()
    assert first['type'] == 'function' and first['function']['name'] == 'add'
    assert first['function']['description'] == 'Add two numbers.'
    assert second['function']['name'] == 'fail'
    read_conversation([{'role': 'user', 'content': 'q'}], box.declarations())


@pytest.mark.parametrize(
    ('given', 'text'),
    [
        ('text', 'text'),
        (None, ''),
        ({'a': ['é', None]}, '{"a": ["é", null]}'),
        (float('nan'), 'nan'),
        ({1, 2}, '{1, 2}'),
        ('half \ud800', 'half ?'),
    ],
)
def test_results_become_text(given, text):
    box = Toolbox([Tool('f', '', {'type': 'object'}, lambda: given)])
    assert box.call('f', {}) == Result('ok', text)


def test_what_goes_wrong_is_told():
    box = Toolbox([add, fail])
    assert box.call('add', {'a': 2}) == Result('ok', '3')
    unknown = box.call('ad', {})
    assert unknown.status == 'unknown' and "no tool 'ad'. Did you mean 'add'?" in unknown.text
    assert "Tools: 'add', 'fail'" in unknown.text
    wrong = box.call('add', {'a': '2', 'c': 1})
    assert wrong.status == 'arguments' and "'2' is not of type 'integer'" in wrong.text
    assert box.call('fail', {'how': 'x'}) == Result(
        'error', "'fail' raised an error:\nKeyError: 'x'"
    )
    for how, words in (('exit', 'SystemExit(3)'), ('timeout', 'of its own'), ('spell', 'no words')):
        result = box.call('fail', {'how': how})
        assert result.status == 'error' and words in result.text


def test_a_function_that_hangs():
    done = threading.Event()

    def wait() -> str:
        """Wait."""
        done.wait(30)
        return 'late'

    box = Toolbox([tool(wait, seconds=0.1)])
    start = time.monotonic()
    result = box.call('wait', {})
    assert result == Result('timeout', "'wait' took longer than 0.1 seconds.")
    assert time.monotonic() - start < 25
    done.set()


def test_megabytes_lose_their_middle():
    def shout(size: int) -> str:
        """Say much."""
        return 'a' * size + 'end'

    box = Toolbox([shout], max_chars=100)
    text = box.call('shout', {'size': 5_000_000}).text
    assert len(text) < 200 and text.endswith('end') and '4,999,903 characters left out' in text
    assert box.call('shout', {'size': 97}).text == 'a' * 97 + 'end'


def test_images_that_no_message_can_hold():
    small, large = b'\x89PNG' + b'x', b'\x89PNG' + bytes(5 << 20)
    reply = Shown('drawn', ('text', b'GIF', None, large, *[small] * 10))
    box = Toolbox([Tool('f', '', {'type': 'object'}, lambda: reply)])
    result = box.call('f', {})
    assert result.images == (small,) * 8 and result.status == 'ok'
    assert result.text.splitlines() == [
        'drawn',
        *['[an image is left out: it is no PNG file]'] * 3,
        '[an image of 5,242,884 bytes is left out: it is too large]',
        '[2 more images are left out]',
    ]
    assert len(result.content()) == 9


def test_what_a_function_does_to_its_arguments_is_its_own():
    def take(items: list, place: dict) -> int:
        """Take."""
        items.append(3)
        place.clear()
        return len(items)

    given = {'items': [1], 'place': {'a': [2]}}
    assert Toolbox([take]).call('take', given).text == '2'
    assert given == {'items': [1], 'place': {'a': [2]}}


def test_functions_that_want_to_end_the_chat():
    class Ends:
        def __str__(self) -> str:
            raise SystemExit(3)

    def leave() -> None:
        """Leave."""
        raise SystemExit(3)

    schema = {'type': 'object'}
    for one in (tool(leave, seconds=None), Tool('leave', '', schema, Ends)):
        result = Toolbox([one]).call('leave', {})
        assert result.status == 'error' and 'SystemExit: 3' in result.text


def test_schemas_without_end():
    loop = {'type': 'object', 'properties': {'a': {'$ref': '#/properties/a'}}}
    result = Toolbox([Tool('f', '', loop, lambda a: a)]).call('f', {'a': 1})
    assert result.status == 'arguments' and 'refers to itself without end' in result.text


def test_an_interpreter():
    ran = []

    def run(code: str) -> Shown:
        ran.append(code)
        if 'raise' in code:
            return Shown('ValueError', ok=False)
        return Shown('drawn', (b'\x89PNG',))

    box = Toolbox([interpreter(run)])
    result = box.call('python', {'code': 'plot()'})
    assert result == Result('ok', 'drawn', (b'\x89PNG',)) and ran == ['plot()']
    assert result.content() == [
        {'type': 'text', 'text': 'drawn'},
        {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,iVBORw=='}},
    ]
    assert box.call('python', {'code': 'raise x'}) == Result('error', 'ValueError')
    assert Result('ok', 'x').content() == 'x'


@pytest.mark.parametrize(
    ('make', 'error'),
    [
        (lambda: Toolbox([add, add]), "two tools are called 'add'"),
        (lambda: Toolbox(max_chars=3), 'max_chars=3: at least 100'),
        (lambda: Tool('a b', '', {}, add), "name of a tool 'a b': letters"),
        (lambda: Tool('a', '', {'type': 3}, add), "tool 'a': parameters: no JSON Schema"),
        (lambda: tool(add, seconds=0), "tool 'add': seconds=0: more than 0"),
    ],
)
def test_what_is_no_tool(make, error):
    with pytest.raises(ValueError, match=error):
        make()
