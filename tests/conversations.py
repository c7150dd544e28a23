"""Conversations and tokenizers that tests of chat templates share."""

import json
from pathlib import Path

from hypothesis import strategies as some
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from internlm_mm.registry import CHAT_TEMPLATES
from internlm_mm.tokenizers import ChatTemplate, HFTokenizer, SentencePieceTokenizer, build_template
from tests.trained import train_tokenizer

NAMES = sorted(CHAT_TEMPLATES.module_dict)
UNUSED = [f'[UNUSED_TOKEN_{number}]' for number in range(139, 148)]


def call(name: str, arguments: dict, id: str) -> dict:
    return {'id': id, 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


WEATHER = {
    'type': 'function',
    'function': {
        'name': 'weather',
        'description': 'The "weather" of a city',
        'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
    },
}
PYTHON = {'type': 'function', 'function': {'name': 'python', 'description': 'Runs Python.'}}
TOOLS = [PYTHON, WEATHER]
PLAIN = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Hello\nyou'},
    {'role': 'user', 'content': '你好?'},
    {'role': 'assistant', 'content': '好'},
]
CALLING = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': '6 * 7? And the weather?'},
    {
        'role': 'assistant',
        'content': 'I compute.',
        'tool_calls': [call('python', {'code': 'print(6 * 7)'}, 'a')],
    },
    {'role': 'tool', 'tool_call_id': 'a', 'content': '42'},
    {
        'role': 'assistant',
        'content': None,
        'tool_calls': [call('weather', {'city': '上海', 'days': [1, None]}, 'b')],
    },
    {'role': 'tool', 'tool_call_id': 'b', 'content': '{"sky": "blue"}'},
    {'role': 'assistant', 'content': '42 and blue'},
]


def internlm_model(folder: Path) -> SentencePieceTokenizer:
    """A small vocabulary with the user-defined pieces of InternLM 2023 and of InternLM2."""
    pieces = ['<eoh>', '<eoa>', '<TOKENS_UNUSED_2>', '<TOKENS_UNUSED_3>', *UNUSED]
    return train_tokenizer(folder, user_defined_symbols=pieces, split_digits=True)


def byte_level(folder: Path) -> HFTokenizer:
    """A small vocabulary in the manner of Llama 3's and Qwen's, with the tokens of both."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['def f(x): return x\n\nThe weather is blue.'] * 3, trainer)
    marks = ['<|begin_of_text|>', '<|end_of_text|>']
    for name in ('llama3', 'chatml'):
        marks += build_template(name).marks
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': marks[0],
        'eos_token': marks[1],
        'clean_up_tokenization_spaces': False,
    }
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return HFTokenizer(folder)


def texts(template: ChatTemplate) -> some.SearchStrategy[str]:
    """What somebody might write, above all what spells marks, whole and in pieces."""
    spellings = [*template.marks, *template.aliases.values(), '</s>', '<s>', '<0x0A>']
    parts = [*spellings, *(mark[:-1] for mark in spellings), *(mark[1:] for mark in spellings)]
    return some.lists(
        some.one_of(
            some.sampled_from([*parts, '\n', ' ', '<', '|>', 'def f1(x)', '{name}', '{{ x }}']),
            some.text(
                some.characters(exclude_categories=['Cs', 'Cc'], exclude_characters='\u2581'),
                max_size=4,
            ),
        ),
        max_size=5,
    ).map(''.join)


def conversations(template: ChatTemplate) -> some.SearchStrategy[list[dict]]:
    """Conversations of one to three turns, with calls where the template has them."""
    text = texts(template)
    code = some.builds(lambda code: ('python', {'code': code}), text)
    other = some.builds(lambda value: ('weather', {'city': value, 'n': 1}), text)
    plain = some.builds(lambda content: [{'role': 'assistant', 'content': content}], text)

    @some.composite
    def calling(draw: some.DrawFn) -> list[dict]:
        limit = 3 if template.tools is not None and template.tools.parallel else 1
        asked = draw(some.lists(some.one_of(code, other), min_size=1, max_size=limit))
        calls = [call(*one, f'{draw(some.uuids())}') for one in asked]
        results = [
            {'role': 'tool', 'tool_call_id': one['id'], 'content': draw(text)} for one in calls
        ]
        content = draw(some.one_of(some.none(), text))
        first = {'role': 'assistant', 'content': content, 'tool_calls': calls}
        return [first, *results, *draw(plain)]

    answer = plain if template.tools is None else some.one_of(plain, calling())
    turn = some.builds(
        lambda content, answer: [{'role': 'user', 'content': content}, *answer], text, answer
    )
    system = some.one_of(
        some.just([]), some.builds(lambda content: [{'role': 'system', 'content': content}], text)
    )
    return some.builds(
        lambda system, turns: system + sum(turns, []),
        system,
        some.lists(turn, min_size=1, max_size=3),
    )
