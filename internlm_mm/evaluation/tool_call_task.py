"""Calls that the model writes, compared with the right ones; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.agents.schemas import argument_errors
from internlm_mm.evaluation.ast_match import match_calls
from internlm_mm.evaluation.few_shot import Source, by_subject, check_counts, share_right, spread
from internlm_mm.evaluation.requests import Generate
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.evaluation.tool_cases import (
    ToolCase,
    bfcl_files,
    case_format,
    check_case_format,
)
from internlm_mm.evaluation.verdicts import NOT_ENDED, count_errors, known_rates, rate
from internlm_mm.inference import ChatPrompts, Sampling, Written
from internlm_mm.registry import TASKS
from internlm_mm.tokenizers import Answer, ChatTemplate, build_template, read_answer


@dataclass(frozen=True, slots=True)
class _Sample:
    case: ToolCase
    request: Generate
    prompt: str


@TASKS.register_module()
class ToolCallTask(Task):
    """Share of conversations that the model goes on with by the right calls, written greedily.

    Args:
        path: A file or folder of conversations.
        chat_template: A name or a dict with `type`; one that spells functions.
        format: 'bfcl', the files of the Berkeley Function Calling Leaderboard; or a form of
            conversations with calls, 'auto' for what each row is: there each answer that is
            trained on is a case.
        name: Of its metrics.
        split: Sub-folder of `path`, or the end of file names in it; of 'bfcl' a category.
        max_new_tokens: Tokens of an answer at most.
        max_samples: Ask no more, evenly spread over all.
        on_error: 'raise' stops at the first malformed row or prompt that is too long; 'skip'
            leaves them out and says how many.

    Raises:
        ValueError: If an option is none; names the key and the nearest choice.
    """

    generates = True

    def __init__(
        self,
        path: str | Path,
        chat_template: str | Mapping[str, Any],
        *,
        format: str = 'auto',
        name: str = 'tool_calls',
        split: str | None = None,
        max_new_tokens: int = 256,
        max_samples: int | None = None,
        on_error: str = 'raise',
    ) -> None:
        check_case_format(format)
        check_counts(max_samples=max_samples)
        self.name, self.path, self.split, self.format = name, path, split, format
        self.template = calling_template(chat_template)
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        self.max_samples, self.on_error = max_samples, on_error
        self._source = Source(name, case_format('messages', ()), True, on_error, _placed)
        self._samples: list[_Sample] = []

    def prepare(self, subject: Subject) -> None:
        """See `Task.prepare`."""
        files = bfcl_files(self.path, self.split) if self.format == 'bfcl' else []
        form = case_format(self.format, files)
        self._source = Source(self.name, form, True, self.on_error, _placed)
        if files:
            cases = [case for file in files for case in self._source.read(file, None, 'path')]
        else:
            cases = self._source.read(self.path, self.split, 'path')
        prompts = ChatPrompts(self.template, subject.tokenizer)
        sampling = prompts.with_stops(self.sampling)
        room = subject.max_seq_len - sampling.max_new_tokens

        def sample(case: ToolCase) -> _Sample | None:
            ids = prompts.encode(case.messages, case.tools)
            if len(ids) > room:
                return None
            request = Generate(np.array(ids, np.int32), sampling)
            text = self.template.text(case.messages, case.tools, add_generation_prompt=True)
            return _Sample(case, request, text)

        self._by_name = prompts.by_name
        self._samples = self._source.fitting(
            spread(cases, self.max_samples),
            sample,
            'conversation',
            f'and max_new_tokens={sampling.max_new_tokens} do not fit into '
            f'max_seq_len={subject.max_seq_len}',
            tail='',
        )

    def __len__(self) -> int:
        """Conversations that are gone on with."""
        return len(self._samples)

    def play(self, index: int) -> Play:
        """Let the model write, and read its calls."""
        sample = self._samples[index]
        (written,) = yield [sample.request]
        assert isinstance(written, str)
        whole = written.whole if isinstance(written, Written) else True
        answer = read_answer(self.template, self._by_name(written))
        calls = [{'name': call.name, 'arguments': call.arguments} for call in answer.calls]
        expected = [
            {'name': call.name, 'arguments': dict(call.arguments)} for call in sample.case.expected
        ]
        return {
            'place': sample.case.place,
            'subject': sample.case.subject,
            'prompt': sample.prompt,
            'output': str(written),
            'prediction': calls,
            'answer': expected,
            **judge(sample.case, answer, whole),
        }

    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """Rates of calls, of those that need one, and of none where none is needed."""
        calling = [record for record in records if record['answer']]
        none = [record for record in records if record['subject'].endswith('irrelevance')]
        groups, accuracy = by_subject(records), share_right(records)
        metrics = {
            'accuracy': accuracy,
            'accuracy_by_category': sum(groups.values()) / len(groups) if groups else accuracy,
            'valid_call': rate(calling, lambda record: record['valid_call']),
            'schema_valid': rate(calling, lambda record: record['schema_valid']),
            'ast_match': rate(calling, lambda record: record['right']),
            'irrelevance': rate(none, lambda record: record['right']),
        }
        counts = {'samples': len(records), 'skipped': len(self._source.skipped)}
        return Report(
            known_rates(metrics),
            {'accuracy': groups} if groups else {},
            counts | count_errors(records),
        )


def judge(case: ToolCase, answer: Answer, whole: bool) -> dict[str, Any]:
    """What is right and wrong about an answer.

    Args:
        case: That it answers.
        answer: As it was read.
        whole: Whether it ended of its own.

    Returns:
        'right'; 'valid_call', whether there is a call and each one can be read and is of a
        function that there is; 'schema_valid', whether all arguments fit, too; 'errors', the
        classes of what is wrong.
    """
    errors: list[str] = [error.kind for error in answer.errors]
    schemas = {tool['function']['name']: tool['function'].get('parameters') for tool in case.tools}
    for call in answer.calls:
        if call.name not in schemas:
            errors.append('unknown_tool')
        elif argument_errors(call.arguments, schemas[call.name] or {}):
            errors.append('schema')
    if not whole:
        errors.append(NOT_ENDED)
    readable = bool(answer.calls) and not answer.errors and whole
    verdict: dict[str, Any] = {
        'valid_call': readable and 'unknown_tool' not in errors,
        'schema_valid': readable and not errors,
    }
    if not case.expected:
        attempted = bool(answer.calls or answer.errors)
        errors += ['unneeded_call'] if attempted else []
        return {'right': not attempted, **verdict, 'errors': errors}
    if not answer.calls:
        errors += [] if answer.errors else ['no_call']
        return {'right': False, **verdict, 'errors': errors}
    mismatch = match_calls(answer.calls, case.expected, case.schemas)
    errors += [] if mismatch is None else [f'match_{mismatch}']
    return {'right': readable and mismatch is None, **verdict, 'errors': errors}


def calling_template(chat_template: str | Mapping[str, Any]) -> ChatTemplate:
    """A template that spells functions.

    Raises:
        ValueError: If there is no such template, or it spells none.
    """
    template = build_template(chat_template)
    if template.tools is None:
        raise ValueError(f'chat_template={template.name!r} spells no functions; another one does')
    return template


def _placed(case: ToolCase, place: str, _: str) -> ToolCase:
    return replace(case, place=place)
