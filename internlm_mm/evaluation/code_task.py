"""Functions that the model writes, run against their tests: HumanEval and files of its form."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.evaluation.few_shot import Source, check_counts, spread
from internlm_mm.evaluation.fields import as_object, need, need_text
from internlm_mm.evaluation.problems import ProblemFormat
from internlm_mm.evaluation.programs import Programs, Run, run_cells
from internlm_mm.evaluation.prompting import PromptForm, Speaker, change_form, spell
from internlm_mm.evaluation.requests import Generate, Outside
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.evaluation.verdicts import NOT_ENDED, count_errors
from internlm_mm.inference import Sampling, Written
from internlm_mm.registry import TASKS
from internlm_mm.tokenizers import build_template

TEXT_FORM = PromptForm()
"""As plain text, the prompt is the beginning of the program, which the model goes on with."""

CHAT_FORM = PromptForm(
    question='Complete this function. Answer with the whole of it, in Python, between ``` and '
    '```.\n\n```python\n{question}\n```'
)
"""What is asked in a conversation."""

STOPS = ('\nclass ', '\ndef ', '\n#', '\nif ', '\nprint(', '\n@', '\nassert ')
"""What ends the body of a function in plain text: the beginning of something else."""

_FENCED = re.compile(r'```[ \t]*\w*[ \t]*\n(.*?)(?:\n?[ \t]*```|$)', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeProblem:
    """A function to write.

    Attributes:
        task_id: Its name in the set.
        prompt: Imports, signature and docstring.
        entry_point: Name of the function.
        test: A program that defines `check(candidate)`.
        subject: None that is known.
        place: `file:line` of its row.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    subject: str = ''
    place: str = ''


@dataclass(frozen=True, slots=True)
class _Sample:
    problem: CodeProblem
    text: str
    ids: np.ndarray


@TASKS.register_module()
class CodeTask(Task):
    """Share of functions that pass their tests: pass@k.

    Args:
        path: A file of problems in the form of HumanEval, or a folder of them.
        name: Of its metrics.
        split: Sub-folder of `path`, or the end of file names in it.
        samples: Functions that are written for each problem.
        k: Values of pass@k, at most `samples` each.
        temperature: Of the draws; 0 is greedy, which only one sample may be.
        top_p: As in `Sampling`.
        seed: Of the draws.
        prompt: Strings in the place of the default ones; see `PromptForm`.
        chat_template: A name or a dict with `type`: the problem is put to the model as a user's
            message, and the program is looked for in what it answers.
        max_new_tokens: Tokens of a program at most.
        stop: Strings that end a program; by default the beginning of something that is no longer
            the function, and none with a chat template.
        sandbox: See `Programs`; its limit `seconds` is for a program and its tests together.
        max_samples: Take no more problems, evenly spread over all.
        on_error: 'raise' stops at the first malformed row or prompt that is too long; 'skip'
            leaves them out and says how many.

    Raises:
        ValueError: If an option is none; names the key and the nearest choice.

    Source: https://arxiv.org/abs/2107.03374, whose estimator pass@k is.
    """

    generates = True
    at_once = 64

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = 'humaneval',
        split: str | None = None,
        samples: int = 1,
        k: Sequence[int] = (1,),
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int = 0,
        prompt: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, Any] | None = None,
        max_new_tokens: int = 512,
        stop: Sequence[str] | None = None,
        sandbox: Mapping[str, Any] | None = None,
        max_samples: int | None = None,
        on_error: str = 'raise',
    ) -> None:
        check_counts(samples=samples, max_samples=max_samples)
        if not k or not all(1 <= one <= samples for one in k):
            raise ValueError(f'k={list(k)}: each from 1 to samples={samples}')
        if samples > 1 and temperature == 0:
            raise ValueError(
                f'samples={samples} with temperature=0 would all be the same: try temperature=0.8'
            )
        self.name, self.path, self.split, self.max_samples = name, path, split, max_samples
        self.template = None if chat_template is None else build_template(chat_template)
        self.form = change_form(TEXT_FORM if self.template is None else CHAT_FORM, prompt)
        if stop is None:
            stop = STOPS if self.template is None else ()
        self.samplings = [
            Sampling(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p if temperature else 1.0,
                stop=tuple(stop),
                seed=seed + number if temperature else None,
            )
            for number in range(samples)
        ]
        self.k = tuple(sorted(set(k)))
        self.programs = Programs(sandbox, sessions=self.at_once)
        form = ProblemFormat(read_code_problem, (), 'text')  # type: ignore[arg-type]
        self._source = Source(name, form, True, on_error, _placed)
        self._samples: list[_Sample] = []

    def prepare(self, subject: Subject) -> None:
        """See `Task.prepare`."""
        self._source.skipped.clear()
        problems = spread(self._source.read(self.path, self.split, 'path'), self.max_samples)
        speaker = Speaker(subject.tokenizer, self.template, self.form)
        ids, strings = speaker.stops()
        self._asked = [
            replace(one, stop_ids=ids, stop=(*one.stop, *strings)) for one in self.samplings
        ]
        most = self.samplings[0].max_new_tokens
        room = subject.max_seq_len - most

        def sample(problem: CodeProblem) -> _Sample | None:
            question = spell(self.form.question, question=problem.prompt, options='')
            said = speaker.prompt(self.form.intro, (), question)
            return _Sample(problem, said.text, said.ids) if len(said.ids) <= room else None

        self._samples = self._source.fitting(
            problems,
            sample,
            'problem',
            f'and max_new_tokens={most} do not fit into max_seq_len={subject.max_seq_len}',
            tail='',
        )
        self.programs.check()

    def __len__(self) -> int:
        """Problems that are set."""
        return len(self._samples)

    def play(self, index: int) -> Play:
        """Let the model write, and run what it wrote."""
        sample = self._samples[index]
        problem = sample.problem
        texts = yield [Generate(sample.ids, sampling) for sampling in self._asked]
        outputs = [str(text) for text in texts]
        codes = [self._program(problem, output) for output in outputs]
        runs = yield [
            Outside(partial(check_function, self.programs, code, problem), index + number)
            for number, code in enumerate(codes)
        ]
        errors = [run.error if isinstance(run, Run) else '' for run in runs]
        passed = errors.count('')
        cut = any(isinstance(text, Written) and not text.whole for text in texts)
        return {
            'place': problem.place,
            'subject': problem.task_id,
            'prompt': sample.text,
            'outputs': outputs,
            'prediction': codes[0],
            'answer': problem.entry_point,
            'right': errors[0] == '',
            'passed': passed,
            'outcomes': [error or 'passed' for error in errors],
            'errors': [error for error in errors if error] + ([NOT_ENDED] if cut else []),
        }

    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """pass@k, each the mean over problems of an estimate without bias."""
        count = len(self.samplings)
        metrics = {
            f'pass_at_{k}': sum(pass_at_k(count, record['passed'], k) for record in records)
            / max(len(records), 1)
            for k in self.k
        }
        counts = {'samples': len(records), 'skipped': len(self._source.skipped)}
        return Report(metrics, {}, counts | count_errors(records))

    def finish(self) -> None:
        """End all interpreters."""
        self.programs.close()

    def _program(self, problem: CodeProblem, output: str) -> str:
        if self.template is None:
            return problem.prompt + output
        return whole_program(output, problem)


