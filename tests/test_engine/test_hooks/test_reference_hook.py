"""When references are asked for, read, and refused; the arithmetic is in test_references.py."""

import json
from types import SimpleNamespace as Fake

import numpy as np
import pytest
import torch
from mmengine.config import Config

from internlm_mm.datasets.token_cache import SOURCE_NAME
from internlm_mm.engine.hooks import EvaluationHook, ReferenceHook
from internlm_mm.engine.references import hash_said, hash_weights
from tests.test_engine.test_references import dataset, pairs_in, prepared


@pytest.fixture
def runner(tmp_path):
    from tests.conversations import internlm_model

    internlm_model(tmp_path / 'tokenizer')
    (tmp_path / 'pairs').mkdir()
    pairs_in(tmp_path / 'pairs')
    loaders = [
        Fake(dataset=dataset(tmp_path, shuffle=s), micro_batch_size=2) for s in (True, False)
    ]
    lines: list[str] = []
    return Fake(
        iter=0,
        cfg=Config(dict(model=dict(type='InternLM'))),
        strategy=prepared(loaders[0].dataset.vocab_size, {}),
        train_loop=Fake(dataloader=loaders[0]),
        val_loop=Fake(dataloader=loaders[1]),
        logger=Fake(info=lines.append),
        lines=lines,
        again=lambda: Fake(dataset=dataset(tmp_path), micro_batch_size=2),
    )


def test_asked_once_kept_and_remembered(runner) -> None:
    hook = ReferenceHook()
    hook.before_train(runner)
    assert 'train_dataloader: references of 14 pairs in ' in runner.lines[0]
    assert runner.lines[1] == 'val_dataloader: references of 14 pairs were kept'  # the same pairs
    rows = [loader.dataloader.dataset for loader in (runner.train_loop, runner.val_loop)]
    assert all(one.has_references and one[0].references.any() for one in rows)
    state: dict = {}
    hook.before_save_checkpoint(runner, state)

    with torch.no_grad():  # training has gone on
        runner.strategy.model.norm.weight += 1
    resumed = ReferenceHook()
    resumed.after_load_checkpoint(runner, state)
    runner.iter, runner.train_loop = 3, Fake(dataloader=runner.again())
    resumed.before_train(runner)
    found = runner.train_loop.dataloader.dataset
    assert (found.read(0, 0).references == rows[0].read(0, 0).references).all()

    alone = ReferenceHook()  # an evaluation by itself
    alone.after_load_checkpoint(runner, state)
    runner.train_loop, runner.val_loop = None, Fake(dataloader=runner.again())
    alone.before_val(runner)
    assert runner.val_loop.dataloader.dataset.has_references


def test_what_cannot_be_asked_any_more(runner) -> None:
    hook = ReferenceHook()
    hook.after_load_checkpoint(runner, {'reference_model': 'gone'})
    runner.iter = 3
    with pytest.raises(ValueError, match=r'has no references .*gone.*it is trained already'):
        hook.before_train(runner)
    hook.after_load_checkpoint(runner, {})
    with pytest.raises(ValueError, match='it was trained without ReferenceHook'):
        hook.before_train(runner)


def keep_as_older_versions_did(folder, weights: str) -> None:
    folder.mkdir(parents=True)
    source = {'kind': 'log-probabilities of answers', 'weights': weights, 'tokens': 'abc'}
    (folder / SOURCE_NAME).write_text(json.dumps(source))


def test_what_an_older_version_kept_is_named_and_can_be_made_anew(runner, tmp_path) -> None:
    """Their checkpoints know the model by its weights alone, and so do their folders."""
    old = {'reference_weights': hash_weights(runner.strategy.model)}
    keep_as_older_versions_did(tmp_path / 'cache' / 'older', old['reference_weights'])
    (tmp_path / 'cache' / 'other').mkdir()
    (tmp_path / 'cache' / 'other' / SOURCE_NAME).write_text('no JSON')
    hook = ReferenceHook()
    hook.after_load_checkpoint(runner, old)
    runner.iter = 3
    message = r'an older version has kept, \S+cache/older, is not read .*train_cfg\.max_iters=1'
    with pytest.raises(ValueError, match=message):
        hook.before_train(runner)

    runner.iter = 0  # another run from where this one began
    ReferenceHook().before_train(runner)
    assert any('cache/older: references of an older version' in line for line in runner.lines)
    with torch.no_grad():  # the first has been trained
        runner.strategy.model.norm.weight += 1
    runner.iter, runner.train_loop = 3, Fake(dataloader=runner.again())
    hook = ReferenceHook()
    hook.after_load_checkpoint(runner, old)
    hook.before_train(runner)
    assert runner.train_loop.dataloader.dataset.has_references
    state: dict = {}
    hook.before_save_checkpoint(runner, state)
    assert state == {'reference_model': hash_said(old['reference_weights'], runner.cfg)}


def test_weights_that_are_started_from_are_asked_anew(runner) -> None:
    hook = ReferenceHook()
    hook.after_load_checkpoint(runner, {'reference_model': 'of the run before'})
    hook.before_train(runner)
    state: dict = {}
    hook.before_save_checkpoint(runner, state)
    assert state['reference_model'] != 'of the run before'


def test_another_function_of_the_same_weights_is_asked_anew(runner) -> None:
    ReferenceHook().before_train(runner)
    for theta, what in ((100.0, ' in '), (100.0, ' were kept')):
        runner.cfg = Config(dict(model=dict(type='InternLM', rope_theta=theta)))
        runner.train_loop = Fake(dataloader=runner.again())
        runner.lines.clear()
        ReferenceHook().before_train(runner)
        assert f'train_dataloader: references of 14 pairs{what}' in runner.lines[0]


def test_tasks_alone_need_no_references(runner) -> None:
    runner.train_loop, runner.val_loop = None, Fake(dataloader=None)
    ReferenceHook().before_val(runner)


def test_it_comes_before_the_first_evaluation() -> None:
    from mmengine.runner import get_priority

    assert get_priority(ReferenceHook.priority) < get_priority(EvaluationHook.priority)
    assert np.isfinite(get_priority(ReferenceHook.priority))
