"""Rows, examples and what fits."""

import logging
from pathlib import Path

import pytest

from internlm_mm.evaluation.few_shot import (
    Shots,
    Source,
    by_subject,
    check_shots,
    fitting_prompt,
    locate_shots,
    share_right,
    spread,
)
from internlm_mm.evaluation.prompting import PromptForm, Speaker, Turn
from internlm_mm.evaluation.questions import QUESTION_FORMATS, Question, placed
from tests.questions import write_jsonl

GOOD = {'question': 'x', 'options': ['a', 'b'], 'answer': 0}


def source(on_error: str = 'raise', format: str = 'options') -> Source:
    return Source('mine', QUESTION_FORMATS[format], True, on_error, placed)


def item(subject: str, place: str) -> Question:
    return Question(text='x', options=('a', 'b'), answer=0, subject=subject, place=place)


def test_malformed_rows_raise_or_are_counted(tmp_path: Path, caplog) -> None:
    path = write_jsonl(tmp_path / 'a.jsonl', [GOOD, {'question': 'x'}, GOOD, [1]])
    with pytest.raises(ValueError, match=r"mine: .*a\.jsonl:2, field 'options' is missing"):
        source().read(path, None, 'path')
    lenient = source('skip')
    with caplog.at_level(logging.WARNING):
        assert [one.place[-1] for one in lenient.read(path, None, 'path')] == ['1', '3']
    assert len(lenient.skipped) == 2 and 'a.jsonl:4' in lenient.skipped[1]
    path = write_jsonl(tmp_path / 'b.jsonl', [{'question': 'x'}])
    with pytest.raises(ValueError, match=r'has no question, 1 malformed: .*b\.jsonl:1'):
        source('skip').read(path, None, 'path')
    path = write_jsonl(tmp_path / 'c.jsonl', [])
    with pytest.raises(ValueError, match='has no question'):
        source().read(path, None, 'path')
    with pytest.raises(ValueError, match="on_error='ignore' is none of raise, skip"):
        source('ignore')


def test_examples_are_of_the_same_subject() -> None:
    shots = Shots([item('art', 'f:1'), item('law', 'f:2'), item('law', 'f:3')], 1, "'dev'")
    assert [one.place for one in shots.of(item('law', 'g:1'))] == ['f:2']
    assert [one.place for one in shots.of(item('law', 'f:2'))] == ['f:3']  # not itself
    with pytest.raises(ValueError, match=r"f:1: shots=1, but 'dev' has 0 examples of 'art'"):
        shots.of(item('art', 'f:1'))
    with pytest.raises(ValueError, match=r"g:1: shots=1, but 'dev' has 0 examples of 'maths'"):
        shots.of(item('maths', 'g:1'))
    common = Shots([item('', 'f:1')], 1, "'dev'")
    assert len(common.of(item('maths', 'g:1'))) == 1
    assert Shots(None, 0, '').of(item('law', 'g:1')) == []


def test_shots_and_their_origin_go_together(tmp_path: Path, write) -> None:
    check_shots(0, None)
    check_shots(3, 'dev')
    with pytest.raises(ValueError, match='shots=5 needs shots_from'):
        check_shots(5, None)
    with pytest.raises(ValueError, match="shots_from='dev' does nothing without shots"):
        check_shots(0, 'dev')
    with pytest.raises(ValueError, match='shots=-1 must be at least 0'):
        check_shots(-1, None)
    file = write('train.jsonl', '')
    assert locate_shots(tmp_path, 'dev') == (tmp_path, 'dev')
    assert locate_shots(tmp_path, file) == (file, None)
    assert locate_shots(file, 'dev') == ('dev', None)


def test_a_split_of_the_path_comes_before_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    for file in ('data/val/a.jsonl', 'data/dev/a.jsonl', 'dev/a.jsonl', 'other/a.jsonl'):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / file, [GOOD])
    monkeypatch.chdir(tmp_path)
    assert locate_shots('data', 'dev') == ('data', 'dev')
    assert locate_shots('data', './dev') == ('./dev', None)
    assert locate_shots('data', tmp_path / 'dev') == (tmp_path / 'dev', None)
    assert locate_shots('data', 'other') == ('other', None)  # no split of data
    assert locate_shots('data', 'nowhere') == ('data', 'nowhere')
    (found,) = source().read(*locate_shots('data', 'dev'), 'shots_from')
    assert found.place == 'data/dev/a.jsonl:1'
    assert locate_shots('.', 'data/dev') == ('.', 'data/dev')  # the same one
    (tmp_path / 'data/data/dev').mkdir(parents=True)
    write_jsonl(tmp_path / 'data/data/dev/a.jsonl', [GOOD])
    with pytest.raises(ValueError, match=r"'data/dev' is a split of .* write '\./data/dev' or 'da"):
        locate_shots('data', 'data/dev')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'subject': ['law']}, 'subject: a text, not list'),
        ({'options': [str(number) for number in range(27)]}, 'options: 26 options at most.*27'),
    ],
)
def test_odd_rows_have_a_place_or_are_left_out(change: dict, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / 'a.jsonl', [GOOD, GOOD | change])
    with pytest.raises(ValueError, match=rf'mine: .*a\.jsonl:2, {message}'):
        source().read(path, None, 'path')
    lenient = source('skip')
    assert len(lenient.read(path, None, 'path')) == len(lenient.skipped) == 1


class Letters:
    bos_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.mark.parametrize(('room', 'count'), [(100, 3), (26, 3), (25, 2), (18, 1), (11, 0), (5, 0)])
def test_as_many_examples_as_fit(room: int, count: int) -> None:
    speaker = Speaker(Letters(), None, PromptForm())
    turns = [Turn(f'q{index}', f' a{index}') for index in range(3)]
    found = fitting_prompt(
        speaker, '', turns, 'asked', lambda prompt: prompt if len(prompt.ids) <= room else None
    )
    assert found is not None and found[1] == count
    assert found[0].text.startswith('q0' if count else 'asked')
    assert fitting_prompt(speaker, '', turns, 'asked', lambda prompt: None) is None


def test_spread_evenly() -> None:
    items = [item('', str(number)) for number in range(10)]
    assert [one.place for one in spread(items, 4)] == ['0', '2', '5', '7']
    assert spread(items, None) == spread(items, 10) == spread(items, 99) == items


def test_shares() -> None:
    records = [
        {'subject': 'b', 'right': True}, {'subject': 'a', 'right': False},
        {'subject': 'b', 'right': False}, {'subject': '', 'right': True},
    ]  # fmt: skip
    assert share_right(records) == 0.5
    assert by_subject(records) == {'(none)': 1.0, 'a': 0.0, 'b': 0.5}
    assert by_subject(records[1:2]) == {} and share_right([]) == 0.0
