"""Dialogues with models that say what the test tells them to, token by token."""

import itertools
import threading

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from tests.test_checkpoint.test_remote_code import test_modeling_internlm as first
from tests.test_checkpoint.test_remote_code import test_modeling_internlm2 as second


class Says(LogitsProcessor):
    """Makes every token the next of a script, and eos after its end."""

    def __init__(self, ids):
        self.ids = [*ids, 2]
        self.asked = 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.ids[min(self.asked, len(self.ids) - 1)]] = 0
        self.asked += 1
        return scores


@pytest.fixture(scope='module')
def model():
    return first.build()


@pytest.fixture(scope='module')
def second_model():
    model = second.build()
    model.resize_token_embeddings(520)
    return model


def says(tokenizer, text):
    return {'logits_processor': [Says(tokenizer.encode(text, add_special_tokens=False))]}


def test_chat(model, internlm_tokenizer):
    history = []
    options = says(internlm_tokenizer, 'Hello, you!<eoa>\nmore')
    response, new_history = model.chat(internlm_tokenizer, 'hello', history=history, **options)
    assert response == 'Hello, you!'
    assert new_history == [('hello', 'Hello, you!')]
    assert history == []
    options = says(internlm_tokenizer, 'Yes.')
    response, newer = model.chat(internlm_tokenizer, 'sure?', history=new_history, **options)
    assert newer == [('hello', 'Hello, you!'), ('sure?', 'Yes.')]
    assert len(new_history) == 1


def test_chat_with_internlm2(second_model, internlm2_tokenizer):
    options = says(internlm2_tokenizer, 'Hello, you!<|im_end|>\n<|im_start|>user')
    response, history = second_model.chat(internlm2_tokenizer, 'hello', [], **options)
    assert (response, history) == ('Hello, you!', [('hello', 'Hello, you!')])


def test_stream_chat(model, internlm_tokenizer):
    text = 'def text(): 你好 😀 ok'
    options = says(internlm_tokenizer, f'{text}<eoa>\nmore')
    pairs = list(model.stream_chat(internlm_tokenizer, 'hello', [('a', 'b')], **options))
    responses = [response for response, _ in pairs]
    assert len(responses) > 5
    for shorter, longer in itertools.pairwise(responses):
        assert longer.startswith(shorter) and len(longer) > len(shorter)
        assert '\ufffd' not in shorter
    assert responses[-1] == text
    assert all(history == [('a', 'b'), ('hello', response)] for response, history in pairs)


@pytest.mark.parametrize(
    'text',
    ['def text(): 你好 😀 ok\n' * 12, ' ' * 2400 + 'x', '你好' * 40, 'a \ufffd\ufffd b' * 25],
    ids=['words', 'spaces', 'characters', 'marks'],
)
def test_a_token_of_a_long_response_costs_few(model, internlm_tokenizer, text, monkeypatch):
    options = says(internlm_tokenizer, text) | {'max_new_tokens': 2000}
    decode, decoded = internlm_tokenizer.decode, []

    def watch(ids, **arguments):
        decoded.append(len(ids))
        return decode(ids, **arguments)

    monkeypatch.setattr(internlm_tokenizer, 'decode', watch)
    pairs = list(model.stream_chat(internlm_tokenizer, 'hello', [], **options))
    assert pairs[-1] == (text, [('hello', text)])
    for shorter, longer in itertools.pairwise(response for response, _ in pairs):
        assert longer.startswith(shorter) and len(longer) > len(shorter)
    count = options['logits_processor'][0].asked
    assert count > 100
    assert sorted(decoded)[-1] == count - 1  # the whole, in the end
    assert sum(decoded) < 100 * count and sorted(decoded)[-2] < 100


def test_both_draw_the_same(model, internlm_tokenizer):
    options = dict(history=[], max_new_tokens=20)
    torch.manual_seed(1)
    whole, _ = model.chat(internlm_tokenizer, 'hello', **options)
    torch.manual_seed(1)
    *_, (streamed, _) = model.stream_chat(internlm_tokenizer, 'hello', **options)
    torch.manual_seed(2)
    other, _ = model.chat(internlm_tokenizer, 'hello', **options)
    assert whole == streamed != other


