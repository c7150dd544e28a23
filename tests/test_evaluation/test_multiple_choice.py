"""Multiple choice, scored under several layouts, against transformers and a loop by hand."""

import json
from pathlib import Path
from string import ascii_uppercase

import pytest
import torch
import transformers

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.engine.evaluate import evaluate
from internlm_mm.evaluation import MultipleChoice, Subject
from tests.questions import write_ceval, write_jsonl, write_mmlu
from tests.trained import train_tokenizer, trained_run

SHARED = dict(max_seq_len=512)


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp('run'), **SHARED)[0]


@pytest.fixture(scope='module')
def exported(work_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf') / 'hf'
    convert_to_hf(work_dir, folder, dtype='float32')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, tokenizer, model.eval()


def log_prob(exported, prompt: str, answer: str) -> tuple[float, int]:
    """Of an answer behind a prompt, by transformers: sum and tokens."""
    _, tokenizer, model = exported
    given = tokenizer(prompt)['input_ids']
    whole = tokenizer(prompt + answer)['input_ids']
    assert whole[: len(given)] == given, 'no token crosses the seam here'
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    total = 0.0
    for place in range(len(given), len(whole)):
        total += scores[place - 1, whole[place]].item()
    return total, len(whole) - len(given)


def write_config(path: Path, *tasks: dict, **val_cfg) -> Path:
    lines = f"val_cfg = dict(type='PerplexityLoop', tasks={list(tasks)!r}, **{val_cfg!r})\n"
    path.write_text(lines)
    return path


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_mmlu_equals_transformers(work_dir, exported, tmp_path: Path) -> None:
    data = write_mmlu(tmp_path / 'mmlu')
    task = dict(
        type='MultipleChoice',
        path=str(data),
        format='mmlu',
        split='test',
        shots=2,
        shots_from='dev',
    )
    config = write_config(tmp_path / 'tasks.py', task, task_batch_size=2)
    result = evaluate(config, checkpoint=work_dir, output=tmp_path / 'out')
    records = read_records(tmp_path / 'out' / 'mmlu.jsonl')
    assert len(records) == 8
    right = []
    for record in records:
        for letter, found in zip('ABCD', record['log_probs'], strict=True):
            expected, _ = log_prob(exported, record['prompt'], f' {letter}')
            assert found == pytest.approx(expected, abs=2e-4)
        best = max(range(4), key=record['log_probs'].__getitem__)
        assert record['prediction'] == 'ABCD'[best]
        right.append('ABCD'[best] == record['answer'])
        assert record['right'] == right[-1] and record['shots'] == 2
    assert result['mmlu/accuracy'] == sum(right) / 8
    by_subject = (sum(right[:4]) / 4, sum(right[4:]) / 4)
    assert result['mmlu/accuracy_by_subject'] == sum(by_subject) / 2
    reports = json.loads((tmp_path / 'out' / 'tasks.json').read_text())
    assert reports['mmlu']['details']['accuracy'] == {
        'high_school_math': by_subject[0], 'law': by_subject[1]
    }  # fmt: skip
    assert reports['mmlu']['counts'] == {'samples': 8, 'skipped': 0}
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert metrics['mmlu/accuracy'] == result['mmlu/accuracy']


def test_the_prompt_to_the_letter(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path / 'tokenizer')
    task = MultipleChoice(
        write_mmlu(tmp_path / 'mmlu'), 'mmlu', split='test', shots=1, shots_from='dev'
    )
    task.prepare(Subject(tokenizer, 2048))
    play = task.play(4)
    requests = next(play)
    text = tokenizer.decode(requests[0].prompt[1:].tolist())
    assert text == (
        'The following are multiple choice questions (with answers) about law.\n\n'
        '"Add", please:\n37 + 6 =\nA. 42\nB. 48\nC. 43\nD. 36\nAnswer: C\n\n'
        '"Add", please:\n8 + 36 =\nA. 43\nB. 37\nC. 49\nD. 44\nAnswer:'
    )
    assert [tokenizer.decode(one.continuation.tolist()) for one in requests] == [
        ' A', ' B', ' C', ' D'
    ]  # fmt: skip
