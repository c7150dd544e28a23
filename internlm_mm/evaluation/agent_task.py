"""Questions that the model works on with tools, turn by turn, in the loop that a chat runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from internlm_mm.agents import Agent, Tool, Toolbox, Trace
from internlm_mm.evaluation.agent_cases import AgentCase, read_agent_case
from internlm_mm.evaluation.agent_tools import PYTHON, Desk, find_tool
from internlm_mm.evaluation.answers import find_comparison
from internlm_mm.evaluation.few_shot import Source, by_subject, check_counts, share_right, spread
from internlm_mm.evaluation.problems import ProblemFormat
from internlm_mm.evaluation.programs import Programs
from internlm_mm.evaluation.requests import Generate, Outside
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.evaluation.verdicts import NOT_ENDED, count_errors, known_rates, rate
from internlm_mm.inference import ChatPrompts, Sampling, Written
from internlm_mm.registry import TASKS
from internlm_mm.tokenizers import build_template, read_answer
from internlm_mm.utils.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class _Sample:
    case: AgentCase
    tools: tuple[Tool, ...]
    prompt: str


@TASKS.register_module()
class AgentTask(Task):
    """Share of questions that the model answers rightly with its tools, written greedily.

    Args:
        path: A file of questions, or a folder with a sub-folder for each split.
        chat_template: A name or a dict with `type`; one that spells functions, if there are any.
        name: Of its metrics.
        split: Sub-folder of `path`, or the end of file names in it.
        tools: Python functions, tools, or their names such as 'my_module.weather'. They run in
            this process.
        interpreter: Whether there is the tool `python`, which runs code in the sandbox, in a
            session of its own for each question.
        compare: When an answer is right: a name in `COMPARISONS`.
        max_turns: How often the model is asked.
        max_repairs: How often in a row it may write a call that cannot be read.
        max_new_tokens: Tokens of a turn at most.
        seconds: Time of all calls of a question together.
        sandbox: See `Programs`.
        at_once: Questions that are worked on at a time, each with its session.
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
        name: str = 'agent',
        split: str | None = None,
        tools: Sequence[str | Tool | Callable[..., Any]] = (),
        interpreter: bool = True,
        compare: str = 'auto',
        max_turns: int = 8,
        max_repairs: int = 2,
        max_new_tokens: int = 256,
        seconds: float = 60.0,
        sandbox: Mapping[str, Any] | None = None,
        at_once: int = 32,
        max_samples: int | None = None,
        on_error: str = 'raise',
    ) -> None:
        same = find_comparison(compare)
        check_counts(max_samples=max_samples, at_once=at_once)
        if not seconds > 0:
            raise ValueError(f'seconds={seconds} must be above 0')
        if sandbox is not None and not interpreter:
            raise ValueError('sandbox does nothing with interpreter=False')
        self.name, self.path, self.split = name, path, split
        self.template = build_template(chat_template)
        self.tools = tuple(find_tool(one) for one in tools)
        if interpreter:
            self.tools = (*self.tools, PYTHON)
        self.agent = Agent(_nobody, self.template, Toolbox(self.tools), max_turns, max_repairs)
        self.same, self.seconds = same, seconds
        self.max_new_tokens = max_new_tokens
        self.at_once, self.max_samples = at_once, max_samples
        self.programs = Programs(sandbox, at_once) if interpreter else None
        form = ProblemFormat(read_agent_case, (), compare)  # type: ignore[arg-type]
        self._source = Source(name, form, True, on_error, _placed)
        self._samples: list[_Sample] = []
        self._desks: dict[int, Desk] = {}

    def prepare(self, subject: Subject) -> None:
        """See `Task.prepare`."""
        self._source.skipped.clear()
        cases = spread(self._source.read(self.path, self.split, 'path'), self.max_samples)
        self.prompts = ChatPrompts(self.template, subject.tokenizer)
        self.sampling = self.prompts.with_stops(Sampling(max_new_tokens=self.max_new_tokens))
        self.longest = subject.max_seq_len
        self._samples = self._source.fitting(
            cases,
            self._sample,
            'question',
            f'and max_new_tokens={self.max_new_tokens} do not fit into '
            f'max_seq_len={subject.max_seq_len}',
            tail='',
        )
        if self.programs is not None:
            self.programs.check()

    def __len__(self) -> int:
        """Questions that are asked."""
        return len(self._samples)

    def play(self, index: int) -> Play:
        """Let the model work until it has an answer, or a limit is reached."""
        sample = self._samples[index]
        trace = self.agent.begin(sample.case.messages)
        trace.tools = [one.declaration() for one in sample.tools]
        errors: list[str] = []
        for _ in range(self.agent.max_turns):
            request = self._request(trace)
            if isinstance(request, str):
                trace.status = request
                break
            (written,) = yield [request]
            assert isinstance(written, str)
            whole = written.whole if isinstance(written, Written) else True
            answer = read_answer(
                self.template, self.prompts.by_name(written), uses_tools=bool(trace.tools)
            )
            errors += [error.kind for error in answer.errors] + ([] if whole else [NOT_ENDED])
            self.agent.hear(trace, answer, str(written))
            if trace.status == 'answer' and not whole:
                trace.status = NOT_ENDED
            calls = [] if trace.status else trace.waiting()
            if calls:
                named = [(call.name, call.arguments) for call in calls]
                (outcome,) = yield [Outside(partial(self._call, index, named), owner=index)]
                assert isinstance(outcome, dict)
                for result, kind in outcome['results']:
                    trace.take(result)
                    errors += [kind] if kind else []
                if outcome['late']:
                    trace.status = 'time_limit'
            if trace.status:
                break
        else:
            trace.status = 'turn_limit'
        if index in self._desks:
            self._desks.pop(index).close()
        return self._record(sample, trace, errors)

    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """Right answers, and how the tools were used to find them."""
        need = [record for record in records if record['needs_tool']]
        need_none = [record for record in records if not record['needs_tool']]
        metrics = {
            'accuracy': share_right(records),
            'answered': rate(records, lambda record: record['status'] == 'answer'),
            'turns': sum(record['turns'] for record in records) / max(len(records), 1),
            'valid_call': rate(need, lambda record: record['valid_call']),
            'schema_valid': rate(need, lambda record: record['schema_valid']),
            'execution': rate(need, lambda record: record['execution']),
            'called_when_not_needed': rate(need_none, lambda record: record['attempted']),
        }
        groups = by_subject(records)
        counts = {'samples': len(records), 'skipped': len(self._source.skipped)}
        return Report(
            known_rates(metrics),
            {'accuracy': groups} if groups else {},
            counts | count_errors(records),
        )

    def finish(self) -> None:
        """End all interpreters."""
        for desk in self._desks.values():
            desk.close()
        self._desks.clear()
        if self.programs is not None:
            self.programs.close()

    def _sample(self, case: AgentCase) -> _Sample | None:
        tools = self.tools
        if case.tools is not None:
            known = {one.name: one for one in self.tools}
            for name in case.tools:
                if name not in known:
                    hint = did_you_mean(name, known)
                    raise ValueError(f'{case.place}, tools: the task has no {name!r}.{hint}')
            tools = tuple(known[name] for name in case.tools)
        declared = [one.declaration() for one in tools]
        room = self.longest - self.max_new_tokens
        if len(self.prompts.encode(case.messages, declared)) > room:
            return None
        text = self.template.text(case.messages, declared, add_generation_prompt=True)
        return _Sample(case, tools, text)

    def _request(self, trace: Trace) -> Generate | str:
        """What is asked next, or why nothing can be."""
        try:
            ids = self.prompts.encode(trace.messages, trace.tools)
        except ValueError:  # something that this template cannot spell
            return 'not_spelt'
        if len(ids) >= self.longest:
            return 'too_long'
        return Generate(np.array(ids, np.int32), self.sampling)

    def _call(self, index: int, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
        """Results of calls, each with the class of what went wrong. In one process only."""
        desk = self._desks.get(index)
        if desk is None:
            desk = Desk(self._samples[index].tools, self.programs, self.seconds)
            self._desks[index] = desk
        results = [desk.call(name, arguments) for name, arguments in calls]
        return {'results': results, 'late': desk.left <= 0}

    def _record(self, sample: _Sample, trace: Trace, errors: list[str]) -> dict[str, Any]:
        case = sample.case
        bad = set(errors)
        errors += [] if trace.status in ('answer', *errors) else [trace.status]
        called = bool(trace.results)
        readable = called and not trace.errors
        valid = readable and 'unknown_tool' not in bad
        fits = valid and 'schema' not in bad
        found = trace.answer if trace.status == 'answer' else None
        return {
            'place': case.place,
            'subject': case.subject,
            'prompt': sample.prompt,
            'messages': trace.messages,
            'prediction': found,
            'answer': case.answer,
            'right': found is not None and self.same(found, case.answer),
            'status': trace.status,
            'turns': trace.turns,
            'calls': len(trace.results),
            'needs_tool': case.needs_tool,
            'attempted': called or bool(trace.errors),
            'valid_call': valid,
            'schema_valid': fits,
            'execution': fits and all(result.status == 'ok' for result in trace.results),
            'errors': errors,
        }


def _nobody(messages: Any, tools: Any) -> NoReturn:
    raise RuntimeError(f'{len(messages)} messages and {len(tools)} tools: the task asks by itself')


def _placed(case: AgentCase, place: str, _: str) -> AgentCase:
    return replace(case, place=place)
