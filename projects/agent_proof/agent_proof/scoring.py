"""What a checkpoint does with the held-out questions, by the package's own tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agent_proof.data import TEMPLATE, Amounts, Files, held_out_cases, unseen_cases
from agent_proof.tasks import GROUPS, PLUGIN_TASKS, TASKS, Case
from internlm_mm.agents import Tool
from internlm_mm.api import from_pretrained
from internlm_mm.evaluation import AgentTask, Answerers, Subject, Task, TextWriter, ToolCallTask
from internlm_mm.evaluation.session import run_task

BATCH = 256
AT_ONCE = 64
"""Questions that are worked on at a time, each with a session of the sandbox."""
MAX_NEW_TOKENS = 80
"""The longest right turn, a call with three arguments, has some 60."""
NUM_EXAMPLES = 12
GROUP_OF = {task: group for group, tasks in GROUPS.items() for task in tasks}

Records = Sequence[Mapping[str, Any]]


def examine(
    checkpoint: Path, files: Files, amounts: Amounts, backend: str, few: int | None = None
) -> dict[str, Any]:
    """Ask a model the held-out questions, with their tools and without.

    Args:
        checkpoint: Of the model.
        files: Where the questions are.
        amounts: How many there are.
        backend: Of the sandbox.
        few: About so many of each task, evenly spread; None: all.

    Returns:
        'shares', see `shares`; 'by_group', right answers by kind of question, with and without
        tools; 'examples', conversations with the model.
    """
    generator = from_pretrained(checkpoint, dtype=torch.float32)
    assert generator.tokenizer is not None
    subject = Subject(generator.tokenizer, generator.model.max_seq_len)
    answerers = Answerers(generate=TextWriter(generator, batch_size=BATCH))
    found: dict[str, Records] = {}
    for task in tasks_of(files, amounts, backend, few):
        task.prepare(subject)
        found[task.name] = run_task(task, answerers)
    held_out = found['held_out']
    step = max(1, len(held_out) // NUM_EXAMPLES)
    return {
        'shares': shares(found),
        'by_group': {
            'right': by_group(held_out),
            'without_tools': by_group(needing(found['without_tools'])),
        },
        'examples': [
            {key: record[key] for key in ('subject', 'messages', 'answer', 'right')}
            for record in held_out[step // 2 :: step]
        ],
    }


def tasks_of(files: Files, amounts: Amounts, backend: str, few: int | None) -> list[Task]:
    """What a checkpoint is asked."""

    def most(tasks: Sequence[str]) -> int | None:
        return None if few is None else few * len(tasks)

    common: dict[str, Any] = dict(chat_template=TEMPLATE, max_new_tokens=MAX_NEW_TOKENS)
    tooled: dict[str, Any] = dict(
        sandbox=dict(backend=backend, unsafe=backend == 'plain'), at_once=AT_ONCE, **common
    )
    held_out, unseen = files.asked / 'held_out.jsonl', files.asked / 'unseen.jsonl'
    return [
        AgentTask(
            held_out,
            name='held_out',
            tools=plugins_of(held_out_cases(amounts)),
            max_samples=most(TASKS),
            **tooled,
        ),
        AgentTask(
            unseen,
            name='unseen',
            tools=plugins_of(unseen_cases(amounts)),
            max_samples=most(PLUGIN_TASKS),
            **tooled,
        ),
        ToolCallTask(
            files.chat / 'held_out' / 'unseen.jsonl',
            name='unseen_calls',
            max_samples=most(PLUGIN_TASKS),
            **common,
        ),
        AgentTask(
            files.asked / 'without_tools.jsonl',
            name='without_tools',
            interpreter=False,
            max_samples=most(TASKS),
            **common,
        ),
    ]


def plugins_of(cases: Iterable[Case]) -> list[Tool]:
    """All functions that questions declare; no two have one name."""
    return [plugin.tool() for case in cases for plugin in case.plugins]


def needing(records: Records) -> Records:
    """Those whose question needs a tool."""
    return [record for record in records if record['needs_tool']]


def shares(found: Mapping[str, Records]) -> dict[str, float]:
    """The numbers of a point of the curve, from the records of all tasks."""
    held_out, unseen = found['held_out'], found['unseen']
    need = needing(held_out)
    none = [record for record in held_out if not record['needs_tool']]
    calls = [record for record in found['unseen_calls'] if record['answer']]
    return {
        'cases': len(held_out),
        'valid_call': _share(need, 'valid_call'),
        'schema_valid': _share(need, 'schema_valid'),
        'right': _share(need, 'right'),
        'not_called': 1 - _share(none, 'attempted'),
        'right_untooled': _share(none, 'right'),
        'without_tools': _share(needing(found['without_tools']), 'right'),
        'unseen_cases': len(unseen),
        'unseen_valid_call': _share(unseen, 'valid_call'),
        'unseen_schema_valid': _share(unseen, 'schema_valid'),
        'unseen_right': _share(unseen, 'right'),
        'unseen_ast_match': _share(calls, 'right'),
    }


def by_group(records: Records) -> dict[str, float]:
    """Right answers by kind of question; kinds of which there is none are not in it."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(GROUP_OF[record['subject']], []).append(record)
    return {group: _share(of, 'right') for group, of in groups.items()}


def _share(records: Records, key: str) -> float:
    return sum(bool(record[key]) for record in records) / len(records)
