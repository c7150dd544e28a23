"""The example plugin: from any folder, by class and by name, on one process and on two."""

import ast
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from internlm_mm.datasets.packing import collate_rows
from internlm_mm.engine.train_cli import main
from internlm_mm.optim import HybridZeroOptimWrapper
from internlm_mm.structures import IGNORE_INDEX
from tests.helpers import TINY
from tests.ranks import Ranks
from tests.runs import REPOSITORY, start_ranks, train

PLUGIN = REPOSITORY / 'projects' / 'example_plugin'
CONFIGS = PLUGIN / 'configs'
SMALL = {
    'model.hidden_size': 32,
    'model.intermediate_size': 64,
    'model.num_layers': 2,
    'train_dataloader.dataset.seq_len': 64,
    'train_dataloader.dataset.data_root': PLUGIN,
    'train_cfg.max_iters': 6,
    'train_cfg.global_batch_size': 4,
    'train_cfg.micro_batch_size': 2,
    'param_scheduler.0.warmup': 2,
    'custom_hooks.0.interval': 2,
    'default_hooks.progress.interval': 1,
}


def options(**changes: object) -> list[str]:
    values = SMALL | {key.replace('__', '.'): value for key, value in changes.items()}
    return ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]


def scalars(work_dir: Path) -> list[dict[str, float]]:
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


PRELUDE = 'tests.test_projects.test_example_plugin:add_plugin'


