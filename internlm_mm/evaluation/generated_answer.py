"""Problems that the model answers in its own words, with the answer looked for in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from internlm_mm.evaluation.answers import EXTRACTORS, find_comparison
from internlm_mm.evaluation.few_shot import (
    Shots,
    Source,
    by_subject,
    check_counts,
    check_shots,
    fitting_prompt,
    share_right,
    spread,
    tell_fewer_shots,
)
from internlm_mm.evaluation.problems import PROBLEM_FORMATS, Problem
from internlm_mm.evaluation.prompting import PromptForm, Speaker, Turn, change_form, spell
from internlm_mm.evaluation.requests import Generate
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.inference import Sampling
from internlm_mm.registry import TASKS
from internlm_mm.tokenizers import build_template
from internlm_mm.utils.suggest import did_you_mean

TEXT_FORM = PromptForm(question='Question: {question}\nAnswer:', answer=' {answer}')
"""Prompts as plain text."""

CHAT_FORM = PromptForm()
"""Turns of a conversation: the question and the answer alone."""

STOPS = ('\n\nQuestion:',)
"""What ends an answer to a prompt of plain text: the beginning of another example."""


@dataclass(frozen=True, slots=True)
class _Sample:
    problem: Problem
    prompt: str
    shots: int
    request: Generate


@TASKS.register_module()
class GeneratedAnswer(Task):
    """Share of problems whose answer the model writes, drawn greedily.

    Args:
        path: A file, or a folder with a sub-folder for each split.
        format: How rows are read: a name in `PROBLEM_FORMATS`.
        name: Of its metrics; by default the format's.
        split: Sub-folder of `path`, or the end of file names in it.
        shots: Examples with their solutions in front of each problem.
        shots_from: Where they are from: another split, or a path.
        extract: Where the answer is looked for, in this order: names in `EXTRACTORS`; by default
            the format's.
        compare: When two answers are the same: a name in `COMPARISONS`; by default the format's.
        prompt: Strings in the place of the default ones; see `PromptForm`.
        chat_template: A name or a dict with `type`: problems and examples become turns of a
            conversation.
        max_new_tokens: Tokens of an answer at most.
        stop: Strings that end an answer; by default the beginning of another example, and none
            with a chat template, whose own marks end answers.
        max_samples: Ask no more problems, evenly spread over all.
        on_error: 'raise' stops at the first malformed row or prompt that is too long; 'skip'
            leaves them out and says how many.

    Raises:
        ValueError: If an option is none; names the key and the nearest choice.
    """

    generates = True

    def __init__(
        self,
        path: str | Path,
        format: Literal['question_answer', 'gsm8k', 'math', 'agieval_cloze'],
        *,
        name: str | None = None,
        split: str | None = None,
        shots: int = 0,
        shots_from: str | Path | None = None,
        extract: Sequence[str] | None = None,
        compare: str | None = None,
        prompt: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, Any] | None = None,
        max_new_tokens: int = 512,
        stop: Sequence[str] | None = None,
        max_samples: int | None = None,
        on_error: str = 'raise',
    ) -> None:
        if format not in PROBLEM_FORMATS:
            hint = did_you_mean(format, PROBLEM_FORMATS)
            raise ValueError(f'format={format!r} holds no problems with written answers.{hint}')
        form = PROBLEM_FORMATS[format]
        self.extract = tuple(form.extract if extract is None else extract)
        for one in self.extract:
            if one not in EXTRACTORS:
                raise ValueError(f'extract={one!r} is unknown.{did_you_mean(one, EXTRACTORS)}')
        same = find_comparison(form.compare if compare is None else compare)
        check_shots(shots, shots_from)
        check_counts(max_samples=max_samples)
        self.name = name or format
        self.path, self.split, self.shots, self.shots_from = path, split, shots, shots_from
        self.same, self.max_samples = same, max_samples
        self.template = None if chat_template is None else build_template(chat_template)
        self.form = change_form(TEXT_FORM if self.template is None else CHAT_FORM, prompt)
        if stop is None:
            stop = STOPS if self.template is None else ()
        self.sampling = Sampling(max_new_tokens=max_new_tokens, stop=tuple(stop))
        self._source = Source(self.name, form, True, on_error, _placed)
        self._samples: list[_Sample] = []

    def prepare(self, subject: Subject) -> None:
        """See `Task.prepare`."""
        self._source.skipped.clear()
        problems = spread(self._source.read(self.path, self.split, 'path'), self.max_samples)
        shots = self._source.shots(self.path, self.shots_from, self.shots)
        speaker = Speaker(subject.tokenizer, self.template, self.form)
        ids, strings = speaker.stops()
        sampling = replace(
            self.sampling,
            stop_ids=(*self.sampling.stop_ids, *ids),
            stop=(*self.sampling.stop, *strings),
        )
        room = subject.max_seq_len - sampling.max_new_tokens
        self._samples = self._source.fitting(
            problems,
            lambda problem: self._sample(speaker, problem, shots, room, sampling),
            'problem',
            f'and max_new_tokens={sampling.max_new_tokens} do not fit into '
            f'max_seq_len={subject.max_seq_len}',
        )
        counts = [sample.shots for sample in self._samples]
        tell_fewer_shots(self.name, counts, self.shots, subject.max_seq_len)

    def __len__(self) -> int:
        """Problems that are asked."""
        return len(self._samples)

    def play(self, index: int) -> Play:
        """Let the model write, and look for the answer."""
        sample = self._samples[index]
        problem = sample.problem
        (written,) = yield [sample.request]
        assert isinstance(written, str)
        found = (EXTRACTORS[name](written) for name in self.extract)
        prediction = next((answer for answer in found if answer is not None), None)
        return {
            'place': problem.place,
            'subject': problem.subject,
            'prompt': sample.prompt,
            'output': written,
            'prediction': prediction,
            'answer': problem.answer,
            'right': prediction is not None and self.same(prediction, problem.answer),
            'shots': sample.shots,
        }

    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """Accuracy over all problems, by subject, and how many outputs had an answer."""
        found = sum(record['prediction'] is not None for record in records)
        metrics = {'accuracy': share_right(records), 'answered': found / max(len(records), 1)}
        groups = by_subject(records)
        fewer = sum(record['shots'] < self.shots for record in records)
        counts = {'samples': len(records), 'skipped': len(self._source.skipped)}
        return Report(
            metrics,
            {'accuracy': groups} if groups else {},
            counts | ({'with_fewer_shots': fewer} if fewer else {}),
        )

    def _sample(
        self, speaker: Speaker, problem: Problem, shots: Shots, room: int, sampling: Sampling
    ) -> _Sample | None:
        turns = [self._turn(shot) for shot in shots.of(problem)]
        found = fitting_prompt(
            speaker,
            spell(self.form.intro, subject=problem.subject),
            turns,
            self._turn(problem).question,
            lambda prompt: prompt if len(prompt.ids) <= room else None,
        )
        if found is None:
            return None
        prompt, count, _ = found
        return _Sample(problem, prompt.text, count, Generate(prompt.ids, sampling))

    def _turn(self, problem: Problem) -> Turn:
        return Turn(
            spell(self.form.question, question=problem.text, options=''),
            spell(self.form.answer, answer=problem.solution),
        )


def _placed(problem: Problem, place: str, file_subject: str) -> Problem:
    return replace(problem, place=place, subject=problem.subject or file_subject)
