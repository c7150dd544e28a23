"""A task from outside: registered, named in a config, asked by the scorer."""

import pytest

from internlm_mm.evaluation import GeneratedAnswer, MultipleChoice, Report, Task
from internlm_mm.registry import TASKS


def test_what_a_task_has_to_have() -> None:
    with pytest.raises(TypeError, match='abstract'):
        Task()
    assert Report({'accuracy': 1.0}).details == {} and not Task.generates


def test_ours_are_registered(tmp_path) -> None:
    assert TASKS.get('MultipleChoice') is MultipleChoice
    task = TASKS.build(dict(type='GeneratedAnswer', path='x', format='gsm8k', name='sums'))
    assert isinstance(task, GeneratedAnswer) and task.generates and task.name == 'sums'
