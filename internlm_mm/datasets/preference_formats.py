"""Records of preferences in the forms they are published in -> a prompt and two answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.datasets.conversation_formats import FORMATS as CONVERSATIONS
from internlm_mm.datasets.conversation_formats import alpaca_prompt, read_formed, refuse_filled
from internlm_mm.datasets.forms.fields import is_context, need
from internlm_mm.datasets.records import Record
from internlm_mm.utils.suggest import did_you_mean, kind, misspelt_key

Messages = list[dict[str, Any]]


class Preference(NamedTuple):
    """A prompt and two ways to go on.

    Attributes:
        prompt: What both answer, as `ChatTemplate.encode` takes it.
        chosen: The better answer: one message, or several where it has calls.
        rejected: The other one.
        tools: The functions that may be called, in OpenAI's form.
        place: `file:line` of its record.
        format: Which of `FORMATS` it was read as.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: Messages
    place: str
    format: str


def read_preferences(
    path: str | Path, format: str = 'auto', *, keep_going: bool = False
) -> Iterator[Preference | ValueError]:
    """Preferences of one file, in order, and in the place of each that is malformed its error.

    Args:
        path: A .json or .jsonl file, also with .gz, or a .parquet file.
        format: One of `FORMATS`; 'auto' is what the keys of the file's first record say, which is
            logged.
        keep_going: Whether a line that is no JSON gives an error in its place, too.

    Raises:
        ValueError: If there is no such format, none fits, or the file itself is damaged.
    """
    check_format(format)
    yield from read_formed(path, format, detect_format, _read, keep_going)


def check_format(format: str) -> None:
    """Refuse a format that there is not.

    Raises:
        ValueError: With the nearest name.
    """
    known = ('auto', *FORMATS)
    if format not in known:
        raise ValueError(
            f'format={format!r} is none of {", ".join(known)}.{did_you_mean(format, known)}'
        )


def detect_format(record: Mapping[str, Any]) -> str:
    """Which of `FORMATS` a record has, by its keys and by what is text.

    Raises:
        ValueError: If it is none; names the keys that there are, and those that are looked for.
    """
    if {'question', 'response_j', 'response_k'} <= record.keys():
        return 'question_responses'
    if {'chosen', 'rejected'} <= record.keys():
        if 'conversations' in record:
            return 'sharegpt'
        if 'prompt' in record or 'question' in record:
            return 'prompt'
        if 'instruction' in record:
            return 'alpaca'
        if 'messages' in record:
            return 'messages'
        return 'hh' if isinstance(record['chosen'], str) else 'prompt'
    raise ValueError(
        f'the keys {", ".join(map(repr, record))} are of no form of preference that is known: '
        'chosen and rejected, with messages, prompt, question, instruction or conversations, or '
        'with the prompt in both; question, response_j and response_k.'
        f'{misspelt_key(record, _KEYS)}'
    )