def add_plugin() -> None:
    """What PYTHONPATH does, for a process that runs already."""
    sys.path.insert(0, str(PLUGIN))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Work dirs of both configs, one by a program that knows the plugin from PYTHONPATH alone."""
    folder = tmp_path_factory.mktemp('elsewhere')
    environment = os.environ | {'PYTHONPATH': str(PLUGIN), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, REPOSITORY / 'tools' / 'train.py', CONFIGS / 'plugin_pretrain.py']
    result = subprocess.run(
        [*map(str, command), '--work-dir', 'plugin_pretrain', *options()],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    argv = [CONFIGS / 'plugin_by_name.py', '--work-dir', folder / 'plugin_by_name', *options()]
    code, text = train(argv, folder / 'log', prelude=PRELUDE)
    assert code == 0, text
    return {name: folder / name for name in ('plugin_pretrain', 'plugin_by_name')}


def test_it_trains_from_another_folder(runs: dict[str, Path]) -> None:
    steps = scalars(runs['plugin_pretrain'])
    assert [line['step'] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]['loss'] < steps[0]['loss']
    ratios = [line['update_ratio'] for line in steps if 'update_ratio' in line]
    assert len(ratios) == 3 and all(0 < ratio < 0.1 for ratio in ratios)
    assert (runs['plugin_pretrain'] / 'iter_6' / 'manifest.json').is_file()


def test_classes_and_names_are_the_same_run(runs: dict[str, Path]) -> None:
    by_class, by_name = (
        [(line['loss'], line['grad_norm']) for line in scalars(folder)] for folder in runs.values()
    )
    assert by_class == by_name


def test_two_processes_give_the_losses_of_one(runs: dict[str, Path], tmp_path: Path) -> None:
    """Hook and wrapper work on sharded weights."""
    argv = [CONFIGS / 'plugin_by_name.py', '--work-dir', tmp_path / 'work', *options()]
    ranks = start_ranks(argv, tmp_path / 'log', prelude=PRELUDE)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    for ours, theirs in zip(
        scalars(tmp_path / 'work'), scalars(runs['plugin_by_name']), strict=True
    ):
        for key in ('loss', 'grad_norm', 'update_ratio'):
            # An update of almost nothing may fall on either side of zero.
            assert math.isclose(ours.get(key, 0), theirs.get(key, 0), rel_tol=1e-3), key


def test_it_resumes(tmp_path: Path) -> None:
    argv = [CONFIGS / 'plugin_pretrain.py', '--work-dir', tmp_path / 'work', '--resume']
    interval = {'default_hooks__checkpoint__interval': 3}
    code, text = train([*argv, *options(**interval)], tmp_path / 'log', prelude=PRELUDE)
    assert code == 0, text
    whole = [line for line in text.splitlines() if ' 6/6 ' in line]
    (tmp_path / 'work' / 'iter_6').rename(tmp_path / 'other')
    code, text = train([*argv, *options(**interval)], tmp_path / 'log', prelude=PRELUDE)
    assert code == 0, text
    assert 'iter_3 at iteration 3' in text
    again = [line for line in text.splitlines() if ' 6/6 ' in line]
    assert again[0].split('|')[1:4] == whole[0].split('|')[1:4]
    ours, theirs = (
        folder / 'shard_0.safetensors' for folder in (tmp_path / 'work/iter_6', tmp_path / 'other')
    )
    assert ours.read_bytes() == theirs.read_bytes()


MISTAKES = {
    'model.type=ParalelDecoder': ['model.type', "'ParallelDecoder'"],
    'model.hiden_size=32': ['ParallelDecoder has no option', "'hidden_size'"],
    'train_dataloader.dataset.type=FolderByte': ['dataset.type', "'FolderBytes'"],
    'train_dataloader.dataset.sufixes=[.py]': ['FolderBytes has no option', "'suffixes'"],
    'optim_wrapper.type=CautiosOptimWrapper': ['optim_wrapper.type', "'CautiousOptimWrapper'"],
    'optim_wrapper.clipgrad=1': ['CautiousOptimWrapper has no option', "'clip_grad'"],
    'custom_hooks.0.type=UpdateRatiosHook': ['custom_hooks.0.type', "'UpdateRatioHook'"],
    'custom_hooks.0.intervall=1': ['UpdateRatioHook has no option', "'interval'"],
    'train_dataloader.dataset.suffixes=[.abc]': ['holds no file that ends in .abc'],
}


@pytest.mark.usefixtures('plugin')
@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_name_the_nearest(
    mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = [*options(), mistake, f'experiment_name={tmp_path.name}']
    argv = [str(CONFIGS / 'plugin_by_name.py'), '--work-dir', str(tmp_path / 'work')]
    assert main([*argv, *map(str, changes)]) == 2
    error = capfd.readouterr().err
    assert 'Traceback' not in error
    for words in MISTAKES[mistake]:
        assert words in error


@pytest.mark.parametrize('name', ['plugin_pretrain', 'plugin_by_name'])
def test_a_plugin_that_is_not_on_the_path(name: str, tmp_path: Path) -> None:
    argv = [CONFIGS / f'{name}.py', '--work-dir', tmp_path / 'work']
    code, text = train(argv, tmp_path / 'log')
    assert code == 2
    assert 'my_plugin' in text and 'PYTHONPATH' in text and 'Traceback' not in text
    assert not (tmp_path / 'work').exists()


@pytest.fixture
def folder_bytes(plugin: None) -> Iterator[type]:
    from my_plugin.dataset import FolderBytes

    yield FolderBytes


def test_dataset_reads_every_byte_once(folder_bytes: type, write) -> None:
    texts = ['abc', '', 'defghijklmnopq', 'r' * 20, 'xyz']
    for index, text in enumerate(texts):
        write(f'data/{index}.txt', text)
    write('data/.hidden/0.txt', 'never')
    root = write('data/other.bin', 'never').parent
    dataset = folder_bytes(root, seq_len=8, suffixes=['.txt'], seed=3)
    stream = b''.join(text.encode() + b'\0' for text in texts)
    labels = [
        IGNORE_INDEX if byte == 0 else following
        for byte, following in zip(stream, [*stream[1:], 0], strict=True)
    ]
    pairs = list(zip(stream, labels, strict=True))
    expected = sorted(tuple(pairs[i : i + 8]) for i in range(0, len(pairs), 8))
    for epoch in (0, 1):
        rows = [dataset[epoch * len(dataset) + index] for index in range(len(dataset))]
        found = []
        for row in rows:
            found.append(tuple(zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)))
            assert row.lengths.sum() == 8
        # The last row of the stream is filled up.
        filled = [(*row, *[(0, IGNORE_INDEX)] * (8 - len(row))) for row in expected]
        assert sorted(found) == sorted(filled)
        collate_rows(rows)


def test_dataset_documents_end_where_files_do(folder_bytes: type, write) -> None:
    root = write('data/a.txt', 'abc').parent
    write('data/b.txt', 'de')
    row = folder_bytes(root, seq_len=8, suffixes=['.txt'])[0]
    assert row.lengths.tolist() == [4, 3, 1]
    assert bytes(row.input_ids.tolist()) == b'abc\0de\0\0'


@pytest.mark.usefixtures('plugin')
def test_wrapper_takes_back_what_goes_uphill() -> None:
    from my_plugin.optim_wrapper import CautiousOptimWrapper

    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    wrapper = CautiousOptimWrapper(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    wrapper.update_params((weight * torch.tensor([1.0, 1.0, -1.0])).sum())
    assert torch.allclose(weight, torch.tensor([0.9, 0.9, 1.1]))
    # Momentum carries all three on; the gradient of the second has turned round.
    wrapper.update_params((weight * torch.tensor([1.0, -0.5, -1.0])).sum())
    assert torch.allclose(weight, torch.tensor([0.71, 0.9, 1.29]))


@pytest.mark.usefixtures('plugin')
def test_model_is_causal_and_keeps_documents_apart() -> None:
    from my_plugin.model import ParallelDecoder

    from internlm_mm.datasets import RandomTokens

    model = ParallelDecoder(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        max_seq_len=12,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, generator)
    row = RandomTokens(vocab_size=16, seq_len=12, document_lengths=[4])[0]
    batch = collate_rows([row])
    model.embed_tokens.weight.requires_grad_()
    seen = []
    model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(output.requires_grad_()) or output.retain_grad()
    )
    states = []
    model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    assert model(batch)['loss'].ndim == 0
    (states[0][0, 6] * torch.arange(16)).sum().backward()  # the third token of the second document
    touched = seen[0].grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [4 <= place <= 6 for place in range(12)]


OPTIM = dict(type=HybridZeroOptimWrapper, optimizer=dict(type=torch.optim.SGD, lr=0.1))


def labels_of_a_step() -> list[str]:
    """On one of two ranks, which hold half of the layers each."""
    add_plugin()
    from my_plugin.labels import LabelledStrategy

    from internlm_mm.datasets import RandomTokens
    from internlm_mm.models import InternLM

    with tempfile.TemporaryDirectory() as folder:
        strategy = LabelledStrategy(
            parallel={'pipeline': 2},
            pipeline={'schedule': 'labelled_1f1b'},
            work_dir=folder,
            experiment_name=folder.replace('/', '_'),
            env_kwargs={'launcher': 'none', 'randomness': {'seed': 5}},
            log_kwargs={'log_level': 'WARNING'},
        )
        sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2)
        strategy.prepare(dict(type=InternLM, **sizes), optim_wrapper=OPTIM)
        data = RandomTokens(vocab_size=16, seq_len=8)
        batches = [collate_rows([data[index]]) for index in range(3)]
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
            strategy.forward_backward(batches, divisor=24)
    return [event.key for event in trace.key_averages()]


def test_schedule_and_strategy_from_outside(two_ranks: Ranks) -> None:
    for labels in two_ranks(labels_of_a_step):
        assert {'pipeline step', '3 micro-batches'} <= set(labels)


LABELLED = """
from mmengine.config import read_base

