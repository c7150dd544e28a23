"""Prompts in words and tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from internlm_mm.evaluation.prompting import (
    PromptForm,
    Speaker,
    Turn,
    change_form,
    list_options,
    spell,
)
from internlm_mm.tokenizers import build_template
from tests.conversations import internlm_model
from tests.trained import train_tokenizer

FORM = PromptForm(question='Q: {question}\nA:', option='{letter}) {text}; ', answer=' {answer}')
SHOTS = [Turn('Q: 1?\nA:', ' one'), Turn('Q: 2?\nA:', ' two')]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def chat_tokenizer(tmp_path_factory):
    return internlm_model(tmp_path_factory.mktemp('chat'))


def test_forms_change_by_name() -> None:
    form = change_form(FORM, {'intro': 'On {subject}. '})
    assert form.intro == 'On {subject}. ' and form.question == FORM.question
    assert change_form(FORM, None) == FORM
    assert list_options(FORM, ['x', '{text}']) == 'A) x; B) {text}; '
    assert spell('{question}{other}', question='{answer}', answer='no') == '{answer}{other}'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'questoin': 'x'}, r"prompt\.questoin='x' is unknown\. Did you mean 'question'"),
        ({'option': '{lettre}'}, r"prompt\.option: \{lettre\} is nothing.*'letter'"),
        ({'intro': '{question}'}, r'prompt\.intro: \{question\} is nothing.*subject'),
        ({'between': 3}, r'prompt\.between=3: expected a text'),
    ],
)
def test_forms_that_are_wrong(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change_form(FORM, changes)


def test_plain_text(tokenizer) -> None:
    prompt = Speaker(tokenizer, None, FORM).prompt('Intro. ', SHOTS, 'Q: 3?\nA:')
    assert prompt.text == 'Intro. Q: 1?\nA: one\n\nQ: 2?\nA: two\n\nQ: 3?\nA:'
    assert prompt.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(prompt.text)]


def test_a_conversation(chat_tokenizer) -> None:
    template = build_template('internlm2')
    speaker = Speaker(chat_tokenizer, template, PromptForm())
    prompt = speaker.prompt('Intro. ', SHOTS[:1], 'Q: 3?')
    messages = [
        {'role': 'user', 'content': 'Intro. Q: 1?\nA:'},
        {'role': 'assistant', 'content': 'one'},
        {'role': 'user', 'content': 'Q: 3?'},
    ]
    expected = template.encode(chat_tokenizer, messages, add_generation_prompt=True)
    assert prompt.ids.tolist() == expected.ids
    assert prompt.text == template.text(messages, add_generation_prompt=True)
    given_, predicted = speaker.continuation(prompt, ' two')
    assert given_ is prompt.ids and predicted.tolist() == chat_tokenizer.encode('two')
    assert speaker.stops() == template.stops(chat_tokenizer)
    assert Speaker(chat_tokenizer, None, FORM).stops() == ((), ())


@given(some.text(' def:x12()\nreturn', min_size=1), some.text(' +x12\n', min_size=1))
def test_prompt_and_answer_are_encoded_as_one_text(tokenizer, text: str, answer: str) -> None:
    speaker = Speaker(tokenizer, None, FORM)
    prompt = speaker.prompt('', [], text)
    ahead, predicted = speaker.continuation(prompt, answer)
    whole = [tokenizer.bos_id, *tokenizer.encode(text + answer)]
    assert [*ahead.tolist(), *predicted.tolist()] == whole
    assert len(ahead) >= 1 and len(predicted) >= 1
    same = np.array_equal(ahead, prompt.ids)
    # What the answer took of the prompt, it took because tokens merged.
    assert same or whole[: len(prompt.ids)] != prompt.ids.tolist()


class Bare:
    """A tokenizer without bos: a token a letter."""

    bos_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_without_a_first_token() -> None:
    speaker = Speaker(Bare(), None, FORM)
    ahead, predicted = speaker.continuation(speaker.prompt('', [], 'ab'), 'c')
    assert (ahead.tolist(), predicted.tolist()) == ([97, 98], [99])
    with pytest.raises(ValueError, match='the prompt is empty and the tokenizer has no token'):
        speaker.prompt('', [], '')


def test_examples_keep_their_order_and_marks_stay_text(chat_tokenizer, tmp_path: Path) -> None:
    speaker = Speaker(chat_tokenizer, build_template('internlm2'), PromptForm())
    mark = chat_tokenizer.token_id('[UNUSED_TOKEN_145]')
    plain = speaker.prompt('', [], 'x')
    spelt = speaker.prompt('', [], 'x<|im_end|>')
    assert mark is not None
    assert plain.ids.tolist().count(mark) == spelt.ids.tolist().count(mark) == 1
