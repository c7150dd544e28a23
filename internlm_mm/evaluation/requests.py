"""What a task may ask of a model, and what it is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm_mm.inference import Sampling


@dataclass(frozen=True, slots=True, eq=False)
class LogProb:
    """How probable is a continuation?

    Attributes:
        prompt: Tokens in front of it, at least one, [prompt], int32.
        continuation: Its tokens, at least one, [continuation], int32.
    """

    prompt: np.ndarray
    continuation: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.prompt) + len(self.continuation) - 1


@dataclass(frozen=True, slots=True)
class LogProbAnswer:
    """The answer to a `LogProb`.

    Attributes:
        log_prob: Sum over the tokens of the continuation, natural logarithm.
        num_tokens: Tokens of the continuation.
        is_greedy: Whether each of them is the likeliest at its place.
    """

    log_prob: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True, eq=False)
class Generate:
    """What does the model go on with? Answered with a text, of `Written` where that is known.

    Attributes:
        prompt: Tokens in front, at least one, [prompt], int32.
        sampling: How tokens are drawn and what ends a text.
    """

    prompt: np.ndarray
    sampling: Sampling


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """What comes of work outside the model, such as running a program?

    It is done once, in one process, and what it gives is told to all of them: a program may give
    something else every time, and processes that go on differently would wait for one another
    forever.

    Attributes:
        work: Does it, and gives what can be sent to other processes. May run in any thread.
        owner: Work of one number is always done in the same process, in order.
    """

    work: Callable[[], Any]
    owner: int = 0


Request = LogProb | Generate | Outside
Answer = LogProbAnswer | str | Any