def read_code_problem(row: Any) -> Iterator[CodeProblem]:
    """`prompt`, `entry_point`, `test`; `task_id` where there is one."""
    row = as_object(row)
    entry_point = need_text(row, 'entry_point')
    if not entry_point.isidentifier():
        raise ValueError(f'entry_point {entry_point!r}: the name of a function')
    need_text(row, 'prompt')
    test = need_text(row, 'test')
    if not re.search(r'^def check\b', test, re.MULTILINE):
        raise ValueError("test: no 'def check(candidate)' in it")
    task_id = row.get('task_id', '')
    yield CodeProblem(
        task_id=str(task_id) if task_id is not None else '',
        prompt=need(row, 'prompt'),  # to the letter: white space is part of a program
        entry_point=entry_point,
        test=test,
    )


def whole_program(answer: str, problem: CodeProblem) -> str:
    """The program in a chat's answer: the fenced one that defines the function.

    What stands in front of the function in the problem, such as imports, stands in front of it; a
    body alone follows the problem.
    """
    blocks = _FENCED.findall(answer) or [answer]
    defines = re.compile(rf'^def {re.escape(problem.entry_point)}\b', re.MULTILINE)
    code = next((block for block in blocks if defines.search(block)), blocks[0])
    if not defines.search(code):
        return problem.prompt + code
    start = defines.search(problem.prompt)
    before = problem.prompt[: start.start()] if start else ''
    return f'{before}\n{code}'


def check_function(programs: Programs, code: str, problem: CodeProblem) -> Run:
    """Run a program and its tests. What it prints or how it ends does not make it pass.

    The last cell's value has to be a word that was drawn for this run, so that a program which
    leaves before its tests are done has not passed them.
    """
    word = secrets.token_hex(8)
    last = f'check({problem.entry_point})\n{word!r}'
    run = run_cells(programs, [code, problem.test, last])
    if not run.error and run.result != repr(word):
        return replace(run, error='killed')
    return run


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of `k` samples passes, estimated from more of them without bias.

    Args:
        samples: How many there are.
        passed: How many of those passed.
        k: At most `samples`.
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def _placed(problem: CodeProblem, place: str, _: str) -> CodeProblem:
    return replace(problem, place=place)
