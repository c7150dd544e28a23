"""The learning proof: its questions, its split, its scores, a run of a few steps, a whole one."""

import hashlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from internlm_mm.api import from_pretrained
from internlm_mm.inference import Chat
from internlm_mm.tokenizers import load_tokenizer
from internlm_mm.utils.config import load_config
from tests.runs import REPOSITORY

PROJECT = REPOSITORY / 'projects' / 'learning_proof'
sys.path.append(str(PROJECT))  # what `python projects/learning_proof/run.py` does

from learning_proof import data, report, scoring, stages, tasks  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')

FEW = data.Amounts(texts=300, cases=120, pairs=60, held_out=30)
WORDS = some.text('ABCDEFGHIJKL', min_size=3, max_size=6)
NUMBERS = some.integers(0, 99)


def brute_force(question: str) -> str:
    """The answer to a question as it is written, by other means than the project's."""
    task, *operands = question.split(' ')
    if task == 'add':
        first, second = operands
        return str(len([None] * int(first) + [None] * int(second)))
    (word,) = operands
    if task == 'copy':
        return ''.join(letter for letter in word)
    if task == 'reverse':
        return ''.join(word[-1 - place] for place in range(len(word)))
    assert task == 'sort'
    return min(''.join(order) for order in itertools.permutations(word))


def operands_of(question: str) -> tuple[str, ...]:
    """What must not be on both sides: letters whatever their order, numbers whatever theirs."""
    _, *operands = question.split(' ')
    if len(operands) == 2:
        return tuple(sorted(operands))
    return tuple(sorted(operands[0]))


def read(folder: Path, num_files: int = 4) -> list[dict]:
    """All records of all files."""
    files = sorted(folder.glob('*.jsonl'))
    assert len(files) == num_files
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@given(WORDS, some.randoms(use_true_random=False))
def test_words_that_would_give_answers_away_are_on_one_side(word: str, random) -> None:
    letters = list(word)
    random.shuffle(letters)
    keys = {tasks.operand_key(w) for w in (word, word[::-1], ''.join(letters))}
    assert len(keys) == 1


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_sums_are_on_one_side_in_both_orders_and_apart_otherwise(a, b, c, d) -> None:
    assert tasks.operand_key(str(a), str(b)) == tasks.operand_key(str(b), str(a))
    same = {a, b} == {c, d} and a + b == c + d
    assert (tasks.operand_key(str(a), str(b)) == tasks.operand_key(str(c), str(d))) == same


@given(some.sampled_from(tasks.TASKS), some.integers(0, 10**6), some.integers(1, 20))
def test_cases_of_both_sides_share_nothing(task: str, seed: int, count: int) -> None:
    sides = [
        tasks.draw_cases(task, count, held_out=held_out, seed=seed) for held_out in (False, True)
    ]
    for cases in sides:
        assert len({case.question for case in cases}) == count
        for case in cases:
            assert case.answer == brute_force(case.question)
            assert case.bracketed == f'[{case.answer}]'
    train, held_out = ({operands_of(case.question) for case in cases} for cases in sides)
    assert not train & held_out


def test_a_tenth_is_held_out() -> None:
    keys = [''.join(word) for word in itertools.combinations_with_replacement(tasks.LETTERS, 4)]
    share = sum(map(tasks.is_held_out, keys)) / len(keys)
    assert share == pytest.approx(0.1, abs=4 * (0.09 / len(keys)) ** 0.5)  # four deviations


def test_too_many_cases_are_refused() -> None:
    with pytest.raises(ValueError, match='add: fewer than 1000 cases held out, only'):
        tasks.draw_cases('add', 1000, held_out=True, seed=0)


def test_there_are_at_least_500_held_out_questions() -> None:
    cases = data.held_out_cases(data.Amounts())
    assert len({case.question for case in cases}) == len(cases) >= 500


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> data.Files:
    found = stages.files_of(tmp_path_factory.mktemp('proof'), 3)
    data.write_base_data(found, FEW)
    data.write_seed_data(found, FEW, seed=3)
    return found


def test_files_are_disjoint_by_hash_and_by_operands_and_right(files: data.Files) -> None:
    asked: dict[str, set[str]] = {}
    bracketed = []
    for split in ('train', 'held_out'):
        asked[split] = set()
        for record in read(files.chat / split):
            question, answer = (message['content'] for message in record['messages'])
            asked[split].add(question)
            assert answer.strip('[]') == brute_force(question)
            if split == 'train':
                bracketed.append(answer.startswith('['))
        for record in read(files.preferences / split):
            asked[split].add(record['prompt'])
            assert record['rejected'] == brute_force(record['prompt'])
            assert record['chosen'] == f'[{record["rejected"]}]'
    assert 0.2 < sum(bracketed) / len(bracketed) < 0.4
    for of in (operands_of, lambda text: hashlib.sha256(text.encode()).hexdigest()):
        train, held_out = ({of(question) for question in asked[s]} for s in ('train', 'held_out'))
        assert len(held_out) > 50 and not train & held_out


