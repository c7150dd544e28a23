"""The agent proof: its questions and answers, its split, its verdict, a run of a few steps."""

import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from internlm_mm.agents import Toolbox, interpreter
from internlm_mm.agents.schemas import argument_errors
from internlm_mm.sandbox import Sandbox, SandboxError
from internlm_mm.tokenizers import build_template, load_tokenizer
from internlm_mm.utils.config import load_config
from tests.runs import REPOSITORY

PROJECT = REPOSITORY / 'projects' / 'agent_proof'
sys.path.append(str(PROJECT))  # what `python projects/agent_proof/run.py` does

from agent_proof import data, draws, names, report, stages, tasks, wordings  # noqa: E402

FEW = data.Amounts(cases=40, held_out=8, unseen=12)


def read(path: Path) -> list[dict]:
    """All records of a file, or of all files of a folder."""
    files = sorted(path.glob('*.jsonl')) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def answer_of(record: dict) -> str:
    return record['messages'][-1]['content']


def numbers_and_words(text: str) -> list[str]:
    """What a question is about, read off its text alone."""
    return re.findall(r'\d{4}-\d\d-\d\d|\d+|\b[A-Z]{3,}\b', text)


def names_in(record: dict) -> set[str]:
    """Invented names of a record's functions, their parameters and what they give."""
    return {
        name
        for tool in record.get('tools', ())
        for name in (
            tool['function']['name'],
            *tool['function']['parameters']['properties'],
            *re.findall(r'Gives the (\w+) of', tool['function']['description']),
        )
    }


def about(record: dict) -> str:
    """Numbers, words and names of a question, in any order."""
    text = record['messages'][0]['content']
    return ' '.join(sorted([*numbers_and_words(text), *(names_in(record) & {*text.split()})]))


def skeleton(record: dict) -> str:
    """How a question is worded, read off its text alone: without numbers, words and names."""
    text, *_ = record['messages'][0]['content'].split('\n')
    text = re.sub(r'\d{4}-\d\d-\d\d|\d+|\b[A-Z]{3,}\b|\btrue\b|\bfalse\b', '#', text)
    for name in names_in(record):
        text = re.sub(rf'\b{name}\b', '@', text)
    return re.sub(r'@ #( and @ #)*', '@ #', text)


def hashes(texts: list[str]) -> set[str]:
    return {hashlib.sha256(text.encode()).hexdigest() for text in texts}


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> data.Files:
    found = data.Files(tmp_path_factory.mktemp('agent_proof'), 3)
    data.write_data(found, FEW)
    return found


@pytest.fixture(scope='module')
def held_out(files: data.Files) -> list[dict]:
    return read(files.chat / 'held_out')


def test_both_sides_share_no_wording_no_operands_and_no_answer(files, held_out) -> None:
    train = read(files.chat / 'train')
    assert len(train) > 700 and len(held_out) == 17 * FEW.held_out + 3 * FEW.unseen
    for of in (
        skeleton,
        lambda record: record['wording'],
        lambda record: record['messages'][0]['content'],
        lambda record: ' '.join(sorted(record['operands'])),
        about,
        answer_of,
    ):
        ours, theirs = ([of(record) for record in records] for records in (train, held_out))
        assert len(set(theirs)) > 50 and not hashes(ours) & hashes(theirs)


def words(text: str) -> set[str]:
    return set(re.findall(r'[a-z]+', text.lower()))


def test_no_phrase_of_a_wording_is_on_both_sides_and_none_has_unknown_words() -> None:
    """Not the way to ask, not the thing asked for, not the words before and behind them."""
    kinds = [*wordings.WORDINGS.values(), (wordings.OPENINGS, wordings.ENDS)]
    for kind in kinds:
        for phrases in kind:
            assert not {*phrases.train} & {*phrases.held_out} - {''}
            assert len({*phrases.train}) > len({*phrases.held_out}) >= 3
    for asks, things in wordings.WORDINGS.values():
        seen = words(' '.join(asks.train + things.train))
        assert words(' '.join(asks.held_out + things.held_out)) <= seen
    for task in tasks.TASKS:
        ours, theirs = wordings.wordings(task, 'train'), wordings.wordings(task, 'held_out')
        assert len({*ours}) == len(ours) >= 32 and len({*theirs}) == len(theirs) >= 9