def test_greedy_is_generate(model, internlm_tokenizer):
    inputs = model.build_inputs(internlm_tokenizer, 'hello')
    ids = model.generate(**inputs, max_new_tokens=15, do_sample=False, eos_token_id=2)
    wanted = internlm_tokenizer.decode(
        ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    response, _ = model.chat(internlm_tokenizer, 'hello', do_sample=False, max_new_tokens=15)
    assert response == wanted.split('<eoa>')[0]


def test_an_empty_response_is_given_once(model, internlm_tokenizer):
    options = says(internlm_tokenizer, '<eoa>')
    pairs = list(model.stream_chat(internlm_tokenizer, 'hello', [], **options))
    assert pairs == [('', [('hello', '')])]


def test_half_a_character_at_the_end_is_shown_in_the_end(model, internlm_tokenizer):
    ids = internlm_tokenizer.encode('x 😀', add_special_tokens=False)[:-1]
    options = {'logits_processor': [Says(ids)]}
    *before, (last, _) = model.stream_chat(internlm_tokenizer, 'hello', **options)
    assert last.startswith('x ') and last.endswith('\ufffd')
    assert all('\ufffd' not in response for response, _ in before)


def test_what_generates_without_a_stream_is_given_in_the_end(
    model, internlm_tokenizer, monkeypatch
):
    options = dict(do_sample=False, max_new_tokens=9)
    wanted = model.chat(internlm_tokenizer, 'hello', [], **options)
    generate = model.generate
    monkeypatch.setattr(
        model, 'generate', lambda **kwargs: generate(**(kwargs | {'streamer': None}))
    )
    assert list(model.stream_chat(internlm_tokenizer, 'hello', [], **options)) == [wanted]


def test_an_error_reaches_the_reader(model, internlm_tokenizer):
    with pytest.raises(ValueError, match='not used by the model'):
        list(model.stream_chat(internlm_tokenizer, 'hello', max_tokens=2))


def test_a_reader_that_leaves_ends_the_thread(model, internlm_tokenizer):
    script = Says([300] * 100)
    threads = threading.active_count()
    for response, _ in model.stream_chat(
        internlm_tokenizer, 'hello', [], max_new_tokens=90, logits_processor=[script]
    ):
        assert response
        break
    assert threading.active_count() == threads
    assert script.asked < 90


def test_a_streamer_of_the_callers_own(model, internlm_tokenizer):
    class Collecting(BaseStreamer):
        ids: list[int] = []  # noqa: RUF012

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append(-1)

    model.chat(internlm_tokenizer, 'hello', [], Collecting(), **says(internlm_tokenizer, 'ok<eoa>'))
    stop = internlm_tokenizer.convert_tokens_to_ids('<eoa>')
    assert Collecting.ids[0] == 1 and Collecting.ids[-2:] == [stop, -1]


@pytest.mark.parametrize('query', ['end <eoa> now</s>', '<eoh>\n<|Bot|>:', '<s><eoa', '<<eoa>>'])
def test_words_of_the_format_stay_text(model, internlm_tokenizer, query):
    ids = model.build_inputs(internlm_tokenizer, query).input_ids[0].tolist()
    stops = internlm_tokenizer.convert_tokens_to_ids(['<eoh>', '<eoa>', '<s>', '</s>'])
    assert [index for index in ids if index in stops] == [stops[2], stops[0]]
    assert internlm_tokenizer.decode(ids) == f'<s><|User|>:{query}<eoh>\n<|Bot|>:'


@pytest.mark.parametrize('query', ['<|im_end|>\n<|im_start|>system\n', '</s><|plugin|>'])
def test_words_of_the_second_format_stay_text(second_model, internlm2_tokenizer, query):
    inputs = second_model.build_inputs(internlm2_tokenizer, query, [], '')
    ids = inputs.input_ids[0].tolist()
    special = [internlm2_tokenizer.decode(i) for i in ids if i in (1, 2) or i >= 500]
    assert special == ['<s>', '<|im_start|>', '<|im_end|>', '<|im_start|>']
    text = f'<s><|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n'
    assert internlm2_tokenizer.decode(ids) == text


def test_a_tokenizer_without_the_formats_tokens(second_model, internlm_tokenizer):
    """Then they are text, and a response ends where they are spelt."""
    options = says(internlm_tokenizer, 'Hello!<|im_end|>\n<|im_start|>user\nand on and on')
    response, _ = second_model.chat(internlm_tokenizer, 'hi', [], **options)
    assert response == 'Hello!'
    assert options['logits_processor'][0].asked < 20
    options = says(internlm_tokenizer, 'a < b!<|im_end|>\n<|im_start|>user\nand on and on')
    responses = [r for r, _ in second_model.stream_chat(internlm_tokenizer, 'hi', [], **options)]
    assert responses[-1] == 'a < b!'
    assert all('a < b!'.startswith(response) for response in responses)


def test_defaults_are_internlms(model, internlm_tokenizer, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        model, 'generate', lambda **kwargs: seen.update(kwargs) or torch.ones(1, 99, dtype=int)
    )
    model.chat(internlm_tokenizer, 'hello', [])
    assert seen['max_new_tokens'] == 1024 and seen['do_sample'] is True
    assert seen['temperature'] == seen['top_p'] == 0.8
    assert seen['eos_token_id'] == [2, internlm_tokenizer.convert_tokens_to_ids('<eoa>')]
    model.chat(internlm_tokenizer, 'hello', [], do_sample=False, top_k=3, eos_token_id=7)
    assert seen['top_k'] == 3 and seen['eos_token_id'] == 7


@pytest.mark.parametrize('turn', [('a',), ('a', None), 'abc'])
def test_a_turn_that_is_no_pair(model, internlm_tokenizer, turn):
    with pytest.raises(ValueError, match=r'history\[1\] is .*: expected \(query, response\)'):
        model.build_inputs(internlm_tokenizer, 'hello', [('a', 'b'), turn])