with read_base():
    from tests.configs.tiny import *

custom_imports = dict(imports=['my_plugin.labels'])
strategy.update(
    type='LabelledStrategy',
    parallel=dict(pipeline=2),
    pipeline=dict(schedule='labelled_1f1b'),
)
custom_hooks = [dict(type='TorchProfilerHook', wait=0, warmup=1, active=1)]
"""


def test_schedule_and_strategy_are_named_in_a_config(write, tmp_path: Path) -> None:
    """A whole run of two processes: theirs are the parts that ran, and the losses are right."""
    config = write('labelled.py', LABELLED)
    ranks = start_ranks([config, '--work-dir', tmp_path / 'two'], tmp_path / 'log', prelude=PRELUDE)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    (file,) = (tmp_path / 'two').glob('*/profile/rank0.json')
    names = {event.get('name') for event in json.loads(file.read_text())['traceEvents']}
    assert {'pipeline step', '2 micro-batches'} <= names
    code, text = train([TINY, '--work-dir', tmp_path / 'one'], tmp_path / 'one_log')
    assert code == 0, text
    for ours, theirs in zip(scalars(tmp_path / 'two'), scalars(tmp_path / 'one'), strict=True):
        for key in theirs.keys() & {'loss', 'grad_norm', 'val/loss'}:
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-4), key


def test_the_page_shows_the_code_as_it_is() -> None:
    """Without docstrings, which the page leaves out."""
    page = (REPOSITORY / 'docs' / 'en' / 'plugins.md').read_text(encoding='utf-8')
    tree = ast.parse((PLUGIN / 'my_plugin' / 'labels.py').read_text(encoding='utf-8'))
    shown = [
        ast.unparse(ast.parse(block)) for block in re.findall(r'```python\n(@.*?)```', page, re.S)
    ]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            node.body = node.body[1:]
            for method in node.body:
                method.body = method.body[1:]
            assert ast.unparse(node) in shown, node.name