def test_held_out_questions_have_no_phrase_of_a_training_question(files, held_out) -> None:
    """Read off the texts: words around operands, cut where operands stand, differ on both sides."""

    def around(record: dict) -> tuple[str, ...]:
        return tuple(part.strip(' .?!') for part in re.split('[#@]', skeleton(record).lower()))

    train = {around(record)[0] for record in read(files.chat / 'train')}
    assert len(train) > 100
    for record in held_out:
        assert around(record)[0] not in train


def test_held_out_wordings_are_made_of_tokens_of_training_wordings(files) -> None:
    tokenizer = load_tokenizer(str(files.tokenizer))

    def tokens(side: str, times: int) -> set[int]:
        rng = random.Random(0)
        cores = [core for task in tasks.TASKS for core in wordings.wordings(task, side)]
        texts = (wordings.dress(core, rng, side) for core in cores for _ in range(times))
        return {index for text in texts for index in tokenizer.encode(text)}

    assert tokens('held_out', 6) <= tokens('train', 12)


def test_names_and_schemas_of_unseen_tools_are_in_no_training_row(files) -> None:
    def spelt(records: list[dict]) -> set[str]:
        tools = [tool['function'] for record in records for tool in record.get('tools', ())]
        declared = [(tool['name'], tool['parameters']['properties']) for tool in tools]
        calls = [  # wrong ones, too
            (call['function']['name'], call['function']['arguments'])
            for record in records
            for message in record['messages']
            for call in message.get('tool_calls', ())
        ]
        return {n for name, keys in declared + calls if name != 'python' for n in (name, *keys)}

    seen = spelt(read(files.chat / 'train'))
    unseen = spelt(read(files.chat / 'held_out' / 'unseen.jsonl'))
    assert len(seen) > 500 and len(unseen) > 80 and not seen & unseen
    assert spelt(read(files.chat / 'held_out' / 'held_out.jsonl')) & unseen == set()
    assert {draws.side_of('name', name) for name in seen} == {'train'}
    assert {draws.side_of('name', name) for name in unseen} == {'held_out'}


def test_there_are_at_least_500_held_out_questions_of_either_kind() -> None:
    for cases in (data.held_out_cases(data.Amounts()), data.unseen_cases(data.Amounts())):
        assert len({case.question for case in cases}) == len(cases) >= 500
        declared = [plugin.name for case in cases for plugin in case.plugins]
        assert len(set(declared)) == len(declared)


def test_every_call_gives_what_is_written_and_every_answer_is_right() -> None:
    try:
        sandbox = Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    with sandbox, sandbox.session() as session:
        for task in tasks.TASKS:
            for case in tasks.draw_cases(task, 6, side='train', seed=7):
                box = Toolbox([interpreter(session.run), *(p.tool() for p in case.plugins)])
                for step in case.steps:
                    assert box.call(step.name, step.arguments).text == step.result
                if case.steps:
                    assert case.answer == case.steps[-1].result
                    assert task in tasks.GROUPS['tools'] or case.answer not in case.question
                else:
                    said = case.answer.removeprefix('Hello, ').rstrip('.')
                    assert said == numbers_and_words(case.question)[0]


def test_mistakes_are_what_the_toolbox_refuses_and_only_their_mending_is_learned(files) -> None:
    found = 0
    for task in tasks.PLUGIN_TASKS:
        cases = tasks.draw_cases(task, 200, side='train', seed=7)
        wrong = [case for case in cases if case.mistake is not None]
        assert 20 < len(wrong) < 60
        for case in wrong:
            box = Toolbox(
                [*([tasks.PYTHON] if case.python else []), *(p.tool() for p in case.plugins)]
            )
            result = box.call(case.mistake.name, case.mistake.arguments)
            assert result.status in ('unknown', 'arguments')
            assert case.mistake.result == result.content()
            _, first, told, second, *_ = case.record()['messages']
            assert first['loss'] is False and told['content'] == case.mistake.result
            (call,) = second['tool_calls']
            assert 'loss' not in second and call['function']['name'] == case.steps[0].name
            found += result.status == 'unknown'
        assert all(c.mistake is None for c in tasks.draw_cases(task, 50, side='held_out', seed=7))
    assert found > 10