def _read(record: Record, format: str) -> Preference:
    if record.path.name.lower().endswith('.parquet'):
        for key, value in record.value.items():
            refuse_filled(value, key)
    prompt, chosen, rejected, tools = FORMATS[format](record.value)
    if not prompt:
        raise ValueError('prompt: there is none')
    if chosen == rejected:
        raise ValueError('chosen and rejected are the same')
    for name, answer in (('chosen', chosen), ('rejected', rejected)):
        if not answer or answer[-1].get('role') != 'assistant':
            raise ValueError(f'{name}: an answer of the assistant is expected at the end')
        if any(is_context(message) for message in answer):
            raise ValueError(f'{name}: all of an answer is compared; loss or weight says not')
    for name, messages in (('prompt', prompt), ('chosen', chosen), ('rejected', rejected)):
        for index, message in enumerate(messages):
            try:
                json.dumps(message, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # JSON may spell half a character
                raise ValueError(f'{name}[{index}]: the text has a lone surrogate') from None
    return Preference(prompt, chosen, rejected, tools, record.place, format)


_Parts = tuple[Messages, Messages, Messages, Messages]


def _openai(record: Mapping[str, Any]) -> _Parts:
    """`messages` before two answers, each a message, several or a text."""
    messages, tools = CONVERSATIONS['messages'](record)
    return messages, _answer(record, 'chosen'), _answer(record, 'rejected'), tools


def _prompt(record: Mapping[str, Any]) -> _Parts:
    """A prompt of text or messages, before answers or whole conversations; or none but those."""
    key = 'question' if record.get('prompt') is None and 'question' in record else 'prompt'
    prompt = record.get(key)
    chosen, rejected = _answer(record, 'chosen'), _answer(record, 'rejected')
    tools = CONVERSATIONS['messages']({'messages': [], 'tools': record.get('tools')})[1]
    if chosen[0].get('role') != 'assistant':  # both hold the whole conversation
        messages, chosen, rejected = _common_prompt(chosen, rejected)
        if prompt:
            _check_said(prompt, [*_system(record), *messages], key)
    elif isinstance(prompt, list):
        messages = _messages(prompt, key)
    else:
        messages = [{'role': 'user', 'content': _text(record, key)}]
    return [*_system(record), *messages], chosen, rejected, tools


def _common_prompt(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Two conversations -> what they begin with, and the answers in which they part.

    Raises:
        ValueError: If one is the beginning of the other, or they part in what is no answer.
    """
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        raise ValueError('chosen and rejected are the same')
    parts = (chosen[same:], rejected[same:])
    for name, part in zip(('chosen', 'rejected'), parts, strict=True):
        if not part:
            raise ValueError(f'{name}: it is the beginning of the other conversation')
        if part[0].get('role') != 'assistant':
            raise ValueError(
                f'{name}[{same}]: the conversations part in a message of role '
                f'{part[0].get("role")!r}, and not in an answer'
            )
    return chosen[:same], *parts


def _check_said(prompt: Any, messages: Messages, key: str) -> None:
    """Refuse a prompt that says what is in no turn of the conversations beside it.

    Raises:
        ValueError: If a text is no turn of the user, or one of its messages is none of theirs.
    """
    turns = {(message.get('role'), _plain(message)) for message in messages}
    said = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    for message in _messages(said if isinstance(said, list) else [said], key):
        if (message.get('role'), _plain(message)) not in turns:
            raise ValueError(
                f'{key}: it says {_short(_plain(message))}, which is no turn of chosen and '
                'rejected, two whole conversations; leave it out, or give the answers alone'
            )


def _plain(message: Mapping[str, Any]) -> str:
    content = message.get('content')
    if isinstance(content, list):  # of parts
        texts = (part.get('text') if isinstance(part, Mapping) else part for part in content)
        content = ''.join(map(str, texts))
    return str(content or '').strip()


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else f'{text[:most]}...')


_TURN = re.compile(r'(?:\A|\n\n)(Human|Assistant):')
_SPEAKERS = {'Human': 'user', 'Assistant': 'assistant'}


def _hh(record: Mapping[str, Any]) -> _Parts:
    """Texts with `Human:` and `Assistant:` turns that begin alike, as Anthropic publishes."""
    chosen, rejected = (_turns(_text(record, key), key) for key in ('chosen', 'rejected'))
    return *_common_prompt(chosen, rejected), []


def _turns(text: str, field: str) -> Messages:
    before, *pieces = _TURN.split(text)
    if before.strip() or not pieces:
        raise ValueError(f"{field}: it does not begin with 'Human:' or 'Assistant:'")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{'role': _SPEAKERS[name], 'content': said.strip()} for name, said in turns]


def _question_responses(record: Mapping[str, Any]) -> _Parts:
    """`response_j` was preferred to `response_k`, as in the StackExchange pairs."""
    prompt = [{'role': 'user', 'content': _text(record, 'question')}]
    chosen, rejected = _answer(record, 'response_j'), _answer(record, 'response_k')
    return [*_system(record), *prompt], chosen, rejected, []


def _sharegpt(record: Mapping[str, Any]) -> _Parts:
    """ShareGPT's `conversations` before two turns, as LLaMA-Factory reads them."""
    messages, tools = CONVERSATIONS['sharegpt'](record)
    answers = []
    for key in ('chosen', 'rejected'):
        turn = need(record, key)
        turns = turn if isinstance(turn, list) else [turn]
        try:
            answers.append(CONVERSATIONS['sharegpt']({'conversations': turns})[0])
        except ValueError as error:
            raise ValueError(f'{key}: {error}') from None
    return messages, answers[0], answers[1], tools


def _alpaca(record: Mapping[str, Any]) -> _Parts:
    """Alpaca's `instruction`, `input` and `history` before two texts, as LLaMA-Factory reads."""
    messages, tools = alpaca_prompt(record)
    return messages, _answer(record, 'chosen'), _answer(record, 'rejected'), tools


FORMATS: dict[str, Callable[[Mapping[str, Any]], _Parts]] = {
    'messages': _openai,
    'prompt': _prompt,
    'hh': _hh,
    'question_responses': _question_responses,
    'sharegpt': _sharegpt,
    'alpaca': _alpaca,
}
"""Forms of a record: each function gives prompt, answers and functions, or a ValueError."""

_KEYS = (
    *('chosen', 'rejected', 'messages', 'prompt', 'question', 'instruction', 'conversations'),
    *('response_j', 'response_k'),
)


def _answer(record: Mapping[str, Any], key: str) -> Messages:
    """An answer that may be a text, a message or messages."""
    value = need(record, key)
    if isinstance(value, str):
        return [{'role': 'assistant', 'content': value}]
    return _messages(value if isinstance(value, list) else [value], key)


def _messages(messages: list[Any], field: str) -> Messages:
    if not messages:
        raise ValueError(f'{field}: it is empty')
    try:
        return CONVERSATIONS['messages']({'messages': messages})[0]
    except ValueError as error:
        raise ValueError(f'{field}, {error}') from None


def _system(record: Mapping[str, Any]) -> Messages:
    text = record.get('system')
    return [{'role': 'system', 'content': _text(record, 'system')}] if text else []


def _text(record: Mapping[str, Any], key: str) -> str:
    value = need(record, key)
    if not isinstance(value, str):
        raise ValueError(f'{key}: a text, not {kind(value)}')
    return value
