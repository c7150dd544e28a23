"""Tasks of a run: on every layout what one process finds, during training, and refused early."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.task_evaluation import (
    TaskEvaluation,
    build_tasks,
    check_evaluation,
    check_objective,
)
from internlm_mm.evaluation import Generate, MultipleChoice, Play, Report, Task
from internlm_mm.inference import Generator, Sampling
from internlm_mm.models import NextToken
from internlm_mm.parallel.mesh import Layout
from internlm_mm.registry import TASKS
from internlm_mm.utils.config_reader import ConfigError
from tests.conversations import WEATHER
from tests.helpers import tiny_config, tiny_runner
from tests.marks import slow
from tests.questions import write_gsm8k, write_jsonl, write_mmlu
from tests.trained import train_tokenizer

FLOAT64 = dict(param='float64', reduce='float64')
SPREAD = [
    'data_shard',
    slow('data_replicate'),
    slow('tensor'),
    'context',
    'pipeline',
]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data')
    train_tokenizer(folder / 'tokenizer')
    write_mmlu(folder / 'mmlu')
    write_gsm8k(folder / 'gsm8k')
    return folder


def choice(data: Path, **options) -> dict:
    path = str(data / 'mmlu')
    return dict(
        type='MultipleChoice', path=path, format='mmlu', split='test', shots=1, shots_from='dev'
    ) | options  # fmt: skip


def written(data: Path, **options) -> dict:
    path = str(data / 'gsm8k')
    return dict(
        type='GeneratedAnswer', path=path, format='gsm8k', split='test', max_new_tokens=8
    ) | options  # fmt: skip


def changes(data: Path, tasks: list[dict], **more) -> dict:
    tokenizer = dict(type='SentencePieceTokenizer', path=str(data / 'tokenizer'))
    return {
        'model__vocab_size': 400,
        'model__max_seq_len': 256,
        'tokenizer': tokenizer,
        'val_dataloader': None,
        'val_cfg__tasks': tasks,
        'val_cfg__task_batch_size': 3,
        'strategy__precision': FLOAT64,
        **more,
    }


def found_by(folder: Path, data: Path, tasks: list[dict], **more) -> dict[str, float]:
    return tiny_runner(folder, **changes(data, tasks, **more)).val()


def records_of(folder: Path, name: str) -> list[dict]:
    lines = (folder / f'{name}.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def alone(data, tmp_path_factory) -> tuple[dict, list[dict], list[dict]]:
    folder = tmp_path_factory.mktemp('alone')
    metrics = found_by(folder, data, [choice(data), written(data)])
    folder = folder / 'evaluation'
    return metrics, records_of(folder, 'mmlu'), records_of(folder, 'gsm8k')


@pytest.mark.parametrize('axis', SPREAD)
def test_two_processes_find_what_one_does(axis: str, alone, data, two_ranks, tmp_path) -> None:
    metrics, chosen, texts = alone
    tasks = [choice(data)] + ([written(data)] if axis != 'pipeline' else [])
    parallel = {axis: 2}
    first, second = two_ranks(found_by, tmp_path, data, tasks, strategy__parallel=parallel)
    assert first == second == {key: metrics[key] for key in first}
    for ours, theirs in zip(records_of(tmp_path / 'evaluation', 'mmlu'), chosen, strict=True):
        assert ours.pop('log_probs') == pytest.approx(theirs['log_probs'], rel=1e-10)
        assert ours == {key: value for key, value in theirs.items() if key != 'log_probs'}
    if axis != 'pipeline':
        assert records_of(tmp_path / 'evaluation', 'gsm8k') == texts
        assert any(record['output'] for record in texts)


@pytest.mark.parametrize('technique', ['recompute', 'offload'])
def test_a_copy_writes_what_the_model_does(technique: str, alone, data, tmp_path: Path) -> None:
    options = {f'strategy__{technique}': {'recompute': 1.0, 'offload': True}[technique]}
    found_by(tmp_path, data, [written(data)], **options)
    assert records_of(tmp_path / 'evaluation', 'gsm8k') == alone[2]


def test_weights_in_four_bits_write_too(data, tmp_path: Path) -> None:
    pytest.importorskip('bitsandbytes')
    save = dict(type='StepCheckpointHook', interval=2)
    base = changes(data, [], train_cfg__max_iters=2, default_hooks__checkpoint=save)
    for key in ('val_cfg__tasks', 'val_cfg__task_batch_size', 'strategy__precision'):
        base.pop(key)
    tiny_runner(tmp_path / 'base', **base, val_cfg=None).train()
    convert_to_hf(tmp_path / 'base', tmp_path / 'hf', dtype='float32')
    more = dict(
        load_from=str(tmp_path / 'hf'),
        model__adapter=dict(rank=4, four_bit=True),
        strategy__precision=None,
    )
    texts = {}
    for name, options in {
        'itself': {},
        'copy': {'strategy__recompute': 1.0},
        'half': {'strategy__precision': dict(param='bfloat16', reduce='float32')},
    }.items():
        found_by(tmp_path / name, data, [choice(data), written(data)], **more | options)
        texts[name] = records_of(tmp_path / name / 'evaluation', 'gsm8k')
    assert texts['copy'] == texts['itself'] and any(record['output'] for record in texts['half'])
    hook = dict(type='EvaluationHook', interval=2, at_start=True)
    more |= dict(custom_hooks=[hook], train_cfg__max_iters=4, strategy__recompute=1.0)
    runner = tiny_runner(tmp_path / 'run', **changes(data, [written(data)], **more))
    runner.train()
    assert len(list((tmp_path / 'run' / 'evaluation').iterdir())) == 3
    assert runner.model.layers['0'].mlp.up_proj.weight.dtype == torch.uint8


def test_perplexity_and_tasks_together_on_a_pipeline(data, two_ranks, tmp_path) -> None:
    # What an evaluation sums changes its shape from one to the other.
    rows = dict(type='RandomTokens', vocab_size=64, seq_len=32, num_rows=6, seed=7)
    loader = dict(type='EvalLoader', dataset=rows, micro_batch_size=2)
    more = dict(val_dataloader=loader)
    expected = found_by(tmp_path / 'one', data, [choice(data)], **more)
    assert {'loss', 'token_accuracy', 'mmlu/accuracy'} <= expected.keys()
    parallel = {'pipeline': 2}
    for found in two_ranks(
        found_by, tmp_path / 'two', data, [choice(data)], strategy__parallel=parallel, **more
    ):
        assert found == pytest.approx(expected, rel=1e-10)


def test_while_training(data, tmp_path: Path) -> None:
    hook = dict(type='EvaluationHook', interval=2, at_start=True)
    more = dict(custom_hooks=[hook], train_cfg__max_iters=4, strategy__precision=None)
    runner = tiny_runner(tmp_path, **changes(data, [choice(data), written(data)], **more))
    runner.train()
    folders = sorted(path.name for path in (tmp_path / 'evaluation').iterdir())
    assert folders == ['iter_0', 'iter_2', 'iter_4']
    (hook,) = [one for one in runner.hooks if type(one).__name__ == 'EvaluationHook']
    assert list(hook.history) == [0, 2, 4]
    for step, metrics in hook.history.items():
        assert set(metrics) == {
            'mmlu/accuracy', 'mmlu/accuracy_by_subject', 'gsm8k/accuracy', 'gsm8k/answered'
        }  # fmt: skip
        records = records_of(tmp_path / 'evaluation' / f'iter_{step}', 'mmlu')
        assert metrics['mmlu/accuracy'] == sum(record['right'] for record in records) / 8
    scores = [
        records_of(tmp_path / 'evaluation' / name, 'mmlu')[0]['log_probs'] for name in folders
    ]
    assert scores[0] != scores[1] != scores[2], 'the weights have moved'
    assert runner.model.training
    (log,) = tmp_path.glob('*/*.log')
    assert 'evaluation at 4 | mmlu/accuracy 0.' in log.read_text()


def test_a_dry_run_reads_the_tasks(data, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **changes(data, [choice(data)]))
    assert 'task       mmlu: 8 samples' in dry_run(config)
    write_jsonl(tmp_path / 'bad.jsonl', [{'question': 'x', 'options': ['a', 'b'], 'answer': 'C'}])
    task = dict(type='MultipleChoice', path=str(tmp_path / 'bad.jsonl'), format='options')
    config = tiny_config(tmp_path, **changes(data, [choice(data), task]))
    message = r"val_cfg\.tasks\.1: options: .*bad\.jsonl:1, answer 'C': expected A to B"
    with pytest.raises(ValueError, match=message):
        dry_run(config)


def test_writing_needs_the_whole_model(data, tmp_path: Path) -> None:
    options = {'tasks': [choice(data), written(data)]}
    message = r'val_cfg\.tasks\.1 writes texts.*not with strategy\.parallel\.pipeline=2'
    with pytest.raises(ValueError, match=message):
        check_evaluation(None, options, Layout(pipeline=2))
    check_evaluation(None, options, Layout(tensor=2, data_shard=2))
    config = tiny_config(
        tmp_path, **changes(data, options['tasks'], strategy__parallel={'pipeline': 2})
    )
    with pytest.raises(ValueError, match=message):
        dry_run(config)


def test_objectives_that_sum_something_else(data, tmp_path: Path) -> None:
    more = dict(model__objective=dict(type='SimPO'))
    message = r'val_cfg\.tasks: mmlu compares log-probabilities, which the objective SimPO does not'
    with pytest.raises(ValueError, match=message):
        found_by(tmp_path, data, [choice(data), written(data)], **more)
    config = tiny_config(tmp_path, **changes(data, [choice(data)], **more))
    with pytest.raises(ValueError, match=message):
        dry_run(config)
    assert 'gsm8k/accuracy' in found_by(tmp_path, data, [written(data)], **more)


@pytest.mark.parametrize('task', [choice, written])
def test_a_reward_model_neither_writes_nor_compares(task, data, tmp_path: Path) -> None:
    more = dict(model__objective=dict(type='PairwiseReward'))
    runner = tiny_runner(tmp_path, **changes(data, [task(data)], **more))
    message = (
        r'val_cfg\.tasks: (gsm8k|mmlu) needs a model of language, .* PairwiseReward has a score'
    )
    with pytest.raises(ValueError, match=message):
        runner.val()
    assert next(runner.model.parameters()).is_meta, 'refused before it was placed'
    with pytest.raises(ValueError, match=message):
        dry_run(runner.cfg)


def test_a_kernel_that_tells_no_losses_of_tokens(data) -> None:
    tasks = [MultipleChoice(data / 'mmlu', 'mmlu', split='test')]
    with pytest.raises(ValueError, match=r"mmlu compares .*'liger' tells no losses"):
        check_objective(tasks, torch.nn.Linear(1, 1), 'liger')


@TASKS.register_module()
class Parrot(Task):
    """Asks for a text twice, the second time behind the first."""

    name = 'parrot'
    generates = True

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def prepare(self, subject) -> None:
        self.tokenizer = subject.tokenizer

    def __len__(self) -> int:
        return len(self.words)

    def play(self, index: int) -> Play:
        prompt, outputs = self.words[index], []
        for _ in range(2):
            prompt += ''.join(outputs[-1:])
            ids = np.array(self.tokenizer.encode(prompt), np.int32)
            outputs += yield [Generate(ids, Sampling(max_new_tokens=4))]
        return dict(prompt=prompt, prediction=outputs, answer=self.words[index], right=False)

    def report(self, records) -> Report:
        return Report({'accuracy': 0.0})


def test_a_task_from_outside_of_two_turns(data, tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, **changes(data, [dict(type='Parrot', words=['def', 'x'])]))
    assert runner.val() == {'parrot/accuracy': 0.0}
    generator = Generator(runner.model, runner.tokenizer, add_bos=False)
    sampling = Sampling(max_new_tokens=4)
    for record in records_of(tmp_path / 'evaluation', 'parrot'):
        first = ''.join(generator.stream(record['answer'], sampling))
        second = ''.join(generator.stream(record['answer'] + first, sampling))
        assert record['prediction'] == [first, second]


def test_adapters_take_part(data, two_ranks, tmp_path: Path) -> None:
    adapter = dict(type='LoRA', rank=2, alpha=4.0, targets=['*_proj'])
    more = dict(model__adapter=adapter)
    tasks = [choice(data), written(data)]
    expected = found_by(tmp_path / 'one', data, tasks, **more)
    parallel = {'data_shard': 2}
    found, _ = two_ranks(
        found_by, tmp_path / 'two', data, tasks, strategy__parallel=parallel, **more
    )
    assert found == expected


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (
            dict(type='MultipelChoice'),
            r"val_cfg\.tasks\.0\.type='MultipelChoice'.*'MultipleChoice'",
        ),
        (dict(path='x', format='mmlu'), r'val_cfg\.tasks\.0 has no type'),
        ('mmlu', r"val_cfg\.tasks\.0='mmlu': expected dict\(type=CLASS"),
        (
            dict(type='MultipleChoice', path='x', format='mmlu', shot=5),
            r"val_cfg\.tasks\.0\.shot=5: MultipleChoice has no option 'shot'.*'shots'",
        ),
        (
            dict(type='MultipleChoice', path='x', format='mmul'),
            r"val_cfg\.tasks\.0\.format='mmul': expected .*'mmlu'",
        ),
        (dict(type='MultipleChoice', path='x'), r'val_cfg\.tasks\.0: MultipleChoice needs format'),
    ],
)
def test_configs_that_are_wrong(task, message: str, data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes(data, [task]))


class Foreign:
    """A model from outside that can be trained and nothing more."""

    objective = NextToken()


def test_what_a_model_from_outside_needs(data, tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, **changes(data, [choice(data)]))
    runner.model = Foreign()
    with pytest.raises(ValueError, match='Foreign has no `max_seq_len`, which says how long'):
        TaskEvaluation(runner, [choice(data)], 1)
    runner.model.max_seq_len = 256
    assert len(TaskEvaluation(runner, [choice(data)], 1).tasks) == 1
    with pytest.raises(ValueError, match='gsm8k writes texts, for which Foreign has no `make_cac'):
        TaskEvaluation(runner, [written(data)], 1)


def test_what_tasks_need(data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'val_cfg\.tasks need a tokenizer'):
        build_tasks([choice(data)], None, 64)
    with pytest.raises(FileNotFoundError, match=r'val_cfg\.tasks\.0: path: no file or folder'):
        found_by(tmp_path, data, [choice(data, path=str(tmp_path / 'nowhere'))])
    with pytest.raises(ValueError, match=r"two are called 'mmlu'; give one of them another name="):
        found_by(tmp_path, data, [choice(data), choice(data)])
    with pytest.raises(ValueError, match=r'task_batch_size=0 must be at least 1'):
        found_by(tmp_path, data, [choice(data)], val_cfg__task_batch_size=0)
    assert MultipleChoice(data / 'mmlu', 'mmlu', name='other').name == 'other'


def acting(folder: Path) -> list[dict]:
    """Tasks whose samples run programs and tools; a program ends in a comment of the model's."""
    check = 'def check(f):\n    assert f() == {}\n'
    code = [
        {'prompt': f'def f():\n    return {n}\n#', 'entry_point': 'f', 'test': check.format(n % 2)}
        for n in range(4)
    ]
    asked = [{'question': f'{n}?', 'answer': n, 'needs_tool': n > 1} for n in range(3)]
    calls = [{'messages': [{'role': 'user', 'content': 'Hi'}], 'tools': [WEATHER], 'expected': []}]
    write = {'max_new_tokens': 12, 'chat_template': 'internlm2'}
    return [
        dict(type='CodeTask', path=str(write_jsonl(folder / 'code.jsonl', code)), stop=['\n'],
             max_new_tokens=6),
        dict(type='AgentTask', path=str(write_jsonl(folder / 'asked.jsonl', asked)), at_once=2,
             **write),
        dict(type='ToolCallTask', path=str(write_jsonl(folder / 'calls.jsonl', calls)), **write),
        dict(type='ProgramTask', path=str(folder / 'gsm8k'), split='test', shots=1, **write),
    ]  # fmt: skip


