"""Multiple choice, scored under several layouts, against transformers and a loop by hand."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from internlm_mm.checkpoint.pretrained import convert_to_hf, load_tokenizer_of
from internlm_mm.engine.evaluate import evaluate
from internlm_mm.evaluation import LogProbAnswer, MultipleChoice, Subject
from internlm_mm.tokenizers import build_template
from tests.chatting import THIRD
from tests.questions import SUBJECTS, write_jsonl, write_mmlu
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


@pytest.fixture
def tokenizer(tmp_path: Path):
    return train_tokenizer(tmp_path / 'tokenizer')


MMLU = {
    'dev/law_dev.csv': '"Is it ""x"", or y?",x,y,both,none,C\n',
    'test/law_test.csv': 'One\nmore,1,2,3,4,B\n',
}
CEVAL = {
    'dev/law_dev.csv': 'id,question,A,B,C,D,answer,explanation\n0,几,一,二,三,四,C,因为\n',
    'val/law_val.csv': 'id,question,A,B,C,D,answer\n0,何,甲,乙,丙,丁,A\n',
}


def files(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return folder


def asked(task: MultipleChoice, tokenizer, index: int = 0) -> tuple[str, list[str]]:
    """Prompt and continuations of a sample, as text."""
    task.prepare(Subject(tokenizer, 2048))
    requests = next(task.play(index))
    assert all(one.prompt[0] == tokenizer.bos_id for one in requests)
    prompts = {tokenizer.decode(one.prompt[1:].tolist()) for one in requests}
    return prompts.pop(), [tokenizer.decode(one.continuation.tolist()) for one in requests]


def test_prompts_to_the_letter(tokenizer, tmp_path: Path) -> None:
    shots = dict(shots=1, shots_from='dev')
    data = files(tmp_path / 'mmlu', MMLU | {'test/law_test.csv': '"One\nmore",1,2,3,4,B\n'})
    prompt, answers = asked(MultipleChoice(data, 'mmlu', split='test', **shots), tokenizer)
    assert prompt == (
        'The following are multiple choice questions (with answers) about law.\n\n'
        'Is it "x", or y?\nA. x\nB. y\nC. both\nD. none\nAnswer: C\n\n'
        'One\nmore\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:'
    )
    assert answers == [' A', ' B', ' C', ' D']
    data = files(tmp_path / 'ceval', CEVAL)
    prompt, answers = asked(MultipleChoice(data, 'ceval', split='val', **shots), tokenizer)
    assert prompt == (
        '以下是中国关于law考试的单项选择题，请选出其中的正确答案。\n\n'
        '几\nA. 一\nB. 二\nC. 三\nD. 四\n答案：C\n\n何\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：'
    )
    assert answers == ['A', 'B', 'C', 'D']
    task = MultipleChoice(data, 'ceval', split='val', scoring='texts', prompt={'intro': ''})
    assert asked(task, tokenizer) == ('何\n答案：', ['甲', '乙', '丙', '丁'])
    changes = dict(
        intro='On {subject}:\n', question='{question}?\n{options}=', option='({letter}) {text}\n',
        answer='{answer}!', between='\n--\n',
    )  # fmt: skip
    task = MultipleChoice(data, 'ceval', split='val', prompt=changes, **shots)
    prompt, answers = asked(task, tokenizer)
    assert prompt == (
        'On law:\n几?\n(A) 一\n(B) 二\n(C) 三\n(D) 四\n=C!\n--\n'
        '何?\n(A) 甲\n(B) 乙\n(C) 丙\n(D) 丁\n='
    )
    assert answers == ['A!', 'B!', 'C!', 'D!']


@pytest.mark.parametrize('normalise', [None, 'tokens', 'characters'])
def test_texts_of_options_equal_transformers(normalise, work_dir, exported, tmp_path: Path) -> None:
    rows = [
        {'question': 'def f', 'options': ['f1(x)', 'return x + 2 + 2', 'x'], 'answer': 1},
        {'question': 'return', 'options': [' def', 'x + 17', '12'], 'answer': 'B'},
    ]
    data = write_jsonl(tmp_path / 'mine.jsonl', rows)
    task = dict(type='MultipleChoice', path=str(data), format='options', scoring='texts')
    config = write_config(tmp_path / 'tasks.py', task | {'normalise': normalise})
    for target in (work_dir, exported[0]):
        result = evaluate(config, checkpoint=target, output=tmp_path / 'out')
        records = read_records(tmp_path / 'out' / 'options.jsonl')
        right = 0
        for row, record in zip(rows, records, strict=True):
            prompt = f'{row["question"]}\nAnswer:'
            assert record['prompt'] == prompt
            found = [log_prob(exported, prompt, f' {text.strip()}') for text in row['options']]
            assert record['log_probs'] == pytest.approx([one for one, _ in found], abs=2e-4)
            lengths = {
                None: [1, 1, 1],
                'tokens': [count for _, count in found],
                'characters': [len(text.strip()) for text in row['options']],
            }[normalise]
            scores = [one / length for (one, _), length in zip(found, lengths, strict=True)]
            assert record['prediction'] == 'ABC'[scores.index(max(scores))]
            right += scores.index(max(scores)) == 1
        assert result['options/accuracy'] == right / 2


def test_a_conversation_is_asked_as_it_was_trained(chat_run: Path, tmp_path: Path) -> None:
    rows = [
        {'question': 'hello', 'options': ['HELLO!', 'Hello! What can I do for you?'], 'answer': 1},
        {
            'question': 'Add two numbers in Python.',
            'options': ['That', THIRD[1]['content']],
            'answer': 1,
        },
    ]
    data = write_jsonl(tmp_path / 'mine.jsonl', rows)
    task = dict(type='MultipleChoice', path=str(data), format='options', scoring='texts')
    config = write_config(tmp_path / 'tasks.py', task | {'chat_template': 'internlm2'})
    assert evaluate(config, checkpoint=chat_run)['options/accuracy'] == 1.0
    tokenizer = load_tokenizer_of(chat_run)
    listing = MultipleChoice(data, 'options', chat_template='internlm2')
    listing.prepare(Subject(tokenizer, 2048))
    (first, second) = next(listing.play(0))
    turn = (
        'hello\nA. HELLO!\nB. Hello! What can I do for you?\n'
        'Answer with the letter of the right option.'
    )
    messages = [{'role': 'user', 'content': turn}]
    template = build_template('internlm2')
    expected = template.encode(tokenizer, messages, add_generation_prompt=True).ids
    assert first.prompt.tolist() == second.prompt.tolist() == expected
    assert tokenizer.decode(second.continuation.tolist()) == 'B'


def test_examples_give_way_to_long_questions(tokenizer, tmp_path: Path) -> None:
    rows = [
        {'question': 'x ' * count, 'options': ['1', '2'], 'answer': 0} for count in (1, 160, 800)
    ]
    data = write_jsonl(tmp_path / 'mine.jsonl', rows[:2])
    dev = write_jsonl(tmp_path / 'dev.jsonl', [rows[0], rows[0]])
    task = MultipleChoice(data, 'options', shots=2, shots_from=dev)
    task.prepare(Subject(tokenizer, 200))
    records = []
    for index in range(2):
        play = task.play(index)
        requests = next(play)
        assert max(request.num_tokens for request in requests) <= 200
        with pytest.raises(StopIteration) as end:
            play.send([LogProbAnswer(-1.0, 1, False)] * 2)
        records.append(end.value.value)
    assert records[0]['shots'] == 2 > records[1]['shots']
    assert records[0]['prediction'] == 'A', 'of equal options the first'
    assert task.report(records).counts == {'samples': 2, 'skipped': 0, 'with_fewer_shots': 1}
    data = write_jsonl(tmp_path / 'long.jsonl', rows)
    with pytest.raises(ValueError, match=r'long\.jsonl:3: the question does not fit .*=200 tokens'):
        MultipleChoice(data, 'options').prepare(Subject(tokenizer, 200))
    lenient = MultipleChoice(data, 'options', on_error='skip')
    lenient.prepare(Subject(tokenizer, 200))
    assert len(lenient) == 2 and lenient.report([]).counts == {'samples': 0, 'skipped': 1}
    with pytest.raises(ValueError, match='no question is left'):
        lenient.prepare(Subject(tokenizer, 8))


def test_samples_are_spread_over_subjects(tokenizer, tmp_path: Path) -> None:
    task = MultipleChoice(write_mmlu(tmp_path), 'mmlu', split='test', max_samples=2)
    task.prepare(Subject(tokenizer, 2048))
    task.prepare(Subject(tokenizer, 2048))  # again, for another model
    assert len(task) == 2
    assert [task._samples[index].question.subject for index in range(2)] == [*SUBJECTS]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(format='mmul'), "format='mmul' holds no .* Did you mean 'mmlu'"),
        (dict(scoring='letter'), "scoring='letter'. Did you mean 'letters'"),
        (dict(normalise='token', scoring='texts'), "normalise='token'. Did you mean 'tokens'"),
        (dict(normalise='tokens'), "normalise='tokens' is for scoring='texts'"),
        (dict(shots=2), 'shots=2 needs shots_from'),
        (dict(max_samples=0), 'max_samples=0 must be at least 1'),
        (dict(on_error='pass'), "on_error='pass' is none of raise, skip"),
        (dict(chat_template='internlm9'), 'internlm9'),
        (dict(prompt={'intor': ''}), "prompt.intor='' is unknown. Did you mean 'intro'"),
    ],
)
def test_options_that_are_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleChoice(**(dict(path='x', format='mmlu') | options))
