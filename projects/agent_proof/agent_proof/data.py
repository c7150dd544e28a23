"""Everything that is trained on, as files in the forms that any user would bring."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_proof.draws import LETTERS
from agent_proof.names import SYLLABLES
from agent_proof.tasks import DATE, DELTA, GROUPS, PLUGIN_TASKS, PYTHON, TASKS, Case, draw_cases
from agent_proof.wordings import vocabulary
from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.training import train_tokenizer

TEMPLATE = 'internlm2'
HELD_OUT_SEED = 0
"""All seeds are asked the same held-out questions."""
SPACE = '\u2581'
DIRECT = 'direct'
"""The domain of questions that need a tool, answered at once, without any tool declared."""
DIRECT_TASKS = tuple(
    task for task in TASKS if task not in PLUGIN_TASKS and task not in GROUPS['no tool']
)
PIECES = (
    *('system', 'user', 'assistant', 'environment', ' name=', PYTHON.description),
    *('[{"name": "', '{"name": "', '", "description": "', '", "parameters": {"'),
    *('", "parameters": {"type": "object", "properties": {"', '}, "required": ["', '"]}}'),
    *('": {"type": "string"}', '": {"type": "integer"}', '": {"type": "boolean"}'),
    *('": "', '": ', '", "', ', "', '"}}', '}}', 'true', 'false'),
    *('\n```python\n', '\n```', ')\n```', 'print(', "'[::-1])", "print(''.join(sorted('", "')))"),
    *(DATE, DELTA, "date.fromisoformat('", "')", ').days)', 'timedelta(days=', 'sum([', '])'),
    *("Wrong arguments of '", "': '", "': ['", "']: ", "' is a required property.", "'. ", "'; "),
    *(" is not of type 'string'", " is not of type 'integer'", " is not of type 'boolean'"),
    *("There is no tool '", "'. Valid: ", "'. Did you mean '", "'? Tools: '", ". Tools: '", "', '"),
    "'.",
    *('x = ', 'x = [', ']\n', 'max(x)', 'min(x)', ' - ', ' + ', ' * ', ' % '),
)
"""Tokens of more than a character, beside words and the template's marks: JSON and code."""


@dataclass(frozen=True)
class Amounts:
    """How much data there is.

    Attributes:
        cases: Conversations of each task that a seed trains on; eight times as many of those that
            call functions with invented names.
        held_out: Questions of each task to be asked.
        unseen: Questions of each task that calls functions with names nobody has seen.
        on_the_way: Questions of each task that checkpoints before the last are asked.
    """

    cases: int = 8_000
    held_out: int = 40
    unseen: int = 170
    on_the_way: int = 5


@dataclass(frozen=True)
class Files:
    """Where data lie.

    Attributes:
        root: Of the whole proof.
        seed: Of the conversations.
    """

    root: Path
    seed: int

    @property
    def folder(self) -> Path:
        """All of a seed."""
        return self.root / f'seed_{self.seed}'

    @property
    def tokenizer(self) -> Path:
        """The tokenizer; that of every seed is the same."""
        return self.folder / 'tokenizer'

    @property
    def chat(self) -> Path:
        """Conversations, `train` and `held_out`, a file for each task."""
        return self.folder / 'chat'

    @property
    def asked(self) -> Path:
        """Questions with their answers, as the evaluation reads them."""
        return self.folder / 'asked'

    @property
    def done(self) -> Path:
        """Is there when all the others are."""
        return self.folder / 'data.done'

    @property
    def cache(self) -> Path:
        """Their tokens."""
        return self.folder / 'cache'


def held_out_cases(amounts: Amounts) -> list[Case]:
    """The questions that every model is asked: nothing of them was seen but functions' names."""
    taken: set[str] = set()
    return [
        case
        for task in TASKS
        for case in draw_cases(
            task,
            amounts.held_out,
            side='held_out',
            seed=HELD_OUT_SEED,
            names='train',
            taken=taken,
        )
    ]


def unseen_cases(amounts: Amounts) -> list[Case]:
    """Questions whose functions, parameters and things have names that were never seen either."""
    taken: set[str] = set()
    return [
        case
        for task in PLUGIN_TASKS
        for case in draw_cases(
            task, amounts.unseen, side='held_out', seed=HELD_OUT_SEED, taken=taken
        )
    ]


def write_data(files: Files, amounts: Amounts) -> None:
    """Write tokenizer, conversations and questions of one seed."""
    make_tokenizer(files.tokenizer)
    for task in TASKS:
        count = amounts.cases * (8 if task in PLUGIN_TASKS else 1)  # names are learned last
        cases = draw_cases(task, count, side='train', seed=files.seed)
        _write(files.chat / 'train' / f'{task}.jsonl', (case.record() for case in cases))
    direct = [
        case
        for task in DIRECT_TASKS
        for case in draw_cases(
            task, max(1, amounts.cases // 10), side='train', seed=files.seed + 1_000_000
        )
    ]
    random.Random(files.seed).shuffle(direct)
    _write(files.chat / 'train' / f'{DIRECT}.jsonl', (case.direct() for case in direct))
    held_out, unseen = held_out_cases(amounts), unseen_cases(amounts)
    for name, cases in (('held_out', held_out), ('unseen', unseen)):
        _write(files.chat / 'held_out' / f'{name}.jsonl', (case.record() for case in cases))
        _write(files.asked / f'{name}.jsonl', (case.question_record() for case in cases))
    _write(
        files.asked / 'without_tools.jsonl',
        ({**case.question_record(), 'tools': []} for case in held_out),
    )
    files.done.touch()


def symbols() -> list[str]:
    """Strings that are one token each: marks, words, syllables, and pieces of JSON and code."""
    marks = build_template(TEMPLATE).marks
    return list(dict.fromkeys((*marks, *PIECES, *vocabulary(), *SYLLABLES)))


CHARACTERS = LETTERS + LETTERS.lower() + '0123456789 \n.,:;?!+-*/%=_()[]{}"\'<>|`'


def make_tokenizer(folder: Path) -> None:
    """A vocabulary of characters, words, syllables of names, and pieces of JSON and code."""
    # SentencePiece matches symbols where a text's spaces are written as it writes them.
    words = [symbol.replace(' ', SPACE) for symbol in symbols()]
    train_tokenizer(
        [CHARACTERS * 10],
        folder,
        vocab_size=259 + len(words) + len(set(CHARACTERS)),
        user_defined_symbols=words,
        character_coverage=1.0,
        overwrite=True,
    )


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', encoding='utf-8') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)