def test_calls_are_of_what_the_question_says() -> None:
    for task in tasks.TASKS:
        for case in tasks.draw_cases(task, 20, side='held_out', seed=1):
            said = case.question
            schemas = {t['function']['name']: t['function'] for t in case.declarations}
            for step in case.steps:
                assert not argument_errors(step.arguments, schemas[step.name]['parameters'])
                said += f' {step.result}'
            for step in case.steps:
                used = numbers_and_words(json.dumps(step.arguments).replace('[::-1]', ''))
                assert set(used) <= set(numbers_and_words(said))


def test_rows_pass_the_check_of_tool_data(tmp_path: Path, capsys) -> None:
    files = data.Files(tmp_path, 0)
    data.write_data(files, data.Amounts(cases=2, held_out=1, unseen=1))
    spec = importlib.util.spec_from_file_location(
        'agent_proof_check', REPOSITORY / 'projects/tool_agent/check_data.py'
    )
    check = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = check  # its dataclasses look for their module
    spec.loader.exec_module(check)
    options = [f'{key}={value}' for key, value in stages.options_of(files).items()]
    try:
        assert check.main([str(stages.CONFIG), '--cfg-options', *options]) == 0
    finally:
        del sys.modules[spec.name]
    assert '0 problems' in capsys.readouterr().out


def test_without_tools_the_same_questions_are_answered_at_once(files) -> None:
    for record in read(files.chat / 'train' / 'direct.jsonl'):
        assert 'tools' not in record and len(record['messages']) == 2
        assert answer_of(record) == record['answer']


def test_operands_and_names_are_the_same_tokens_wherever_they_stand(files) -> None:
    tokenizer = load_tokenizer(str(files.tokenizer))
    config = load_config(stages.CONFIG)
    assert config.model.vocab_size == tokenizer.vocab_size
    template = build_template(data.TEMPLATE)
    for case in tasks.draw_cases('call', 40, side='train', seed=2):
        record = case.record()
        encoded = template.encode(tokenizer, record['messages'], record['tools'], add_bos=True)
        assert len(encoded.ids) <= config.train_dataloader.dataset.seq_len
        text = [tokenizer.decode([index]) for index in encoded.ids]
        for name in (case.steps[0].name, *case.steps[0].arguments):
            spelt = ''.join(f'\0{syllable}' for syllable in re.findall('..', name))
            assert '\0'.join(['', *text]).count(spelt) >= 3  # declared, asked for, called


def results(**changes: float) -> dict:
    """Of one seed that reaches every target, but for `changes`."""
    keys = [t.key for t in report.TARGETS] + [key for key, _ in report.FIGURES]
    point = dict.fromkeys(keys, 0.995) | {'without_tools': 0.01, 'cases': 680, 'unseen_cases': 510}
    curve = [{**point, 'step': 5, 'right': 0.2}, {**point, 'step': 10, **changes}]
    groups = dict.fromkeys(tasks.GROUPS, 0.975)
    direct = {group: 0.0 for group in tasks.GROUPS if group != 'no tool'}
    return {
        'curve': curve,
        'by_group': {'right': groups, 'without_tools': direct},
        'loss': [(5, 2.0), (10, 0.5)],
        'seconds': 12.3,
        'device': 'NVIDIA H200',
        'builds': {'torch': '2.11'},
    }


def test_a_proof_is_missed_by_one_seed_and_one_target() -> None:
    assert report.judge({'0': results(), '1': results()}) == []
    (missed,) = report.judge({'0': results(), '1': results(right=0.899)})
    assert missed == 'seed 1: right answers, where a tool is needed 89.90%, at least 90%'
    assert len(report.judge({'0': results(valid_call=0.989, without_tools=0.06)})) == 2
    assert len(report.judge({'0': results(not_called=0.949, unseen_schema_valid=0.79)})) == 2


def test_tables_hold_every_seed() -> None:
    lines = report.table({'0': results(), '7': results(right=0.9825)}).splitlines()
    assert lines[0] == '|  | asked | seed 0 | seed 7 |'
    assert '| right answers, where a tool is needed | at least 90% | 99.5 % | 98.2 % |' in lines
    assert '| dates | 97.5 % | 0.0 % |' in lines and '| no tool | 97.5 % |  |' in lines


