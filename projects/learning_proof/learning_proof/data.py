"""Everything that is trained on, as files in the forms that any user would bring."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_mm.datasets.preprocessing import preprocess
from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.training import train_tokenizer
from learning_proof.tasks import (
    BRACKETS,
    LETTERS,
    TASKS,
    Case,
    draw_cases,
    plain_texts,
    random_talk,
)

TEMPLATE = 'internlm2'
BRACKETED_SHARE = 0.3
"""Share of the conversations whose answer is in brackets: both forms are right."""
HELD_OUT_SEED = 0
"""All seeds are asked the same held-out questions."""
BASE_SEED = 0
"""All seeds begin with the same base model."""


@dataclass(frozen=True)
class Amounts:
    """How much data there is.

    Attributes:
        texts: Plain texts of each domain, for the base model.
        cases: Conversations of each task that a seed trains on.
        pairs: Pairs of answers of each task.
        held_out: Questions of each task to be asked.
    """

    texts: int = 20_000
    cases: int = 6_000
    pairs: int = 1_000
    held_out: int = 200


@dataclass(frozen=True)
class Files:
    """Where data lie.

    Attributes:
        base: What the base model is made of: `text`, `tokenizer`, `tokens`.
        seed: What a seed is fine-tuned on: `chat`, `preferences`, and the `cache` of their tokens.
    """

    base: Path
    seed: Path

    @property
    def text(self) -> Path:
        """Plain texts, a file for each domain."""
        return self.base / 'text'

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all models."""
        return self.base / 'tokenizer'

    @property
    def tokens(self) -> Path:
        """The texts' tokens."""
        return self.base / 'tokens'

    @property
    def chat(self) -> Path:
        """Conversations, `train` and `held_out`, a file for each task."""
        return self.seed / 'chat'

    @property
    def preferences(self) -> Path:
        """Pairs of answers, likewise."""
        return self.seed / 'preferences'

    @property
    def cache(self) -> Path:
        """Tokens of conversations and pairs."""
        return self.seed / 'cache'


def held_out_cases(amounts: Amounts) -> list[Case]:
    """The questions that every model is asked."""
    return [
        case
        for task in TASKS
        for case in draw_cases(task, amounts.held_out, held_out=True, seed=HELD_OUT_SEED)
    ]


def write_base_data(files: Files, amounts: Amounts) -> None:
    """Write texts, tokenizer and token files for the base model."""
    for name, texts in plain_texts(amounts.texts, BASE_SEED).items():
        _write_lines(files.text / f'{name}.jsonl', ({'text': text} for text in texts))
    template = build_template(TEMPLATE)
    talk = (
        template.text([{'role': 'user', 'content': said}, {'role': 'assistant', 'content': reply}])
        for said, reply in random_talk(amounts.texts, BASE_SEED)
    )
    _write_lines(files.text / 'talk.jsonl', ({'text': text} for text in talk))
    make_tokenizer(files.tokenizer)
    preprocess(
        [files.text], files.tokens, tokenizer=files.tokenizer, num_workers=0, show_progress=False
    )


def write_seed_data(files: Files, amounts: Amounts, seed: int) -> None:
    """Write conversations and pairs of answers for one seed."""
    rng = random.Random(seed)
    for task in TASKS:
        cases = draw_cases(task, amounts.cases, held_out=False, seed=seed)
        _write_lines(
            files.chat / 'train' / f'{task}.jsonl',
            (conversation(case, rng.random() < BRACKETED_SHARE) for case in cases),
        )
        pairs = draw_cases(task, amounts.pairs, held_out=False, seed=seed + 1_000_000)
        _write_lines(files.preferences / 'train' / f'{task}.jsonl', map(preference, pairs))
        asked = draw_cases(task, amounts.held_out, held_out=True, seed=HELD_OUT_SEED)
        _write_lines(files.chat / 'held_out' / f'{task}.jsonl', map(conversation, asked))
        _write_lines(files.preferences / 'held_out' / f'{task}.jsonl', map(preference, asked))


def make_tokenizer(folder: Path) -> None:
    """A vocabulary of single characters, the template's marks, and the words of templates."""
    words = [*build_template(TEMPLATE).marks, 'user', 'assistant', *TASKS]
    characters = f'{LETTERS}0123456789+= \n' + ''.join(BRACKETS)
    train_tokenizer(
        [characters * 10],
        folder,
        vocab_size=259 + len(words) + len(set(characters)),
        user_defined_symbols=words,
        character_coverage=1.0,
    )


def conversation(case: Case, bracketed: bool = False) -> dict[str, Any]:
    """A record of one question and its answer."""
    answer = case.bracketed if bracketed else case.answer
    return {
        'messages': [
            {'role': 'user', 'content': case.question},
            {'role': 'assistant', 'content': answer},
        ]
    }


def preference(case: Case) -> dict[str, str]:
    """A record of one question and two right answers, of which that in brackets is preferred."""
    return {'prompt': case.question, 'chosen': case.bracketed, 'rejected': case.answer}


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', encoding='utf-8') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)