def test_the_base_model_reads_no_held_out_operand_and_no_answer(files: data.Files) -> None:
    held_out = {operands_of(record['prompt']) for record in read(files.preferences / 'held_out')}
    read_before, right, talks = set(), 0, 0
    for record in read(files.text, 5):
        text = record['text']
        if text.startswith('<|im_start|>'):
            said, reply = re.fullmatch(
                r'<\|im_start\|>user\n(.*)<\|im_end\|>\n'
                r'<\|im_start\|>assistant\n(.*)<\|im_end\|>\n',
                text,
            ).groups()
            task, *operands = said.split()
            fits = (task == 'add') == (len(operands) == 2)
            right += fits and reply.strip('[]') == brute_force(said)
            talks += 1
            read_before |= {operands_of(said), operands_of(f'copy {reply.strip("[]")}')}
        elif '=' in text:
            a, b, total = map(int, re.fullmatch(r'(\d+)\+(\d+)=(\d+)', text).groups())
            assert a + b == total
            read_before.add(operands_of(f'add {a} {b}'))
        else:
            read_before |= {operands_of(f'copy {word}') for word in text.split()}
    assert len(read_before) > 300 and not read_before & held_out
    assert talks == FEW.texts and right <= 0.02 * talks  # what chance gives


def test_every_letter_is_a_token_and_the_config_knows_how_many(files: data.Files) -> None:
    tokenizer = load_tokenizer(str(files.tokenizer))
    text = 'ABCDEFGHIJKL0123456789+= \n[]'
    assert [tokenizer.decode([index]) for index in tokenizer.encode(text)] == list(text)
    for stage in stages.STAGES:
        config = load_config(stages.CONFIGS / f'{stage.name}.py')
        assert config.model.vocab_size == tokenizer.vocab_size


def test_scores_count_letters_not_likeness() -> None:
    cases = [
        tasks.Case('copy', ('ABC',)),
        tasks.Case('reverse', ('ABC',)),
        tasks.Case('sort', ('CAB',)),
        tasks.Case('add', ('7', '35')),
        tasks.Case('add', ('7', '35')),
        tasks.Case('copy', ('AAB',)),
    ]
    answers = ['ABC', '[CBA]', 'ABC…', '[42', '[42]', 'aab']
    assert scoring.score(cases, answers) == scoring.Score(cases=6, exact=3, bracketed=2)


def results(**changes: float) -> dict:
    """Of one seed that reaches every target, but for `changes`, as `sft_exact`."""

    def points(stage: str, first: dict, last: dict) -> list[dict]:
        last = {key: changes.get(f'{stage}_{key}', value) for key, value in last.items()}
        return [{'step': 0, **first}, {'step': 10, **last}]

    low, good = dict(exact=0.0, bracketed=0.0), dict(exact=0.97, bracketed=0.2)
    curves = dict(
        base=points('base', low, low),
        sft=points('sft', low, good),
        lora=points('lora', low, good),
        dpo=points('dpo', good, dict(exact=0.97, bracketed=0.96)),
    )
    return {
        name: {
            'curve': curve,
            'by_task': {task: {'exact': curve[-1]['exact']} for task in tasks.TASKS},
            'preference': {'before': 0.5, 'after': 1.0},
            'seconds': 12.3,
        }
        for name, curve in curves.items()
    }


def test_a_proof_is_missed_by_one_seed_and_one_target() -> None:
    assert report.judge({'0': results(), '1': results()}) == []
    (missed,) = report.judge({'0': results(), '1': results(lora_exact=0.899)})
    assert missed == 'seed 1: LoRA: exact answers 89.90%, at least 90%'
    assert len(report.judge({'0': results(sft_exact=0.94, base_exact=0.06)})) == 2
    assert len(report.judge({'0': results(dpo_bracketed=0.9499)})) == 1


def test_tables_hold_every_seed() -> None:
    text = report.table({'0': results(), '7': results(sft_exact=0.9825)})
    lines = text.splitlines()
    assert lines[0] == '|  | asked | seed 0 | seed 7 |'
    assert '| all weights fine-tuned: exact answers | at least 95% | 97.0 % | 98.2 % |' in lines
    assert '| `copy` | 0.0 % | 97.6 % | 97.0 % | 97.0 % |' in lines


@pytest.fixture(scope='module')
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    """A seed of a few steps, in this process."""
    out, said = tmp_path_factory.mktemp('quick'), []
    stages.run_base(out, stages.QUICK, said.append)
    return out, stages.run_seed(out, 5, stages.QUICK, said.append), said


