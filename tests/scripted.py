"""A model that says what a test has written for it, for tasks that go over several turns."""

from collections.abc import Callable, Sequence
from typing import Any

from internlm_mm.evaluation import Answerers, Generate, Task, run_task
from internlm_mm.inference import Written


def written_by(
    say: Callable[[str], str], tokenizer: Any, cut: str = '...'
) -> Callable[[Sequence[Generate]], list[Written]]:
    """Answers requests by their prompts' text; what ends in `cut` is not whole."""

    def write(requests: Sequence[Generate]) -> list[Written]:
        texts = [say(tokenizer.decode(request.prompt.tolist())) for request in requests]
        return [Written(text, not text.endswith(cut)) for text in texts]

    return write


def records_of(task: Task, say: Callable[[str], str], tokenizer: Any) -> list[dict[str, Any]]:
    """Records of a prepared task, answered by `say`."""
    return run_task(task, Answerers(generate=written_by(say, tokenizer)))