@pytest.mark.slow
def test_programs_run_in_one_of_two_processes_and_both_know(data, two_ranks, tmp_path) -> None:
    try:
        tasks = acting(data)
        metrics = found_by(tmp_path / 'alone', data, tasks, model__max_seq_len=1024)
    except ValueError as error:
        assert 'need a sandbox' in str(error)
        pytest.skip(str(error))
    more = dict(model__max_seq_len=1024, strategy__parallel={'data_shard': 2})
    first, second = two_ranks(found_by, tmp_path / 'two', data, tasks, **more)
    assert first == second == metrics
    assert metrics['humaneval/pass_at_1'] == 0.5  # 0 and 1 of 0, 1, 2, 3
    for name in ('humaneval', 'agent', 'tool_calls', 'gsm8k_pal'):
        ours = records_of(tmp_path / 'two' / 'evaluation', name)
        assert ours == records_of(tmp_path / 'alone' / 'evaluation', name) and ours


@pytest.mark.slow
def test_a_sandbox_that_is_not_there_is_missed_before_training(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('internlm_mm.sandbox.sandbox.missing', lambda name: f'no {name} here')
    for task in (one for one in acting(data) if one['type'] != 'ToolCallTask'):
        options = changes(data, [task], model__max_seq_len=1024)
        with pytest.raises(ValueError, match=r'(?s)val_cfg.tasks.0: .*need a sandbox.*Install'):
            tiny_runner(tmp_path, **options).train()
    assert not list(tmp_path.glob('*/iter_*'))
