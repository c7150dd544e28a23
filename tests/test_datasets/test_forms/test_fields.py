import pytest

from internlm_mm.datasets.forms import fields


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('{"a": [1, null]}', {'a': [1, None]}),
        ("{'a': [1, None, True]}", {'a': [1, None, True]}),
        (" ['a'] ", ['a']),
    ],
)
def test_literals(text, value):
    assert fields.literal(text, 'f') == value


@pytest.mark.parametrize(
    'text',
    ['', 'f()', "__import__('os')", '{1, 2}', "b'x'", '(' * 5000, '[NaN]', "{'a': 1e999}", '1 +'],
)
def test_what_is_no_literal(text):
    with pytest.raises(ValueError, match=r'^f: neither JSON'):
        fields.literal(text, 'f')


def test_images_have_no_place_in_a_text():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    assert fields.plain_text({'content': parts}, 0) == 'ab'
    image = {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,'}}
    with pytest.raises(ValueError, match='message 3: this form has texts only'):
        fields.plain_text({'content': [*parts, image]}, 3)


def test_speakers_never_fail():
    for record in ({}, {'conversations': 'x'}, {'conversations': [1, {'from': 2}]}):
        assert list(fields.speakers(record)) == []
    assert list(fields.speakers({'conversations': {'from': ['a'], 'value': ['b']}})) == [('a', 'b')]


def test_arguments_are_objects():
    message = {'tool_calls': [fields.a_call('f', '{"x": 1}'), fields.a_call('g', {})]}
    assert fields.calls_of(message, 0) == [('f', {'x': 1}), ('g', {})]
    with pytest.raises(ValueError, match='one call a turn, not 2'):
        fields.one_call(message, 0)
    with pytest.raises(ValueError, match=r'message 2: tool_calls\[0\].function.arguments: an obj'):
        fields.calls_of({'tool_calls': [fields.a_call('f', '[1]')]}, 2)


def test_results_of_several_calls_get_names():
    calls = [fields.a_call('f', {}), fields.a_call('g', {})]
    result = {'role': 'tool', 'content': ''}
    messages = fields.named([fields.calling('', calls), dict(result), dict(result)])
    assert [m.get('name') for m in messages] == [None, 'f', 'g']
    messages = fields.named([fields.calling('', calls[:1]), dict(result)])
    assert 'name' not in messages[1]


def test_between():
    assert list(fields.between('a<b>c</b> <b></b><b>', '<b>', '</b>')) == [
        (1, 'c', 9),
        (10, '', 17),
    ]
    assert list(fields.between('</b><b>', '<b>', '</b>')) == []


@pytest.mark.parametrize(
    ('turn', 'expected'),
    [
        ({}, None), ({'loss': None, 'weight': None}, None), ({'loss': 0}, False),
        ({'loss': True}, True), ({'weight': 1}, True), ({'loss': False, 'weight': 0.0}, False),
    ],
)  # fmt: skip
def test_what_is_said_of_the_loss(turn, expected):
    assert fields.loss_of(turn, '') is expected
    assert fields.is_context(turn) is (turn.get('loss') is not None and not turn['loss'])


@pytest.mark.parametrize(
    ('turn', 'message'),
    [
        ({'loss': 'no'}, "^m: loss 'no': true or false"),
        ({'weight': -1}, '^m: weight -1: 0 or 1'),
        ({'loss': True, 'weight': 0}, '^m: loss True beside weight 0: they contradict'),
    ],
)
def test_a_loss_that_is_none(turn, message):
    with pytest.raises(ValueError, match=message):
        fields.loss_of(turn, 'm: ')
