"""Perplexity of finished models, against transformers on the same tokens."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.datasets import TokenFileWriter
from internlm_mm.engine.evaluate import evaluate, metrics_table
from tests.helpers import TINY, tiny_runner
from tests.questions import write_mmlu
from tests.trained import trained_run

LENGTHS = {'code': (50, 9), 'prose': (33,)}


def write_tokens(root: Path, vocab_size: int, tokenizer: dict | None = None) -> dict:
    """Token files of two domains, and their documents."""
    random, documents = np.random.default_rng(0), {}
    for domain, lengths in LENGTHS.items():
        documents[domain] = [random.integers(vocab_size, size=length) for length in lengths]
        options = dict(vocab_size=vocab_size, tokenizer=tokenizer)
        with TokenFileWriter(root / domain, **options) as writer:
            for ids in documents[domain]:
                writer.add(ids)
    return documents


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path, dict]:
    work_dir, _, tokenizer = trained_run(tmp_path)
    documents = write_tokens(tmp_path / 'tokens', tokenizer.vocab_size)
    return work_dir, tmp_path / 'tokens', documents


def test_equals_transformers_in_every_domain(run, tmp_path: Path) -> None:
    work_dir, tokens, documents = run
    hf = tmp_path / 'hf'
    convert_to_hf(work_dir, hf, dtype='float32')
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    sums, counts = {}, {}
    for domain, texts in documents.items():
        sums[domain] = counts[domain] = 0
        for ids in texts:  # alone: documents do not see each other; the last token has no label
            ids = torch.from_numpy(ids)[None]
            with torch.no_grad():
                mean = model(ids, labels=ids).loss
            sums[domain] += mean.item() * (ids.shape[1] - 1)
            counts[domain] += ids.shape[1] - 1
    for target in (work_dir, work_dir / 'iter_3', hf):
        metrics = evaluate(target, data=tokens)
        for domain in documents:
            expected = sums[domain] / counts[domain]
            assert metrics[f'loss/{domain}'] == pytest.approx(expected, rel=1e-5)
            assert metrics[f'perplexity/{domain}'] == pytest.approx(math.exp(expected), rel=1e-4)
        expected = sum(sums.values()) / sum(counts.values())
        assert metrics['loss'] == pytest.approx(expected, rel=1e-5)


def test_the_config_in_the_checkpoint_is_used(tmp_path: Path) -> None:
    hooks = dict(
        default_hooks__checkpoint=dict(type='StepCheckpointHook'),
        custom_hooks=[dict(type='EvaluationHook')],
    )
    runner = tiny_runner(tmp_path / 'run', **hooks)
    runner.train()
    during = runner.message_hub.get_scalar('val/loss').current()
    before = sorted(path.name for path in (tmp_path / 'run').iterdir())
    assert evaluate(tmp_path / 'run')['loss'] == during
    assert evaluate(TINY, checkpoint=tmp_path / 'run')['loss'] == during
    half = evaluate(tmp_path / 'run', options={'val_dataloader.max_rows': 3})
    assert half['loss'] != during
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == before


def test_layout_and_compilation_of_the_run_do_not_bind(tmp_path: Path) -> None:
    changes = dict(default_hooks__checkpoint=dict(type='StepCheckpointHook'))
    tiny_runner(tmp_path, train_cfg__max_iters=1, **changes).train()
    metrics = evaluate(tmp_path)
    file = tmp_path / 'iter_1' / 'config.json'
    text = file.read_text()
    old = '"type": "internlm_mm.parallel.HybridParallelStrategy"'
    assert old in text
    new = f'{old}, "parallel": {{"data_shard": 64}}, "compile": true, "recompute": 1.0'
    other = tmp_path / 'edited.json'
    other.write_text(text.replace(old, new))
    for options in ({}, {'strategy.parallel.tensor': 1}, {'strategy.parallel': {'context': 1}}):
        again = evaluate(other, checkpoint=tmp_path, options=options)
        assert again['loss'] == metrics['loss']


def evaluate_on_a_rank(target: str, data: str) -> dict:
    return evaluate(target, data=data)


@pytest.mark.parametrize('hugging_face', [False, True])
def test_two_ranks_find_the_same(hugging_face: bool, run, two_ranks, tmp_path: Path) -> None:
    target, tokens, _ = run
    if hugging_face:
        target = tmp_path / 'hf'
        convert_to_hf(run[0], target, dtype='float32')
    alone = evaluate(target, data=tokens)
    first, second = two_ranks(evaluate_on_a_rank, str(target), str(tokens))
    assert (first.pop('rank'), second.pop('rank')) == (0, 1)
    assert first == second
    for key in ('loss', 'loss/code', 'perplexity/prose'):
        assert first[key] == pytest.approx(alone[key], rel=1e-6)


def test_what_is_missing_is_named(run, tmp_path: Path) -> None:
    work_dir, tokens, _ = run
    with pytest.raises(ValueError, match=r'tiny\.py is a config and has no weights.*--checkpoint'):
        evaluate(TINY)
    with pytest.raises(ValueError, match=r'names no held-out data \(val_dataloader\).*--data'):
        evaluate(work_dir)
    with pytest.raises(FileNotFoundError, match='neither a checkpoint nor a Hugging Face folder'):
        evaluate(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError):
        evaluate(work_dir, data=tmp_path / 'nowhere')
    with pytest.raises(ValueError, match=r"val_dataloader\.max_row=3.*Did you mean 'max_rows'"):
        evaluate(work_dir, data=tokens, options={'val_dataloader.max_row': 3})


def test_misspelt_paths_and_files_for_folders(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / 'work_dirs' / 'my_chat').mkdir(parents=True)
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'work_dirs/my_chat'\?$"):
        evaluate('work_dirs/my_cht')
    with pytest.raises(ValueError, match='output file is a file: name a folder'):
        evaluate('work_dirs/my_chat', output='file')  # before anything is read


def test_tasks_of_a_config_on_weights_that_learned_something_else(tmp_path: Path) -> None:
    random, _, _ = trained_run(tmp_path / 'a', max_seq_len=256)
    torch.manual_seed(0)
    pairs, _, _ = trained_run(tmp_path / 'b', max_seq_len=256, objective=dict(type='SimPO'))
    task = dict(
        type='MultipleChoice', path=str(write_mmlu(tmp_path / 'mmlu')), format='mmlu', split='test'
    )  # fmt: skip
    by_name, by_class = tmp_path / 'by_name.py', tmp_path / 'by_class.py'
    by_name.write_text(f"val_cfg = dict(type='PerplexityLoop', tasks=[{task!r}])\n")
    text = 'from internlm_mm.engine import PerplexityLoop\n'
    by_class.write_text(f'{text}val_cfg = dict(type=PerplexityLoop, tasks=[{task!r}])\n')
    found = {}
    for config, weights in ((by_name, random), (by_name, pairs), (by_class, pairs)):
        result = evaluate(config, checkpoint=weights, output=tmp_path / 'out')
        records = (tmp_path / 'out' / 'mmlu.jsonl').read_text().splitlines()
        found[weights] = [json.loads(line)['log_probs'] for line in records]
        assert result.keys() == {
            'weights', 'rank', 'mmlu/accuracy', 'mmlu/accuracy_by_subject'
        }  # fmt: skip
    assert len(found[pairs]) == 8
    table = metrics_table(result)
    assert table.splitlines()[0].split() == ['mmlu/accuracy', f'{result["mmlu/accuracy"]:.4f}']
    assert 'weights' not in table


def test_weights_of_another_model(run, tmp_path: Path) -> None:
    work_dir, _, _ = run
    with pytest.raises(ValueError, match=r'of another model: .* has shape \[400, 32\] there and'):
        evaluate(TINY, checkpoint=work_dir)
    hook = dict(type='StepCheckpointHook')
    tiny_runner(tmp_path / 'run', default_hooks__checkpoint=hook, train_cfg__max_iters=1).train()
    with pytest.raises(ValueError, match='is a checkpoint of another model'):
        evaluate(TINY, checkpoint=tmp_path / 'run', options={'model.intermediate_size': 64})


def test_data_of_another_tokenizer(run, tmp_path: Path) -> None:
    work_dir, _, _ = run
    made_by = dict(type='SentencePieceTokenizer', hash='0' * 64)
    write_tokens(tmp_path / 'foreign', 400, made_by)
    with pytest.raises(ValueError, match='tokenised with another tokenizer'):
        evaluate(work_dir, data=tmp_path / 'foreign')


def test_the_table() -> None:
    metrics = {
        'loss': 2.0,
        'loss/code': 1.0,
        'loss/prose': 9.0,
        'perplexity': 7.389,
        'perplexity/code': 2.718,
        'perplexity/prose': 8103.08,
    }
    assert metrics_table(metrics).splitlines() == [
        'domain    loss  perplexity',
        'code    1.0000       2.718',
        'prose   9.0000   8,103.080',
        'all     2.0000       7.389',
    ]
