"""How questions are put: prompts of examples and a question, as text or as a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from string import ascii_uppercase

import numpy as np

from internlm_mm.tokenizers import ChatTemplate, Tokenizer
from internlm_mm.utils.suggest import did_you_mean

_FIELD = re.compile(r'\{(\w+)\}')


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """What a prompt is made of. Words in braces are filled in.

    Attributes:
        intro: In front of everything; of {subject}.
        question: Of {question} and {options}; ends where the answer begins.
        option: A line of {options}; of {letter} and {text}.
        answer: Behind a question; of {answer}.
        between: Between examples, and in front of the question.
    """

    intro: str = ''
    question: str = '{question}'
    option: str = ''
    answer: str = '{answer}'
    between: str = '\n\n'


_ALLOWED = {
    'intro': {'subject'},
    'question': {'question', 'options'},
    'option': {'letter', 'text'},
    'answer': {'answer'},
    'between': set(),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, spelt, and the answer that an example shows.

    Attributes:
        question: What is asked, without what `PromptForm.answer` puts in front of an answer.
        answer: As it follows a question in a prompt.
    """

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in words and in tokens.

    Attributes:
        text: As a person reads it.
        ids: Tokens, bos first where the tokenizer has one, [prompt], int32.
    """

    text: str
    ids: np.ndarray


def change_form(form: PromptForm, changes: Mapping[str, str] | None) -> PromptForm:
    """A form with some of its strings replaced.

    Args:
        form: The task's default.
        changes: By attribute; None for none.

    Raises:
        ValueError: If there is no such string, or it asks for what is not there.
    """
    known = [field.name for field in fields(PromptForm)]
    for key, value in (changes or {}).items():
        if key not in known:
            raise ValueError(f'prompt.{key}={value!r} is unknown.{did_you_mean(key, known)}')
        if not isinstance(value, str):
            raise ValueError(f'prompt.{key}={value!r}: expected a text')
        for name in _FIELD.findall(value):
            if name not in _ALLOWED[key]:
                hint = did_you_mean(name, _ALLOWED[key])
                raise ValueError(f'prompt.{key}: {{{name}}} is nothing that is filled in.{hint}')
    return replace(form, **(changes or {}))


def spell(form: str, **values: str) -> str:
    """Fill in the words in braces; what is filled in may have braces of its own."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), form)


def list_options(form: PromptForm, options: Sequence[str]) -> str:
    """Lines of options with their letters."""
    letters = ascii_uppercase[: len(options)]
    return ''.join(
        spell(form.option, letter=letter, text=text)
        for letter, text in zip(letters, options, strict=True)
    )


class Speaker:
    """Spells prompts for one model.

    Args:
        tokenizer: Its tokenizer.
        template: Its chat template; None for prompts as plain text.
        form: Strings of the task.

    Raises:
        ValueError: If a prompt could begin with nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, form: PromptForm
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.form = form

    def prompt(self, intro: str, shots: Sequence[Turn], question: str) -> Prompt:
        """Examples and a question.

        Args:
            intro: In front of everything.
            shots: The examples, first things first.
            question: Spelt as those of the examples.
        """
        if self.template is not None:
            return self._conversation(self.template, intro, shots, question)
        parts = [f'{shot.question}{shot.answer}' for shot in shots]
        text = intro + self.form.between.join([*parts, question])
        bos = self.tokenizer.bos_id
        ids = [*([] if bos is None else [bos]), *self.tokenizer.encode(text)]
        if not ids:
            raise ValueError('the prompt is empty and the tokenizer has no token to begin with')
        return Prompt(text, np.array(ids, np.int32))

    def continuation(self, prompt: Prompt, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a prompt and of an answer behind it, as the two together are encoded.

        Where tokens of both merge at the seam, the merged ones count as the answer's.

        Args:
            prompt: From `prompt`.
            answer: A text; behind a conversation it is encoded by itself, as in training.

        Returns:
            What is given, [prompt], and what is predicted, [continuation], both int32.
        """
        if self.template is not None:
            own = self.tokenizer.encode(answer.strip())
            return prompt.ids, np.array(own, np.int32)
        whole = self.tokenizer.encode(prompt.text + answer)
        first = 0 if self.tokenizer.bos_id is None else 1
        same = 0
        for ours, theirs in zip(prompt.ids[first:].tolist(), whole, strict=False):
            if ours != theirs:
                break
            same += 1
        same = max(same, 1 - first)  # something must be given
        given = prompt.ids[: first + same]
        if first + same > len(given):
            raise ValueError('the prompt is empty and the tokenizer has no token to begin with')
        return given, np.array(whole[same:], np.int32)

    def stops(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What ends an answer: tokens and strings."""
        return ((), ()) if self.template is None else self.template.stops(self.tokenizer)

    def _conversation(
        self, template: ChatTemplate, intro: str, shots: Sequence[Turn], question: str
    ) -> Prompt:
        messages = []
        for shot in shots:
            messages.append({'role': 'user', 'content': shot.question})
            messages.append({'role': 'assistant', 'content': shot.answer.strip()})
        messages.append({'role': 'user', 'content': question})
        messages[0]['content'] = intro + messages[0]['content']
        if template.default_system:
            messages.insert(0, {'role': 'system', 'content': template.default_system})
        encoded = template.encode(self.tokenizer, messages, add_generation_prompt=True)
        text = template.text(messages, add_generation_prompt=True)
        return Prompt(text, np.array(encoded.ids, np.int32))
