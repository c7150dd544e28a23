"""Conversations -> documents of tokens with a loss mask, none of them longer than a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from internlm_mm.datasets.conversation_formats import Example
from internlm_mm.datasets.forms.fields import is_context
from internlm_mm.tokenizers import ChatTemplate, Tokenizer
from internlm_mm.tokenizers.chat_spelling import Encoded
from internlm_mm.utils.suggest import did_you_mean

OVERLONG = ('split', 'truncate', 'error')
"""What may be done with a conversation that is longer than a row."""


class EncodedConversation(NamedTuple):
    """What a conversation became.

    Attributes:
        documents: Tokens and loss masks, at least one.
        was_cut: Whether it was longer than a row.
        num_lost: Tokens that were cut off.
    """

    documents: list[Encoded]
    was_cut: bool
    num_lost: int = 0


@dataclass(frozen=True)
class ConversationEncoder:
    """Spells conversations in tokens.

    Args:
        tokenizer: Of the model.
        template: How conversations are spelt.
        max_tokens: Most tokens of a document.
        overlong: 'split' begins another document before a user's turn, with the system's turns
            once more; a single turn that is too long is an error. 'truncate' keeps the beginning.
            'error' is an error.
        add_ending: Whether the last answer ends as samples of the template do, where it has an
            ending of its own.

    Raises:
        ValueError: If `overlong` is none of `OVERLONG`.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    max_tokens: int
    overlong: str = 'split'
    add_ending: bool = True

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            hint = did_you_mean(self.overlong, OVERLONG)
            raise ValueError(f'overlong={self.overlong!r} is none of {", ".join(OVERLONG)}.{hint}')

    def __call__(self, example: Example) -> EncodedConversation:
        """Documents of one conversation.

        Raises:
            ValueError: Naming place, message and field, if it cannot be spelt, has an answer
                without text or nothing to learn, or is too long.
        """
        place = example.place
        _check_answers(example)
        whole = self._encode(example, example.messages, True)
        documents = [whole]
        was_cut = len(whole.ids) > self.max_tokens
        num_lost = 0
        if was_cut:
            if self.overlong == 'error':
                raise ValueError(
                    f'{place}: {len(whole.ids):,} tokens, more than the {self.max_tokens:,} of a '
                    "row; overlong='split' or 'truncate' takes it"
                )
            if self.overlong == 'truncate':
                cut = slice(self.max_tokens)
                documents = [Encoded(whole.ids[cut], whole.loss_mask[cut])]
                num_lost = len(whole.ids) - self.max_tokens
            else:
                documents = self._split(example)
        if not any(any(document.loss_mask[1:]) for document in documents):
            left = ' in what is left of it' if was_cut else ''
            raise ValueError(f'{place}, messages: there is nothing to learn{left}: no answer')
        return EncodedConversation(documents, was_cut, num_lost)

    def _encode(
        self, example: Example, messages: Sequence[Mapping[str, Any]], is_last: bool
    ) -> Encoded:
        return self.template.encode(
            self.tokenizer,
            messages,
            example.tools or None,
            add_ending=self.add_ending and is_last,
            where=example.place,
        )

    def _split(self, example: Example) -> list[Encoded]:
        """As many whole turns a document as it holds, each behind the system's turns."""
        system, turns = split_turns(example.messages)
        documents = []
        first = 0
        while first < len(turns):
            best: Encoded | None = None
            # Turns are spelt one by one but encoded together, so a sum of lengths is a guess only.
            low, high = first + 1, len(turns)
            while low <= high:
                stop = (low + high + 1) // 2 if best is not None else low
                messages = [*system, *(m for turn in turns[first:stop] for m in turn)]
                document = self._encode(example, messages, stop == len(turns))
                if len(document.ids) > self.max_tokens:
                    high = stop - 1
                else:
                    best, low = document, stop + 1
                    taken = stop
            if best is None:
                index = len(system) + sum(map(len, turns[:first]))
                raise ValueError(
                    f'{example.place}, message {index}: the turn that begins here is longer, with '
                    f"the system's, than the {self.max_tokens:,} tokens of a row; "
                    "overlong='truncate' would cut it"
                )
            documents.append(best)
            first = taken
        return documents


def split_turns(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[list[Mapping[str, Any]]]]:
    """Cut a conversation before every user's message that follows an answer.

    A call, its result and what the assistant makes of it stay together.

    Returns:
        The system's messages, and the turns.
    """
    system = [message for message in messages[:1] if message.get('role') == 'system']
    turns: list[list[Mapping[str, Any]]] = []
    last = None
    for message in messages[len(system) :]:
        role = message.get('role')
        if not turns or (role == 'user' and last != 'user'):
            turns.append([])
        turns[-1].append(message)
        last = role
    return system, turns


def _check_answers(example: Example) -> None:
    for index, message in enumerate(example.messages):
        if message.get('role') != 'assistant' or is_context(message):
            continue
        content = message.get('content')
        if not message.get('tool_calls') and isinstance(content, (str, type(None), list)):
            parts = content if isinstance(content, list) else [{'text': content or ''}]
            texts = [part.get('text') for part in parts if isinstance(part, Mapping)]
            if not any(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(
                    f'{example.place}, message {index}: content is empty, and an empty answer '
                    "would be learned; in a conversation 'loss': false keeps it as context"
                )