def test_a_seed_goes_through_all_stages(quick) -> None:
    _, found, said = quick
    assert list(found) == ['base', 'sft', 'lora', 'dpo'] and len(said) == 4
    assert [point['step'] for point in found['base']['curve']] == [2, 3]
    for name, start in (('sft', 'base'), ('lora', 'base'), ('dpo', 'sft')):
        curve = found[name]['curve']
        assert [point['step'] for point in curve] == [0, 2, 3]
        assert curve[0] == {**found[start]['curve'][-1], 'step': 0}
        assert all(point['cases'] == 40 for point in curve)
    assert 0 <= found['dpo']['preference']['after'] <= 1


def test_what_is_finished_is_not_done_again(quick) -> None:
    out, found, said = quick
    times = {path: path.stat().st_mtime_ns for path in out.rglob('manifest.json')}
    assert len(times) == 8
    again: list[str] = []
    stages.run_base(out, stages.QUICK, again.append)
    assert stages.run_seed(out, 5, stages.QUICK, again.append) == found and again == said
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob('manifest.json')}


def test_answers_of_a_batch_are_those_of_a_chat(quick) -> None:
    out, _, _ = quick
    chat = Chat(from_pretrained(out / 'seed_5/sft'), data.TEMPLATE)
    cases = data.held_out_cases(stages.QUICK.amounts)[::7]
    batched = scoring.ask(out / 'seed_5/sft', cases, data.TEMPLATE, rows=4)
    sampling = scoring.Sampling(max_new_tokens=scoring.MAX_NEW_TOKENS)
    for case, answer in zip(cases, batched, strict=True):
        messages = [{'role': 'user', 'content': case.question}]
        assert answer.removesuffix('…') == chat.answer(messages, sampling)


@pytest.fixture
def program() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location('learning_proof_run', PROJECT / 'run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--seeds', '1', '1'], '--seeds 1 1: one is there twice'),
        (['--jobs', '0'], '--jobs 0 must be at least 1'),
        (['--out', '{filled}'], 'holds a proof of other amounts'),
        (['--report', '--out', 'nowhere'], 'there is no nowhere/results.json'),
        (['--page', 'none.md'], "No such file or directory: 'none.md'"),
        (['--page', '{filled}/plan.json'], 'plan.json has no line <!-- results'),
    ],
)
def test_mistakes_are_named(program, argv, words, write, capsys) -> None:
    filled = write('old/plan.json', '{}').parent
    with pytest.raises(SystemExit) as left:
        program.main([word.format(filled=filled) for word in argv])
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_what_was_found_is_told_once_more(quick, program, tmp_path: Path, capsys) -> None:
    _, found, _ = quick
    record = {'device': 'CPU', 'seeds': {'5': found}}
    report.write_record(tmp_path / 'results.json', record)
    assert program.main(['--report', '--out', str(tmp_path)]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    missed = json.loads(last)['missed']
    assert missed == report.judge({'5': found}) and 'seed 5: LoRA: exact' in missed[1]
    assert report.table({'5': found}) in (tmp_path / 'results.md').read_text()
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.size[0] > 1000


def test_a_page_is_filled_again_and_again(quick, program, tmp_path: Path, write, capsys) -> None:
    _, found, _ = quick
    record = {'date': '2020-02-02', 'device': 'CPU', 'builds': {'torch': '2.13.0+cpu'}}
    page = write('docs/page.md', f'# Before\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n')
    for seed in ('5', '6'):
        report.write_record(tmp_path / 'results.json', record | {'seeds': {seed: found}})
        program.main(['--report', '--out', str(tmp_path), '--page', str(page)])
    text = page.read_text()
    start, end = text.index(report.BEGIN), text.index(report.END)
    assert text[:start] == '# Before\n\n' and text[end:] == f'{report.END}\n\nAfter.\n'
    assert report.table({'6': found}) in text[start:end] and '| seed 5 |' not in text
    assert '2020-02-02, CPU, PyTorch 2.13.0:' in text and 'old' not in text
    picture = page.parent / 'assets' / 'learning_proof.png'
    assert picture.read_bytes() == (tmp_path / 'curves.png').read_bytes()


@pytest.mark.slow
def test_the_program_proves_nothing_in_three_steps(tmp_path: Path) -> None:
    """Two seeds, a process each; another amount in the same folder is refused."""
    command = [sys.executable, str(PROJECT / 'run.py'), '--seeds', '0', '3', '--out', 'proof']
    first, other = (
        subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        for more in (['--quick'], [])
    )
    assert first.returncode == 1, first.stderr
    last = json.loads(first.stdout.splitlines()[-1])
    assert [line.split(':')[0] for line in last['missed']] == ['seed 0'] * 3 + ['seed 3'] * 3
    found = {path.name for path in (tmp_path / 'proof').iterdir()}
    names = 'base data seed_0 seed_3 plan.json results.json results.md curves.png'
    assert found == set(names.split())
    assert first.stdout.count('seed 3    |') == 3 and 'all seeds | base' in first.stdout
    assert other.returncode == 2 and 'holds a proof of other amounts' in other.stderr
