"""The strings of templates, and plain text that spells them."""

import json

from hypothesis import given
from hypothesis import strategies as some

from internlm_mm.tokenizers.chat_spelling import (
    ToolFormat,
    as_name,
    encode_plain,
    list_tools,
    split_fields,
)
from tests.conversations import TOOLS


def test_fields():
    assert list(split_fields('a{name}{x}{"name": "{arguments}"}')) == [
        ('a', ''),
        ('', 'name'),
        ('{x}{"name": "', ''),
        ('', 'arguments'),
        ('"}', ''),
    ]
    assert list(split_fields('')) == []
    assert as_name('file') == ' name=file' and as_name('') == ''


def test_listings():
    def listed(listing):
        form = ToolFormat(
            declaration='', listing=listing, call='', result=('', ''), code_name='Interpreter'
        )
        return list_tools(TOOLS, form)

    functions = [tool['function'] for tool in TOOLS]
    assert json.loads(listed('functions')) == functions
    assert list(map(json.loads, listed('lines').split('\n'))) == TOOLS
    assert list(map(json.loads, listed('indented').split('\n\n'))) == TOOLS
    first, second = listed('described').split('\n')
    assert first == 'Interpreter: Runs Python.'
    assert second.startswith('weather: The "weather" of a city {"type"')


class Greedy:
    """Finds its tokens in any text, as user-defined pieces and added tokens are found."""

    tokens = ('<a>', '<ab>', '>>')

    def encode(self, text):
        ids = []
        while text:
            token = next((t for t in self.tokens if text.startswith(t)), text[0])
            ids.append(token)
            text = text[len(token) :]
        return ids


@given(some.text('<ab>', max_size=12))
def test_reserved_tokens_do_not_come_out_of_text(text):
    pieces = encode_plain(Greedy(), text, Greedy.tokens)
    assert ''.join(pieces) == text
    assert not set(pieces) & set(Greedy.tokens)
    assert encode_plain(Greedy(), '<a>', []) == ['<a>']
