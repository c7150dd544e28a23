"""Questions with options, answered by how probable the model finds each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

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
from internlm_mm.evaluation.prompting import (
    Prompt,
    PromptForm,
    Speaker,
    Turn,
    change_form,
    list_options,
    spell,
)
from internlm_mm.evaluation.questions import QUESTION_FORMATS, Question, placed
from internlm_mm.evaluation.requests import LogProb, LogProbAnswer
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.registry import TASKS
from internlm_mm.tokenizers import build_template
from internlm_mm.utils.suggest import did_you_mean

LETTER_FORMS = {
    'en': PromptForm(
        question='{question}\n{options}Answer:',
        option='{letter}. {text}\n',
        answer=' {answer}',
    ),
    'zh': PromptForm(
        question='{question}\n{options}答案：',
        option='{letter}. {text}\n',
        answer='{answer}',
    ),
}
"""Prompts that list the options, by language."""

TEXT_FORMS = {
    'en': PromptForm(question='{question}\nAnswer:', answer=' {answer}'),
    'zh': PromptForm(question='{question}\n答案：', answer='{answer}'),
}
"""Prompts that the texts of options follow, by language."""

CHAT_LETTER_FORMS = {
    'en': PromptForm(
        question='{question}\n{options}Answer with the letter of the right option.',
        option='{letter}. {text}\n',
    ),
    'zh': PromptForm(
        question='{question}\n{options}请直接回答正确选项的字母。',
        option='{letter}. {text}\n',
    ),
}
"""Turns that list the options, by language."""

CHAT_TEXT_FORMS = {'en': PromptForm(), 'zh': PromptForm()}
"""Turns that the texts of options answer: the question alone."""

INTROS = {
    'mmlu': 'The following are multiple choice questions (with answers) about {subject}.\n\n',
    'ceval': '以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n',
}
"""What stands in front of everything, by format."""

SCORINGS = ('letters', 'texts')
NORMALISATIONS = (None, 'tokens', 'characters')


@dataclass(frozen=True, slots=True)
class _Sample:
    question: Question
    prompt: str
    shots: int
    requests: tuple[LogProb, ...]


@TASKS.register_module()
class MultipleChoice(Task):
    """Accuracy over questions with options, by log-probability, under any layout.

    Args:
        path: A file, or a folder with a sub-folder for each split.
        format: How rows are read: a name in `QUESTION_FORMATS`.
        name: Of its metrics; by default the format's.
        split: Sub-folder of `path`, or the end of file names in it.
        shots: Examples in front of each question, of its own subject.
        shots_from: Where they are from: another split, or a path.
        scoring: 'letters' lists the options and compares their letters; 'texts' does not list
            them and compares their texts.
        normalise: What the log-probability of a text is divided by: its 'tokens' or 'characters',
            or nothing.
        prompt: Strings in the place of those of the format; see `PromptForm`.
        chat_template: A name or a dict with `type`: questions and examples become turns of a
            conversation.
        max_samples: Ask no more questions, evenly spread over all.
        on_error: 'raise' stops at the first malformed row or prompt that is too long; 'skip'
            leaves them out and says how many.

    Raises:
        ValueError: If an option is none; names the key and the nearest choice.
    """

    def __init__(
        self,
        path: str | Path,
        format: Literal[
            'options', 'mmlu', 'ceval', 'agieval', 'commonsenseqa', 'bustm', 'cluewsc', 'race'
        ],
        *,
        name: str | None = None,
        split: str | None = None,
        shots: int = 0,
        shots_from: str | Path | None = None,
        scoring: Literal['letters', 'texts'] = 'letters',
        normalise: Literal['tokens', 'characters'] | None = None,
        prompt: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, Any] | None = None,
        max_samples: int | None = None,
        on_error: str = 'raise',
    ) -> None:
        if format not in QUESTION_FORMATS:
            hint = did_you_mean(format, QUESTION_FORMATS)
            raise ValueError(f'format={format!r} holds no multiple-choice questions.{hint}')
        if scoring not in SCORINGS:
            raise ValueError(f'scoring={scoring!r}.{did_you_mean(scoring, SCORINGS)}')
        if normalise not in NORMALISATIONS:
            hint = did_you_mean(normalise, NORMALISATIONS[1:])
            raise ValueError(f'normalise={normalise!r}.{hint}')
        if normalise is not None and scoring == 'letters':
            raise ValueError(f"normalise={normalise!r} is for scoring='texts': letters are as long")
        check_shots(shots, shots_from)
        check_counts(max_samples=max_samples)
        self.name = name or format
        self.path, self.split, self.shots, self.shots_from = path, split, shots, shots_from
        self.scoring, self.normalise, self.max_samples = scoring, normalise, max_samples
        self.template = None if chat_template is None else build_template(chat_template)
        form = QUESTION_FORMATS[format]
        listing, bare = (
            (LETTER_FORMS, TEXT_FORMS)
            if self.template is None
            else (CHAT_LETTER_FORMS, CHAT_TEXT_FORMS)
        )
        forms = listing if scoring == 'letters' else bare
        default = change_form(forms[form.language], {'intro': INTROS.get(format, '')})
        self.form = change_form(default, prompt)
        self._source = Source(self.name, form, form.has_header, on_error, placed)
        self._samples: list[_Sample] = []

    def prepare(self, subject: Subject) -> None:
        """See `Task.prepare`."""
        self._source.skipped.clear()
        questions = spread(self._source.read(self.path, self.split, 'path'), self.max_samples)
        shots = self._source.shots(self.path, self.shots_from, self.shots)
        speaker = Speaker(subject.tokenizer, self.template, self.form)
        self._samples = self._source.fitting(
            questions,
            lambda question: self._sample(speaker, question, shots, subject.max_seq_len),
            'question',
            f'does not fit into max_seq_len={subject.max_seq_len} tokens',
        )
        counts = [sample.shots for sample in self._samples]
        tell_fewer_shots(self.name, counts, self.shots, subject.max_seq_len)

    def __len__(self) -> int:
        """Questions that are asked."""
        return len(self._samples)

    def play(self, index: int) -> Play:
        """Ask for every option, take the likeliest; of equal ones the first."""
        sample = self._samples[index]
        question = sample.question
        answers = yield sample.requests
        scores = [
            self._score(answer, text)
            for answer, text in zip(answers, question.options, strict=True)
        ]
        chosen = max(range(len(scores)), key=scores.__getitem__)
        letters = ascii_uppercase
        return {
            'place': question.place,
            'subject': question.subject,
            'prompt': sample.prompt,
            'options': list(question.options),
            'log_probs': [answer.log_prob for answer in answers if not isinstance(answer, str)],
            'prediction': letters[chosen],
            'answer': letters[question.answer],
            'right': chosen == question.answer,
            'shots': sample.shots,
        }

    def report(self, records: Sequence[Mapping[str, Any]]) -> Report:
        """Accuracy over all questions, by subject, and the mean over subjects."""
        metrics, details = {'accuracy': share_right(records)}, {}
        groups = by_subject(records)
        if groups:
            metrics['accuracy_by_subject'] = sum(groups.values()) / len(groups)
            details['accuracy'] = groups
        fewer = sum(record['shots'] < self.shots for record in records)
        counts = {'samples': len(records), 'skipped': len(self._source.skipped)}
        return Report(metrics, details, counts | ({'with_fewer_shots': fewer} if fewer else {}))

    def _sample(
        self, speaker: Speaker, question: Question, shots: Shots, longest: int
    ) -> _Sample | None:
        letters = ascii_uppercase[: len(question.options)]
        ends = letters if self.scoring == 'letters' else question.options
        answers = [spell(self.form.answer, answer=end) for end in ends]

        def fits(prompt: Prompt) -> tuple[LogProb, ...] | None:
            if len(prompt.ids) > longest:
                return None
            asked = tuple(LogProb(*speaker.continuation(prompt, end)) for end in answers)
            return asked if max(one.num_tokens for one in asked) <= longest else None

        intro = spell(self.form.intro, subject=question.subject.replace('_', ' '))
        turns = [self._turn(shot) for shot in shots.of(question)]
        found = fitting_prompt(speaker, intro, turns, self._turn(question).question, fits)
        if found is None:
            return None
        prompt, count, asked = found
        return _Sample(question, prompt.text, count, asked)

    def _turn(self, question: Question) -> Turn:
        options = list_options(self.form, question.options)
        listed = self.scoring == 'letters'
        end = ascii_uppercase[question.answer] if listed else question.options[question.answer]
        return Turn(
            spell(self.form.question, question=question.text, options=options),
            spell(self.form.answer, answer=end),
        )

    def _score(self, answer: Any, text: str) -> float:
        assert isinstance(answer, LogProbAnswer)
        if self.normalise is None:
            return answer.log_prob
        length = answer.num_tokens if self.normalise == 'tokens' else len(text)
        return answer.log_prob / length
