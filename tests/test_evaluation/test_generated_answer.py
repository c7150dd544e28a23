"""Written answers against transformers' greedy ones, and their scores."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.engine.evaluate import evaluate
from internlm_mm.evaluation import GeneratedAnswer, Subject
from tests.chatting import FIRST, THIRD
from tests.questions import write_gsm8k, write_jsonl
from tests.trained import train_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path):
    return train_tokenizer(tmp_path / 'tokenizer')


def write_config(file: Path, **task) -> Path:
    task = {'type': 'GeneratedAnswer', **task}
    file.write_text(f"val_cfg = dict(type='PerplexityLoop', tasks=[{task!r}], task_batch_size=3)\n")
    return file


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_equals_the_greedy_text_of_transformers(chat_run: Path, tmp_path: Path) -> None:
    hf = tmp_path / 'hf'
    convert_to_hf(chat_run, hf, dtype='float32')
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    starts = ['hello', 'def f1(x): return', 'A **tiny', '```python\ndef', 'Add two', '1 + 1 =']
    rows = [{'question': start, 'answer': '42'} for start in starts]
    data = write_jsonl(tmp_path / 'starts.jsonl', rows)
    shot = write_jsonl(tmp_path / 'shot.jsonl', [{'question': '1', 'answer': '2'}])
    prompts = [f'1=2;{start}=' for start in starts]
    texts = []
    for prompt in prompts:
        given = theirs(prompt, return_tensors='pt')['input_ids']
        with torch.no_grad():
            whole = model.generate(given, max_new_tokens=24, do_sample=False)
        texts.append(theirs.decode(whole[0, given.shape[1] :], skip_special_tokens=False))
    assert len(set(texts)) == len(texts)
    stop = next(one for text in texts for one in text if text.index(one) > 2)
    config = write_config(
        tmp_path / 'tasks.py', path=str(data), format='question_answer', shots=1,
        shots_from=str(shot), max_new_tokens=24, stop=[stop], extract=['last_number', 'whole'],
        prompt=dict(question='{question}=', answer='{answer}', between=';'),
    )  # fmt: skip
    result = evaluate(config, checkpoint=chat_run, output=tmp_path / 'out')
    records = read_records(tmp_path / 'out' / 'question_answer.jsonl')
    assert [record['prompt'] for record in records] == prompts
    assert [record['output'] for record in records] == [text.partition(stop)[0] for text in texts]
    assert result['question_answer/accuracy'] == 0.0
    written = sum(bool(record['output'].strip()) for record in records)
    assert result['question_answer/answered'] == written / len(rows)


def test_a_chat_model_knows_its_answers(chat_run: Path, tmp_path: Path) -> None:
    rows = [
        {'question': one[0]['content'], 'answer': one[1]['content']} for one in (FIRST, THIRD)
    ] + [{'question': 'hello', 'answer': 'Goodbye'}]
    data = write_jsonl(tmp_path / 'mine.jsonl', rows)
    task = dict(path=str(data), format='question_answer', chat_template='internlm2', name='known')
    config = write_config(tmp_path / 'tasks.py', **task, max_new_tokens=64)
    result = evaluate(config, checkpoint=chat_run, output=tmp_path / 'out')
    assert result['known/accuracy'] == pytest.approx(2 / 3)
    records = read_records(tmp_path / 'out' / 'known.jsonl')
    assert [record['right'] for record in records] == [True, True, False]
    assert records[1]['output'] == rows[1]['answer']
    # During the same, as an exported folder.
    convert_to_hf(chat_run, tmp_path / 'hf', dtype='float32')
    assert evaluate(config, checkpoint=tmp_path / 'hf')['known/accuracy'] == pytest.approx(2 / 3)


def play(task: GeneratedAnswer, output: str, index: int = 0) -> dict:
    sample = task.play(index)
    next(sample)
    with pytest.raises(StopIteration) as end:
        sample.send([output])
    return end.value.value


def test_math_is_read_and_compared(tokenizer, tmp_path: Path) -> None:
    rows = {
        'algebra/1.json': {'problem': 'Half?', 'type': 'Algebra', 'level': 'Level 1',
                           'solution': r'It is $\boxed{\frac{1}{2}}$.'},
        'geometry/1.json': {'problem': 'Angle?', 'type': 'Geometry', 'level': 'Level 2',
                            'solution': r'It is $\boxed{90^\circ}$.'},
    }  # fmt: skip
    for name, row in rows.items():
        path = tmp_path / 'MATH' / 'test' / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(row))
    task = GeneratedAnswer(tmp_path / 'MATH', 'math', split='test', max_new_tokens=16)
    task.prepare(Subject(tokenizer, 512))
    records = [
        play(task, r'We get $\boxed{\dfrac12}$, so the answer is 3.'),
        play(task, 'The answer is $90$.', 1),
    ]
    assert [record['prediction'] for record in records] == [r'\dfrac12', '$90$']
    assert [record['right'] for record in records] == [True, True]
    assert not play(task, r'\boxed{2}')['right']
    nothing = play(task, 'I do not know', 1)
    assert nothing['prediction'] is None and not nothing['right']
    report = task.report([*records, nothing])
    assert report.metrics == {'accuracy': pytest.approx(2 / 3), 'answered': pytest.approx(2 / 3)}
    assert report.details == {'accuracy': {'Algebra': 1.0, 'Geometry': 0.5}}


def test_what_does_not_fit(tokenizer, tmp_path: Path) -> None:
    data = write_gsm8k(tmp_path)
    shots = dict(split='test', shots=3, shots_from='train')
    task = GeneratedAnswer(data, 'gsm8k', max_new_tokens=100, **shots)
    task.prepare(Subject(tokenizer, 240))
    record = play(task, '#### 1')
    assert record['shots'] < 3 and task.report([record]).counts['with_fewer_shots'] == 1
    with pytest.raises(ValueError, match=r'test\.jsonl:1: the problem and max_new_tokens=100 do'):
        task.prepare(Subject(tokenizer, 110))
    with pytest.raises(ValueError, match=r'shots=9, but shots_from=.train. has 4 examples'):
        GeneratedAnswer(data, 'gsm8k', split='test', shots=9, shots_from='train').prepare(
            Subject(tokenizer, 2048)
        )


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(format='gsm'), "format='gsm' holds no .* Did you mean 'gsm8k'"),
        (dict(extract=['box']), "extract='box' is unknown. Did you mean 'boxed'"),
        (dict(compare='numbers'), "compare='numbers' is unknown. Did you mean 'number'"),
        (dict(shots=2), 'shots=2 needs shots_from'),
        (dict(max_new_tokens=0), 'max_new_tokens=0 must be at least 1'),
        (dict(max_samples=0), 'max_samples=0 must be at least 1'),
        (dict(stop=['']), 'strings that are not empty'),
    ],
)
def test_options_that_are_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratedAnswer(**(dict(path='x', format='gsm8k') | options))