def test_results_go_between_the_marks_of_a_page() -> None:
    text = report.page('a\n<!-- x -->\nold\n<!-- y -->\nb\n', 'new\n', '<!-- x -->', '<!-- y -->')
    assert text == 'a\n<!-- x -->\nnew\n<!-- y -->\nb\n'
    with pytest.raises(ValueError, match='has no lines'):
        report.page('a\n<!-- x -->\nold\n', 'new\n', '<!-- x -->', '<!-- y -->')


def test_names_are_no_beginnings_of_words_that_are_tokens() -> None:
    words = wordings.vocabulary()
    assert ' the' in words and 'What' in words
    assert names.is_one_piece('bado') and not names.is_one_piece('these')
    assert not any(word.strip().isupper() for word in words)  # operands are capital letters


@pytest.fixture
def program() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location('agent_proof_run', PROJECT / 'run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--seeds', '1', '1'], '--seeds 1 1: one is there twice'),
        (['--jobs', '0'], '--jobs 0 must be at least 1'),
        (['--steps', '0'], '--steps 0 must be at least 1'),
        (['--out', '{filled}'], 'holds a proof of other amounts'),
        (['--report', '--out', 'nowhere'], 'there is no nowhere/results.json'),
        (['--page', '{filled}/plan.json'], 'the page has no lines'),
        (['--page', '{filled}/none.md'], 'No such file'),
    ],
)
def test_mistakes_are_named(program, argv, words, write, capsys) -> None:
    filled = write('old/plan.json', '{}').parent
    with pytest.raises(SystemExit) as left:
        program.main([word.format(filled=filled) for word in argv])
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_a_sandbox_that_is_none_is_refused_before_time_is_spent(program, tmp_path, capsys) -> None:
    assert program.main(['--out', str(tmp_path), '--backend', 'bublewrap']) == 2
    assert 'bubblewrap' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_is_told_once_more(program, tmp_path: Path, write, capsys) -> None:
    seeds = {'5': results(right=0.5)}
    record = {
        'date': '2026-11-26',
        'device': 'CPU',
        'sandbox': 'bubblewrap',
        'seeds': seeds,
    }
    report.write_record(tmp_path / 'results.json', record)
    page = write('docs/proof.md', f'# P\n{program.BEGIN}\nold\n{program.END}\nend\n')
    assert program.main(['--report', '--out', str(tmp_path), '--page', str(page)]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)['missed'] == report.judge(seeds)
    text = page.read_text()
    assert (
        '2026-11-26, trained on NVIDIA H200 (torch 2.11), asked on CPU (sandbox: bubblewrap):'
        in text
        and report.table(seeds) in text
        and '](assets/proof.png)' in text
        and 'old' not in text
        and text.endswith('end\n')
    )
    for picture in (tmp_path / 'curves.png', page.parent / 'assets' / 'proof.png'):
        with Image.open(picture) as image:
            assert image.size[0] > 1000


@pytest.mark.slow
def test_the_program_proves_nothing_in_three_steps(tmp_path: Path) -> None:
    """Two seeds, a process each; first trained, then asked; nothing is done twice."""
    try:
        Sandbox(spare=0).close()
    except SandboxError as error:
        pytest.skip(str(error))
    command = [sys.executable, str(PROJECT / 'run.py'), '--seeds', '0', '3', '--out', 'proof']

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, '--quick', *more], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )

    trained = run('--train-only')
    assert trained.returncode == 0, trained.stderr
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('manifest.json')}
    assert len(made) == 4
    for left in ('chat', 'asked'):  # only the run is brought home
        shutil.rmtree(tmp_path / 'proof/seed_3' / left)
    (tmp_path / 'proof/seed_3/data.done').unlink()
    asked = run()
    assert asked.returncode == 1, asked.stderr
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('manifest.json')}
    last = json.loads(asked.stdout.splitlines()[-1])
    assert {line.split(':')[0] for line in last['missed']} == {'seed 0', 'seed 3'}
    found = {path.name for path in (tmp_path / 'proof').iterdir()}
    assert found == set('seed_0 seed_3 plan.json results.json results.md curves.png'.split())
    curve = json.loads((tmp_path / 'proof/seed_3/results.json').read_text())['curve']
    assert [point['step'] for point in curve] == [2, 3]
