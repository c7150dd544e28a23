"""`internlm_mm/utils/internlm_config.py`: whole configs, converted, read again, and trained."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from torch import nn

from internlm_mm.datasets import TokenFileWriter
from internlm_mm.datasets.internlm_bin import BinSample, write_bin
from internlm_mm.engine import LLMRunner
from internlm_mm.engine.hooks import EvaluationHook
from internlm_mm.optim import Beta2Schedule, HybridZeroOptimWrapper, WarmupCosine
from internlm_mm.utils.config import check_config, load_config, to_plain
from internlm_mm.utils.config_draft import Row
from internlm_mm.utils.internlm_config import convert_config, convert_text
from internlm_mm.utils.internlm_reader import InternLMConfig, read_internlm_config
from tests.internlm_configs import SFT_2023, TINY, write_evo

NAMES = count()


def convert(source: Path, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Row]]:
    """The settings of the converted config, in plain types, and the rows by key."""
    out = folder / f'converted_{next(NAMES)}.py'
    rows = convert_config(source, out, **options)
    config = load_config(out)
    check_config(config)
    assert not list(folder.glob('.converted*'))
    return to_plain(config._cfg_dict), {row.key: row for row in rows}


def change(**sections: Any) -> InternLMConfig:
    """The tiny config with other values."""
    config = read_internlm_config(TINY)
    for name, options in sections.items():
        old = config.values.get(name)
        both = isinstance(old, dict) and isinstance(options, dict)
        config.values[name] = {**old, **options} if both else options
    return config


def settings_of(config: InternLMConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Row]]:
    """As `convert`, of a config that is in memory."""
    out = folder / f'converted_{next(NAMES)}.py'
    text, rows = convert_text(config, out.name)
    out.write_text(text, encoding='utf-8')
    loaded = load_config(out)
    check_config(loaded)
    return to_plain(loaded._cfg_dict), {row.key: row for row in rows}


def test_a_config_of_2023(tmp_path: Path) -> None:
    found, rows = convert(SFT_2023, tmp_path, gpus=16)
    shipped = to_plain(load_config('internlm_7b_pretrain')._cfg_dict)
    assert found['model'] == {**shipped['model'], 'max_seq_len': 2048}
    assert found['strategy'] == {
        'type': 'internlm_mm.parallel.HybridParallelStrategy',
        'parallel': {'data_shard': 8, 'data_replicate': -1},
        'reshard': 'never',
        'precision': {'param': 'bfloat16', 'reduce': 'float32'},
    }
    assert found['train_cfg'] == {
        'type': 'internlm_mm.engine.TokenTrainLoop',
        'max_iters': 50_000,
        'global_batch_size': 4 * 2 * 16,
        'micro_batch_size': 2,
        'rampup': {'start': 32, 'increment': 32, 'interval': 100},
        'skip_batches': [(1, 3), (5, 5)],
    }
    optimizer = found['optim_wrapper']['optimizer']
    assert (optimizer['lr'], optimizer['betas']) == (1e-4, (0.9, 0.95))
    assert (optimizer['eps'], optimizer['weight_decay']) == (1e-8, 0.01)
    assert found['optim_wrapper']['clip_grad'] == {'max_norm': 1.0}
    assert found['param_scheduler'][0]['warmup'] == 500
    assert found['param_scheduler'][0]['min_ratio'] == 0.1
    assert found['train_dataloader']['dataset']['seq_len'] == 2048
    assert found['train_dataloader']['dataset']['min_length'] == 50
    assert found['val_dataloader']['dataset']['seq_len'] == 2048
    assert found['default_hooks']['evaluation']['interval'] == 50
    checkpoint = found['default_hooks']['checkpoint']
    assert (checkpoint['interval'], checkpoint['keep_last']) == (50, None)
    assert found['work_dir'] == 'runs/seven' and found['resume'] is True
    assert found['load_from'] == 'runs/seven_base' and found['experiment_name'] == 'seven'
    assert {row.status for row in rows.values()} == {'mapped', 'changed', 'dropped'}


def test_every_key_has_a_row(tmp_path: Path) -> None:
    _, rows = convert(SFT_2023, tmp_path)
    config = read_internlm_config(SFT_2023)

    def leaves(values: dict[str, Any], prefix: str = '') -> list[str]:
        found = []
        for key, value in values.items():
            nested = isinstance(value, dict) and value
            found += leaves(value, f'{prefix}{key}.') if nested else [f'{prefix}{key}']
        return found

    for key in leaves(config.values):
        assert any(key == row or key.startswith(f'{row}.') for row in rows), key
    for row in rows.values():
        assert row.became and '\n' not in row.became


def test_without_the_number_of_gpus_the_file_says_so(tmp_path: Path) -> None:
    text, _ = convert_text(read_internlm_config(SFT_2023), 'out.py')
    assert '_data_ranks = 8' in text  # as many as zero1 needs at least
    assert 'How many GPUs the job has was not said (--gpus)' in text
    text, _ = convert_text(read_internlm_config(SFT_2023), 'out.py', gpus=16)
    assert '_data_ranks = 16' in text and 'was not said' not in text
    assert '128 rows of 2,048 tokens a step = 262,144 tokens, on 16 GPUs' in text


def test_what_is_left_out_is_in_the_file() -> None:
    text, rows = convert_text(read_internlm_config(SFT_2023), 'out.py')
    words = ' '.join(text.replace('#', '').split())
    for row in rows:
        if row.status in ('changed', 'unknown'):
            assert f'{row.key}=' in words and row.became in words
        elif row.status == 'dropped':
            assert f'{row.key}=' in words
    assert max(map(len, text.splitlines())) <= 100


def test_an_internevo_config_with_bases(tmp_path: Path) -> None:
    found, rows = convert(write_evo(tmp_path), tmp_path, gpus=64)
    assert found['model'] == {
        'type': 'internlm_mm.models.Llama',
        'vocab_size': 92_544,
        'hidden_size': 4096,
        'intermediate_size': 14_336,
        'num_layers': 32,
        'num_heads': 32,
        'num_kv_heads': 8,
        'rope_theta': 1e6,
        'norm_eps': 1e-5,
        'max_seq_len': 4096,
    }
    assert found['strategy']['parallel'] == {
        'tensor': 2,
        'pipeline': 2,
        'data_shard': 8,
        'data_replicate': -1,
    }
    assert found['strategy']['recompute'] == 0.2 and 'reshard' not in found['strategy']
    assert found['train_cfg']['global_batch_size'] == 4 * 1 * 16
    assert found['optim_wrapper']['optimizer']['betas'] == (0.9, 0.98)
    schedule = found['param_scheduler'][0]
    assert (schedule['warmup'], schedule['end']) == (50, 2000)
    assert found['env_cfg']['cudnn_benchmark'] is True
    assert len(found['visualizer']['vis_backends']) == 1
    assert found['val_dataloader'] is None and found['resume'] is False
    assert 'work_dir' not in found and found['load_from'] is None
    changed = {key for key, row in rows.items() if row.status == 'changed'}
    assert changed == {
        'ckpt.save_ckpt_folder',
        'data.min_length_dict',
        'data.pack_sample_into_one',
        'adam.weight_decay',
        'lr_scheduler.init_steps',
        'MLP_RATIO',
    }
    assert rows['MLP_RATIO'].became.startswith('a constant; model.mlp_ratio=3.5 counts')
    unknown = {key: row.became for key, row in rows.items() if row.status == 'unknown'}
    assert unknown == {
        'model.no_biass': "not a key of InternLM that we know. Did you mean 'model.no_bias'?",
        'mesage': 'not a key of InternLM that we know.',
    }


def run(config: Config, folder: Path) -> LLMRunner:
    config.work_dir = str(folder)
    config.experiment_name = f'{config.experiment_name}_{next(NAMES)}'
    config.default_hooks.progress.interval = 1
    for loader in (config.train_dataloader, config.get('val_dataloader')):
        if loader is not None:
            loader.num_workers = 0
    config.visualizer.vis_backends = config.visualizer.vis_backends[:1]
    runner = LLMRunner.from_cfg(config)
    runner.train()
    return runner


def test_a_converted_config_trains(tmp_path: Path) -> None:
    out = tmp_path / 'tiny.py'
    convert_config(TINY, out, gpus=1)
    runner = run(load_config(out), tmp_path / 'work')
    assert runner.iter == 2
    assert runner.train_loop.consumed_tokens == 2 * (2 * 2 * 32)
    assert runner.model.intermediate_size == 88  # 85 rounded up to a multiple of 8
    assert runner.model.objective.label_smoothing == 0.1
    # The rates of the second step: past the warm-up of one, and 1 - 2 ** -0.8 < 0.95.
    group = runner.optim_wrapper.param_groups[0]
    assert group['betas'] == (0.9, 0.95)
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def test_a_converted_config_trains_on_tokens(tmp_path: Path) -> None:
    for split, documents in (('train', 40), ('validation', 8)):
        with TokenFileWriter(tmp_path / 'tokens' / split / 'en', vocab_size=64) as writer:
            for length in range(3, 3 + documents):
                writer.add(np.arange(length) % 64)
    source = tmp_path / 'run.py'
    text = TINY.read_text().replace('valid_every=0', 'valid_every=1')
    source.write_text(text.replace('min_length=0', 'min_length=5'))
    out = tmp_path / 'ours.py'
    rows = {row.key: row for row in convert_config(source, out, data=tmp_path / 'tokens', gpus=1)}
    assert rows['data.min_length'].status == 'mapped'
    config = load_config(out)
    assert config.tokenizer is None
    runner = run(config, tmp_path / 'work')
    assert runner.train_dataloader.dataset.num_dropped == 2
    assert runner.iter == 2 and 'val/loss' in (
        next((tmp_path / 'work').glob('*/vis_data/scalars.json')).read_text()
    )


@settings(max_examples=30, deadline=None)
@given(
    total=st.integers(1, 300),
    ratio=st.floats(0, 1),
    rate=st.floats(1e-6, 1.0),
    share=st.floats(0, 1.5),
)
def test_the_learning_rate_is_the_documented_one(
    total: int, ratio: float, rate: float, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    least = rate * share
    scheduler = dict(total_steps=total, warmup_ratio=ratio, eta_min=least)
    config = change(adam=dict(lr=rate), lr_scheduler=scheduler, data=dict(total_steps=total))
    found, _ = settings_of(config, tmp_path_factory.mktemp('rates'))
    options = dict(found['param_scheduler'][0])
    assert options.pop('type') == 'internlm_mm.optim.WarmupCosine'
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = WarmupCosine(HybridZeroOptimWrapper(optimizer), **{'end': total, **options})
    warmup = int(total * ratio)
    for step in range(total):
        cosine = 1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))
        expected = (
            rate * (step + 1) / warmup if step < warmup else least + (rate - least) * cosine / 2
        )
        assert rate * schedule.factor(step) == pytest.approx(expected, rel=1e-9, abs=1e-12 * rate)


def test_beta2_moves_as_documented(tmp_path: Path) -> None:
    adam = dict(adam_beta2=0.5, adam_beta2_c=0.8)
    config = change(adam=adam, beta2_scheduler=dict(init_beta2=0.5, c=0.8))
    found, _ = settings_of(config, tmp_path)
    options = dict(found['param_scheduler'][1])
    assert options.pop('type') == 'internlm_mm.optim.Beta2Schedule'
    betas = found['optim_wrapper']['optimizer']['betas']
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=betas)
    schedule = Beta2Schedule(HybridZeroOptimWrapper(optimizer), end=100, **options)
    for step in range(1, 9):  # successful steps, counted from 1
        assert optimizer.param_groups[0]['betas'][1] == max(0.5, 1 - step**-0.8)
        schedule.step()


def test_fp16_has_its_loss_scale(tmp_path: Path) -> None:
    source = write_evo(tmp_path, model="model['dtype'] = 'torch.half'\n")
    found, rows = convert(source, tmp_path)
    assert found['strategy']['precision']['param'] == 'float16'
    assert found['optim_wrapper']['loss_scale'] == {
        'initial': 2**14,
        'minimum': 2,
        'growth_interval': 500,
        'growth_factor': 4,
        'backoff_factor': 0.25,
        'maximum': 2**20,
        'hysteresis': 3,
    }
    assert rows['grad_scaler.hysteresis'].status == 'mapped'
    HybridZeroOptimWrapper(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        loss_scale=found['optim_wrapper']['loss_scale'],
    )


@pytest.mark.parametrize(
    ('dtype', 'expected', 'status'),
    [
        ('torch.bfloat16', 'bfloat16', 'mapped'),
        ('torch.float32', 'float32', 'mapped'),
        ('torch.tf32', 'float32', 'changed'),
    ],
)
def test_precision(tmp_path: Path, dtype: str, expected: str, status: str) -> None:
    found, rows = settings_of(change(model=dict(dtype=dtype)), tmp_path)
    assert found['strategy']['precision'] == {'param': expected, 'reduce': 'float32'}
    assert rows['model.dtype'].status == status
    assert 'loss_scale' not in found['optim_wrapper']


@pytest.mark.parametrize(
    ('value', 'expected'), [(False, None), (True, 1.0), (0, None), (1, 1.0), (0.25, 0.25)]
)
def test_recomputation(tmp_path: Path, value: Any, expected: float | None) -> None:
    found, _ = settings_of(change(model=dict(checkpoint=value)), tmp_path)
    assert found['strategy'].get('recompute') == expected


def test_clipping_can_be_off(tmp_path: Path) -> None:
    found, _ = settings_of(change(hybrid_zero_optimizer=dict(clip_grad_norm=0.0)), tmp_path)
    assert found['optim_wrapper']['clip_grad'] is None


def test_determinism_and_seed(tmp_path: Path) -> None:
    found, _ = settings_of(change(cudnn_deterministic=True, data=dict(seed=7)), tmp_path)
    assert found['randomness'] == {'seed': 7, 'deterministic': True}


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        (
            dict(model=dict(dtype='bfloat16')),
            "'bfloat16' is unknown. Did you mean 'torch.bfloat16'",
        ),
        (dict(model=dict(checkpoint=2)), r'model.checkpoint=2 must be a bool or lie in \[0, 1\]'),
        (dict(model=dict(norm_type='layernorm')), "norm_type='layernorm' cannot be had: every"),
        (dict(model=dict(use_swiglu=False)), 'every family here has a SwiGLU'),
        (dict(model=dict(is_reward=True)), 'reward models'),
        (dict(model=dict(num_experts=4)), 'mixtures of experts are not supported'),
        (dict(data=dict(seq_len='2k')), "data.seq_len='2k': expected int"),
        (dict(adam=dict(lr='1e-4')), "adam.lr='1e-4': expected float"),
        (dict(adam=5), 'has no adam.lr, which it needs'),
    ],
)
def test_what_cannot_be_had_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_text(change(**sections), 'out.py')


def test_files_are_not_overwritten_and_never_half_written(tmp_path: Path) -> None:
    out = tmp_path / 'deep' / 'out.py'
    convert_config(TINY, out)
    before = out.read_text()
    with pytest.raises(FileExistsError, match=r'out.py exists'):
        convert_config(TINY, out)
    convert_config(TINY, out, overwrite=True)
    assert out.read_text() == before
    with pytest.raises(ValueError, match=r'a config is a Python file, out.py'):
        convert_config(TINY, tmp_path / 'out.txt')
    broken = tmp_path / 'broken.py'
    broken.write_text(TINY.read_text().replace('num_layers=2', "num_layers='2'"))
    with pytest.raises(ValueError, match=r"model.num_layers='2': expected int"):
        convert_config(broken, tmp_path / 'none.py')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken.py', 'deep']


def test_what_our_config_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model = dict(type='InternLM', num_layer=1)\n"
    monkeypatch.setattr(
        'internlm_mm.utils.internlm_config.convert_text', lambda *_, **__: (text, [])
    )
    with pytest.raises(ValueError, match=r"cannot be run: .*Did you mean 'num_layers'"):
        convert_config(TINY, tmp_path / 'out.py')
    assert not list(tmp_path.iterdir())


def test_a_converted_config_trains_on_bin_files(tmp_path: Path) -> None:
    """What the original is given, `.bin` files in its layout, is all that is needed."""
    text = TINY.read_text()
    for part in ('train', 'valid'):
        samples = [
            BinSample(np.array([1, *range(3, 3 + n), 2]), np.array([0] + [1] * (n + 1)))
            for n in range(4, 40)
        ]
        write_bin(tmp_path / part / 'en' / 'dataset.bin', samples)
        text = text.replace(f'{part}_folder=None', f'{part}_folder={str(tmp_path / part)!r}')
    (tmp_path / 'theirs.py').write_text(text.replace('valid_every=0', 'valid_every=1'))
    out = tmp_path / 'ours.py'
    convert_config(tmp_path / 'theirs.py', out, gpus=1)
    config = load_config(out)
    check_config(config)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.cache_dir = str(tmp_path / 'cache')
    runner = run(config, tmp_path / 'work')
    assert runner.iter == 2 and runner.train_dataloader.dataset.domains == ['en']
    (evaluation,) = (hook for hook in runner.hooks if isinstance(hook, EvaluationHook))
    assert sorted(evaluation.history) == [1, 2]
