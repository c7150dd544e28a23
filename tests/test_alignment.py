"""From preferences to an aligned model: train, evaluate, resume and export, through the runner."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from internlm_mm.api import from_pretrained
from internlm_mm.checkpoint.peft_files import export_peft
from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model
from internlm_mm.datasets import collate_rows
from internlm_mm.engine import LLMRunner
from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.evaluate import evaluate, metrics_table
from internlm_mm.utils.config import check_config, load_config
from tests.conversations import internlm_model

WORDS = ('sum', 'length', 'largest', 'smallest', 'first', 'last', 'text', 'type')


def write_pairs(folder: Path, words=WORDS) -> None:
    """A preference for answers that begin with 'Yes': one file in each of two forms."""
    folder.mkdir(parents=True)
    questions = [f'Is there a function for the {word}?' for word in words]
    prompts = [
        {
            'prompt': question,
            'chosen': f'Yes, {word}.',
            'rejected': f'No, there is no {word}.',
        }
        for question, word in zip(questions, words, strict=True)
    ]
    (folder / 'plain.jsonl').write_text('\n'.join(map(json.dumps, prompts)))
    messages = [
        {
            'messages': [{'role': 'user', 'content': one['prompt']}],
            'chosen': {'role': 'assistant', 'content': one['chosen']},
            'rejected': {'role': 'assistant', 'content': one['rejected']},
        }
        for one in prompts[:3]
    ]
    (folder / 'messages.json').write_text(json.dumps(messages))


def options(folder: Path, tokenizer, **more) -> dict:
    data = {'path': str(folder / 'pairs'), 'cache_dir': str(folder / 'cache')}
    found = {
        f'{loader}.dataset.{key}': value
        for loader in ('train_dataloader', 'val_dataloader')
        for key, value in data.items()
    }
    sizes = dict(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4)
    found |= {f'model.{key}': value for key, value in sizes.items()}
    return found | {
        'model.vocab_size': tokenizer.vocab_size,
        'tokenizer.path': str(folder / 'tokenizer'),
        'load_from': None,
        'train_cfg.max_iters': 8,
        'train_cfg.global_batch_size': 2,
        'train_cfg.micro_batch_size': 1,
        'optim_wrapper.optimizer.lr': 1e-2,
        'default_hooks.evaluation.interval': 4,
        'default_hooks.checkpoint.interval': 4,
        **more,
    }


def runner_of(name: str, work_dir: Path, settings: dict) -> LLMRunner:
    config = load_config(name, settings)
    config.work_dir = str(work_dir)
    check_config(config)
    return LLMRunner.from_cfg(config)


def history(runner: LLMRunner) -> dict:
    return next(hook.history for hook in runner.hooks if hasattr(hook, 'history'))


PLAIN = {'model.objective.sft_weight': 0.0}  # so that the loss is known before the first step


@pytest.fixture(scope='module')
def dpo(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp('dpo')
    tokenizer = internlm_model(folder / 'tokenizer')
    write_pairs(folder / 'pairs')
    settings = options(folder, tokenizer, **PLAIN)
    runner = runner_of('internlm_tiny_dpo', folder / 'work', settings)
    runner.train()
    return folder, settings, runner


def test_it_learns_the_preference(dpo) -> None:
    _, _, runner = dpo
    found = history(runner)
    assert list(found) == [0, 4, 8]
    assert found[0]['loss'] == pytest.approx(torch.tensor(2.0).log().item())  # both models alike
    assert found[0]['rewards/margin'] == found[0]['kl'] == 0
    assert found[8]['rewards/accuracy'] == 1 and found[8]['rewards/margin'] > 0.05
    assert {'loss/plain', 'loss/messages'} <= found[8].keys()


def test_references_from_before_are_those_without_adapters(dpo) -> None:
    folder, settings, runner = dpo
    again = runner_of(
        'internlm_tiny_dpo',
        folder / 'precomputed',
        settings
        | {
            'model.objective.reference': 'precomputed',
            'default_hooks.references': {'type': 'ReferenceHook'},
        },
    )
    again.train()
    for step, metrics in history(runner).items():
        # The same numbers by way of a file: rows lie in other batches when they are asked about.
        assert history(again)[step] == pytest.approx(metrics, rel=1e-4, abs=1e-5)


FULL = PLAIN | {
    'model.adapter': None,
    'model.objective.reference': 'precomputed',
    'default_hooks.references': {'type': 'ReferenceHook'},
    'optim_wrapper.optimizer.lr': 1e-3,
}


@pytest.fixture(scope='module')
def full(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp('full')
    tokenizer = internlm_model(folder / 'tokenizer')
    write_pairs(folder / 'pairs')
    settings = options(folder, tokenizer, **FULL)
    runner = runner_of('internlm_tiny_dpo', folder / 'work', settings)
    runner.train()
    return folder, settings, runner


def test_all_weights_learn_it_too_and_a_resumed_run_goes_on_as_if_never_stopped(full) -> None:
    folder, settings, runner = full
    found = history(runner)
    assert found[0]['loss'] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert found[8]['rewards/accuracy'] == 1
    resumed = runner_of(
        'internlm_tiny_dpo', folder / 'resumed', settings | {'resume': str(folder / 'work/iter_4')}
    )
    resumed.train()
    assert history(resumed)[8] == found[8]


def test_a_checkpoint_is_evaluated_by_itself(full, dpo) -> None:
    for folder, _, runner in (full, dpo):
        metrics = evaluate(folder / 'work')
        for key, value in history(runner)[8].items():
            assert metrics[key] == pytest.approx(value, rel=1e-5), key
        assert 'rewards/accuracy' in metrics_table(metrics)


def test_a_config_that_does_not_say_how_is_measured_by_its_objective(dpo) -> None:
    folder = dpo[0]
    said, silent = (evaluate(folder / 'work', options=more) for more in ({}, {'val_cfg': None}))
    assert silent == said and 'rewards/accuracy' in said


def test_data_may_be_moved_or_spelt_otherwise(full, tmp_path, monkeypatch) -> None:
    folder, _, runner = full
    shutil.copytree(folder / 'pairs', tmp_path / 'elsewhere')
    monkeypatch.chdir(tmp_path)
    found = evaluate(folder / 'work', options={'val_dataloader.dataset.path': 'elsewhere'})
    assert found['loss'] == pytest.approx(history(runner)[8]['loss'], rel=1e-5)


def test_what_was_aligned_is_exported_as_any_language_model(full, dpo) -> None:
    for folder, _, runner in (full, dpo):
        assert convert_to_hf(folder / 'work', folder / 'hf', dtype='float32') < 1e-4
        theirs = AutoModelForCausalLM.from_pretrained(folder / 'hf').eval()
        rows = runner.val_dataloader.dataset
        (ids, _), *_ = documents_of(rows, [0])
        row = rows.read(*rows.locate(0))
        labels = torch.from_numpy(row.labels[: len(ids)])
        logits = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = logits[torch.arange(len(ids)), labels.clamp(min=0)][labels >= 0].sum()
        with torch.no_grad(), runner.model.objective.telling_log_probs():
            told = runner.model.eval()(collate_rows([row]))['log_probs'][0, 0]
        assert told == pytest.approx(wanted.item(), rel=1e-4)


@pytest.fixture(scope='module')
def rewards(full):
    """A reward model of all weights, and one of adapters, that begin with an aligned model."""
    folder, settings, _ = full
    given = {key: value for key, value in settings.items() if key not in FULL}
    given |= {'load_from': str(folder / 'work'), 'train_dataloader.dataset.on_error': 'skip'}
    lora = {'model.adapter': {'type': 'LoRA', 'rank': 4}}
    runners = []
    for name, more in (('reward', {}), ('lora_reward', lora)):
        rate = {'optim_wrapper.optimizer.lr': 1e-2 if more else 1e-3}
        runner = runner_of('internlm_tiny_reward', folder / name, given | more | rate)
        runner.train()
        runners.append(runner)
        convert_to_hf(folder / name, folder / f'{name}_hf', dtype='float32')
    return folder, given, runners


@pytest.mark.slow
def test_a_reward_model_learns_it(rewards) -> None:
    _, _, runners = rewards
    for runner in runners:
        found = history(runner)
        assert found[8]['loss'] < found[0]['loss'] - 0.05
        assert found[8]['rewards/accuracy'] >= found[0]['rewards/accuracy']


@pytest.mark.slow
@pytest.mark.parametrize('name', ['reward', 'lora_reward'])
def test_transformers_gives_the_same_scores(name, rewards) -> None:
    folder, _, runners = rewards
    tokenizer = AutoTokenizer.from_pretrained(folder / f'{name}_hf')
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / f'{name}_hf').eval()
    assert type(theirs).__name__ == 'LlamaForSequenceClassification' and theirs.num_labels == 1
    ours = load_model(folder / name)
    pairs = json.loads((folder / 'pairs/messages.json').read_text())
    rows = runners[0].val_dataloader.dataset
    seen = {tuple(one) for one, _ in documents_of(rows, range(len(rows)))}
    for pair in pairs:
        for answer in (pair['chosen'], pair['rejected']):
            ids = tokenizer.apply_chat_template([*pair['messages'], answer], return_tensors='pt')[
                'input_ids'
            ]
            assert tuple(ids[0].tolist()) in seen  # what is scored is spelt as what was learnt
            wanted = theirs(ids).logits.item()
            hidden = ours.hidden_states(ids, torch.arange(ids.shape[1])[None])
            assert ours.objective.score(hidden[:, -1]).item() == pytest.approx(wanted, abs=1e-5)


def test_trained_adapters_are_no_start_for_a_reference_without_them(full, dpo, tmp_path) -> None:
    folder, settings, runner = dpo
    adapters, foreign = tmp_path / 'peft', tmp_path / 'hf'
    export_peft(folder / 'work', adapters)
    convert_to_hf(full[0] / 'work', foreign, dtype='float32')
    for name, load_from, way_out in (
        ('lora', str(folder / 'work'), rf'`tools/convert2hf\.py {folder}/work/iter_8 OUT`'),
        ('peft', {'path': str(foreign), 'adapter': str(adapters)}, 'merge_and_unload'),
    ):
        given = settings | {'load_from': load_from}
        message = rf"adapters_off' .*{way_out}.* reference='precomputed' with default_hooks"
        started = runner_of('internlm_tiny_dpo', tmp_path / f'from_{name}', given)
        with pytest.raises(ValueError, match=message):
            started.prepare_training()
        assert next(started.model.parameters()).is_meta, 'refused before it was placed'
        with pytest.raises(ValueError, match=message):
            dry_run(started.cfg)
    resumed = settings | {'resume': str(folder / 'work/iter_4')}
    again = runner_of('internlm_tiny_dpo', tmp_path / 'resumed', resumed)
    again.train()
    assert history(again)[8] == history(runner)[8]


def test_a_loss_of_pairs_has_no_perplexity(dpo, tmp_path) -> None:
    folder, settings, _ = dpo
    runner = runner_of('internlm_tiny_dpo', tmp_path / 'loop', settings)
    assert 'everything fits together' in dry_run(runner.cfg)
    given = settings | {'val_cfg.type': 'PerplexityLoop'}
    refused = runner_of('internlm_tiny_dpo', tmp_path / 'wrong_loop', given)
    for act in (refused.prepare_training, lambda: dry_run(refused.cfg)):
        with pytest.raises(ValueError, match=r'PerplexityLoop .* DPO .*type=PreferenceLoop'):
            act()
    assert next(refused.model.parameters()).is_meta
    with pytest.raises(ValueError, match='type=PreferenceLoop'):
        evaluate(folder / 'work', options={'val_cfg.type': 'PerplexityLoop'})


@pytest.mark.parametrize('way', ['merged', 'precomputed'])
def test_ways_to_align_what_adapters_have_learnt(way: str, dpo, tmp_path) -> None:
    folder, settings, runner = dpo
    if way == 'merged':
        convert_to_hf(folder / 'work', tmp_path / 'hf', dtype='float32')
        given = settings | {'load_from': str(tmp_path / 'hf')}
    else:
        hook = {'default_hooks.references': {'type': 'ReferenceHook'}}
        given = settings | hook | {'load_from': str(folder / 'work')}
        given |= {'model.objective.reference': 'precomputed'}
    started = runner_of('internlm_tiny_dpo', tmp_path / 'work', given)
    started.train()
    before, after = history(runner)[8], history(started)
    for key in ('log_probs/chosen', 'log_probs/rejected'):
        assert after[0][key] == pytest.approx(before[key], rel=1e-4), 'what was learnt is there'
    assert after[0]['loss'] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    assert after[0]['kl'] == pytest.approx(0, abs=1e-3)
    told = [after[step]['log_probs/chosen'] + after[step]['log_probs/rejected'] for step in (0, 8)]
    assert after[8]['kl'] == pytest.approx((told[1] - told[0]) / 2, rel=1e-3)


def documents_of(rows, indices):
    for index in indices:
        row = rows[index]
        start = 0
        for number, length in enumerate(row.lengths[: 2 * row.num_pairs]):
            yield row.input_ids[start : start + length].tolist(), number
            start += length


@pytest.mark.slow
def test_a_reward_run_goes_on_and_is_evaluated(rewards) -> None:
    folder, given, runners = rewards
    resumed = runner_of(
        'internlm_tiny_reward',
        folder / 'reward_resumed',
        given | {'resume': str(folder / 'reward/iter_4'), 'optim_wrapper.optimizer.lr': 1e-3},
    )
    resumed.train()
    assert history(resumed)[8] == history(runners[0])[8]
    for name, runner in zip(('reward', 'lora_reward'), runners, strict=True):
        metrics = evaluate(folder / name)
        for key, value in history(runner)[8].items():
            assert metrics[key] == pytest.approx(value, rel=1e-4), key
    with pytest.raises(ValueError, match='this is a reward model'):
        from_pretrained(folder / 'reward')
