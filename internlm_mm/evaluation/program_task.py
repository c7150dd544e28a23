"""Problems that the model answers by a program: PAL, program-aided language models."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from internlm_mm.evaluation.answers import find_comparison
from internlm_mm.evaluation.few_shot import (
    Source,
    by_subject,
    check_counts,
    fitting_prompt,
    share_right,
    spread,
    tell_fewer_shots,
)
from internlm_mm.evaluation.fields import as_object, need_text
from internlm_mm.evaluation.problems import PROBLEM_FORMATS, Problem
from internlm_mm.evaluation.programs import Programs, Run, run_cells
from internlm_mm.evaluation.prompting import PromptForm, Speaker, Turn, change_form, spell
from internlm_mm.evaluation.requests import Generate, Outside
from internlm_mm.evaluation.rows import find_files, read_rows
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.evaluation.verdicts import NOT_ENDED, count_errors, rate
from internlm_mm.inference import Sampling, Written
from internlm_mm.registry import TASKS
from internlm_mm.tokenizers import build_template
from internlm_mm.utils.suggest import did_you_mean

FORM = PromptForm(
    intro='Answer each question by a Python function solution() that returns the answer.\n\n',
    question='Question: {question}\n\n',
    answer='```python\n{answer}\n```',
)
"""What prompts are made of; in a conversation, questions and programs are its turns."""

NO_PROGRAM = 'no_program'
"""Class of a text that defines no `solution`."""

EXAMPLES = (
    (
        'A baker makes 12 trays of 9 rolls. She sells 71 rolls and gives half of the others away. '
        'How many rolls does she keep?',
        """def solution():
    rolls = 12 * 9
    left = rolls - 71
    given_away = left / 2
    return left - given_away""",
    ),
    (
        'A train goes 80 km an hour for 2.5 hours, and then 60 km an hour for 90 minutes. How many '
        'km does it go?',
        """def solution():
    first = 80 * 2.5
    second = 60 * 90 / 60
    return first + second""",
    ),
    (
        'A coat of 140 dollars is reduced by 15%. Ana pays with two bills of 100 dollars. How much '
        'does she get back?',
        """def solution():
    price = 140 * (100 - 15) / 100
    paid = 2 * 100
    return paid - price""",
    ),
)
"""Questions with their programs, as examples in front of each problem."""

_FENCED = re.compile(r'```[ \t]*\w*[ \t]*\n(.*?)(?:\n?[ \t]*```|$)', re.DOTALL)
_DEFINES = re.compile(r'^def solution\b', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Sample:
    problem: Problem
    prompt: str
    shots: int
    request: Generate


@TASKS.register_module()
class ProgramTask(Task):
    """Share of problems whose answer a program gives that the model writes.

    The program is run in the sandbox, and what its function `solution()` returns is the answer.

    Args:
        path: A file, or a folder with a sub-folder for each split.
        format: How rows are read: a name in `PROBLEM_FORMATS`.
        name: Of its metrics; by default the format's and 'pal'.
        split: Sub-folder of `path`, or the end of file names in it.
        examples: A file of `question` and `program`, which stand in front of each problem in the
            place of `EXAMPLES`.
        shots: How many of them do; None for all.
        compare: When two answers are the same: a name in `COMPARISONS`.
        prompt: Strings in the place of the default ones; see `PromptForm`.
        chat_template: A name or a dict with `type`: problems and examples become turns of a
            conversation.
        max_new_tokens: Tokens of a program at most.
        temperature: Of the draws; 0 is greedy.
        top_p: As in `Sampling`, where something is drawn.
        seed: Of the draws.
        sandbox: See `Programs`; its limit `seconds` is for a program and its answer together.
        max_samples: Ask no more problems, evenly spread over all.
        on_error: 'raise' stops at the first malformed row or prompt that is too long; 'skip'
            leaves them out and says how many.

    Raises:
        ValueError: If an option is none; names the key and the nearest choice.

    Source: https://arxiv.org/abs/2211.10435; InternLM's tools/pal_inference.py did it for GSM8K.
    """

    generates = True
    at_once = 64

    def __init__(
        self,
        path: str | Path,
        format: Literal['gsm8k', 'question_answer', 'math', 'agieval_cloze'] = 'gsm8k',
        *,
        name: str | None = None,
        split: str | None = None,
        examples: str | Path | None = None,
        shots: int | None = None,
        compare: str = 'near',
        prompt: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, Any] | None = None,
        max_new_tokens: int = 384,
        temperature: float = 0.0,
        top_p: float = 0.8,
        seed: int = 0,
        sandbox: Mapping[str, Any] | None = None,
        max_samples: int | None = None,
        on_error: str = 'raise',
    ) -> None:
        if format not in PROBLEM_FORMATS:
            hint = did_you_mean(format, PROBLEM_FORMATS)
            raise ValueError(f'format={format!r} is none of problems with written answers.{hint}')
        same = find_comparison(compare)
        check_counts(max_samples=max_samples)
        if shots is not None and shots < 0:
            raise ValueError(f'shots={shots} must be at least 0')
        self.name = name or f'{format}_pal'
        self.path, self.split, self.max_samples = path, split, max_samples
        self.examples, self.shots = examples, shots
        self.same = same
        self.template = None if chat_template is None else build_template(chat_template)
        self.form = change_form(FORM, prompt)
        stop = ('\nQuestion:', '\n```') if self.template is None else ()
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p if temperature else 1.0,
            stop=stop,
            seed=seed if temperature else None,
        )
        self.programs = Programs(sandbox, sessions=self.at_once)
        self._source = Source(self.name, PROBLEM_FORMATS[format], True, on_error, _placed)
        self._samples: list[_Sample] = []

    def prepare(self, subject: Subject) -> None:
        """See `Task.prepare`."""
        self._source.skipped.clear()
        problems = spread(self._source.read(self.path, self.split, 'path'), self.max_samples)
        turns = self._turns()
        speaker = Speaker(subject.tokenizer, self.template, self.form)
        ids, strings = speaker.stops()
        sampling = replace(self.sampling, stop_ids=ids, stop=(*self.sampling.stop, *strings))
        room = subject.max_seq_len - sampling.max_new_tokens
        self._samples = self._source.fitting(
            problems,
            lambda problem: self._sample(speaker, problem, turns, room, sampling),
            'problem',
            f'and max_new_tokens={sampling.max_new_tokens} do not fit into '
            f'max_seq_len={subject.max_seq_len}',
        )
        counts = [sample.shots for sample in self._samples]
        tell_fewer_shots(self.name, counts, len(turns), subject.max_seq_len)
        self.programs.check()

    def __len__(self) -> int:
        """Problems that are asked."""
        return len(self._samples)

    def play(self, index: int) -> Play:
        """Let the model write a program, and run it."""
        sample = self._samples[index]
        (written,) = yield [sample.request]
        assert isinstance(written, str)
        cut = isinstance(written, Written) and not written.whole
        begun = self.template is None and '```' in self._opening()
        program = solution_of(f'{self._opening()}{written}' if begun else written)
        run = Run(NO_PROGRAM, '', '')
        if program is not None:
            (outcome,) = yield [Outside(partial(run_solution, self.programs, program), index)]
            assert isinstance(outcome, Run)
            run = outcome
        prediction = None if run.error else run.result
        problem = sample.problem
        errors = ([run.error] if run.error else []) + ([NOT_ENDED] if cut else [])
        return {
            'place': problem.place,
            'subject': problem.subject,
            'prompt': sample.prompt,
            'output': str(written),
            'program': program,
            'prediction': prediction,
            'answer': problem.answer,
            'right': prediction is not None and self.same(prediction, problem.answer),
            'shots': sample.shots,
            'errors': errors,
        }

    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """Accuracy over all problems, by subject, and how many programs ran to their end."""
        ran = rate(records, lambda record: record['prediction'] is not None)
        groups = by_subject(records)
        counts = {'samples': len(records), 'skipped': len(self._source.skipped)}
        return Report(
            {'accuracy': share_right(records), 'execution': ran or 0.0},
            {'accuracy': groups} if groups else {},
            counts | count_errors(records),
        )

    def finish(self) -> None:
        """End all interpreters."""
        self.programs.close()

    def _turns(self) -> list[Turn]:
        """The examples, spelt."""
        pairs = list(EXAMPLES)
        if self.examples is not None:
            pairs = []
            for row in read_rows(find_files(self.examples, None, 'examples'), True):
                try:
                    fields = as_object(row.value)
                    pairs.append((need_text(fields, 'question'), need_text(fields, 'program')))
                except ValueError as error:
                    raise ValueError(f'examples: {row.place}, {error}') from None
        if self.shots is not None and self.shots > len(pairs):
            raise ValueError(f'shots={self.shots}, but there are {len(pairs)} examples')
        return [
            Turn(
                spell(self.form.question, question=question, options=''),
                spell(self.form.answer, answer=program),
            )
            for question, program in pairs[: self.shots]
        ]

    def _opening(self) -> str:
        """What stands in front of a program in an answer, '```python' and a line's end."""
        return self.form.answer.partition('{answer}')[0]

    def _sample(
        self,
        speaker: Speaker,
        problem: Problem,
        turns: Sequence[Turn],
        room: int,
        sampling: Sampling,
    ) -> _Sample | None:
        question = spell(self.form.question, question=problem.text, options='')
        if self.template is None:
            question += self._opening()
        found = fitting_prompt(
            speaker,
            spell(self.form.intro, subject=problem.subject),
            turns,
            question,
            lambda prompt: prompt if len(prompt.ids) <= room else None,
        )
        if found is None:
            return None
        prompt, count, _ = found
        return _Sample(problem, prompt.text, count, Generate(prompt.ids, sampling))


def solution_of(answer: str) -> str | None:
    """The program in an answer: the fenced one that defines `solution`, or all from there on."""
    blocks = _FENCED.findall(answer)
    found = next((block for block in blocks if _DEFINES.search(block)), None)
    if found is None and not blocks and _DEFINES.search(answer):
        return answer
    return found


def run_solution(programs: Programs, program: str) -> Run:
    """Run a program and its function; the result is what the function returned, as text."""
    run = run_cells(programs, [program, 'str(solution())'])
    if run.error:
        return run
    try:
        text = ast.literal_eval(run.result)
    except (ValueError, SyntaxError):  # longer than a reply may be
        return replace(run, error='result')
    return replace(run, result=str(text))


def _placed(problem: Problem, place: str, file_subject: str) -> Problem:
    return replace(problem, place=place, subject=problem.subject or file_subject)
