from pathlib import Path

import pytest
import torch

from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.train_cli import main, parse_args, resolve_config
from internlm_mm.ops.needs import Needs
from internlm_mm.registry import ATTENTIONS, MODELS
from tests.helpers import tiny_config, tiny_runner

CONFIGS = Path(__file__).parents[2] / 'configs'
RANDOM = [
    'tokenizer=None',
    'val_dataloader=None',
    'val_cfg=None',
    'train_dataloader.dataset=None',  # given up, to be filled anew
    'train_dataloader.dataset.type=RandomTokens',
    'train_dataloader.dataset.vocab_size=103168',
    'train_dataloader.dataset.seq_len=4096',
]


def plan(name: str, folder: Path, *options: str) -> str:
    arguments = [str(CONFIGS / name), '--work-dir', str(folder / 'run')]
    return dry_run(resolve_config(parse_args([*arguments, '--cfg-options', *RANDOM, *options])))


@pytest.mark.parametrize(
    ('name', 'parameters', 'full', 'causal'),
    [
        ('internlm_7b_pretrain.py', '7,321,948,160', '47.839', '44.617'),
        ('internlm_20b_pretrain.py', '20,089,943,040', '132.470', '124.920'),
    ],
)
def test_large_models_are_counted_to_the_last_parameter(
    tmp_path: Path, name: str, parameters: str, full: str, causal: str
) -> None:
    text = plan(name, tmp_path)
    assert f'InternLM, {parameters} parameters' in text
    assert f'{full} GFLOP a token at 4096 tokens ({causal} counted causally)' in text
    assert '1024 rows = 4,194,304 tokens' in text
    assert '250,000 steps, 1,048,576,000,000 tokens' in text
    assert text.endswith('nothing was trained')
    assert not (tmp_path / 'run').exists()


def test_memory_of_a_layout(tmp_path: Path) -> None:
    """7.32e9 parameters: 12 bytes of master and moments, 4 of gradient, 2 gathered."""
    text = plan('internlm_7b_pretrain.py', tmp_path, 'strategy.parallel.data_shard=8')
    n = 7_321_948_160
    assert f'{12 * n / 8 / 2**30:.2f} GiB masters and moments' in text
    assert f'{4 * n / 8 / 2**30:.2f} GiB gradients' in text
    assert f'{2 * n / 2**30:.2f} GiB gathered weights' in text
    assert 'dict(data_shard=8) on 8 processes' in text
    assert '128 micro-batches of 1 row on each of 8 data ranks' in text


def test_memory_of_weights_that_are_gathered_in_8_bits(tmp_path: Path) -> None:
    """One byte a number of the layers' matrices."""
    options = ('strategy.parallel.data_shard=8', 'strategy.float8.recipe=tensorwise')
    text = plan('internlm_7b_pretrain.py', tmp_path, *options)
    assert torch.cuda.is_available() or 'all else fits together' in text
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008)
    gathered = 2 * 7_321_948_160 - layers
    assert f'{gathered / 2**30:.2f} GiB gathered weights' in text
    assert (
        torch.cuda.is_available() or 'float8     this machine would refuse it: needs CUDA' in text
    )


def test_a_small_run(tmp_path: Path) -> None:
    text = dry_run(tiny_config(tmp_path))
    embedding = 2 * 64 * 32
    layer = 4 * (32 * 32 + 32) + 3 * 32 * 48 + 2 * 32
    assert f'{embedding + 2 * layer + 32:,} parameters' in text
    assert '4 rows = 128 tokens: 2 micro-batches of 2 rows on 1 data rank' in text
    assert '6 steps, 768 tokens' in text
    assert 'val        RandomTokens: 6 rows of 32 tokens = 192 an epoch' in text
    assert 'none named: checkpoints and exports will have none' in text


def test_ramp_up_counts(tmp_path: Path) -> None:
    text = dry_run(tiny_config(tmp_path, train_cfg__rampup=dict(start=2, increment=2, interval=3)))
    assert f'6 steps, {(3 * 2 + 3 * 4) * 32:,} tokens' in text


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'train_dataloader__dataset__vocab_size': 65},
            'vocabulary of 65, but model.vocab_size=64',
        ),
        (
            {'train_dataloader__dataset__seq_len': 65},
            'seq_len=65 is longer than model.max_seq_len=64',
        ),
        ({'train_cfg__global_batch_size': 7}, '7'),
        ({'model__num_heads': 3}, 'num_heads=3 does not divide'),
        ({'strategy__parallel': {'data_shard': 3}}, '3'),
        ({'optim_wrapper__clip_grad': {'max_norm': -1}}, 'max_norm'),
        ({'strategy__kernels': {'norm': 'tirch'}}, "kernels.norm='tirch'"),
        ({'strategy__float8': {'recipe': 'rows'}}, "float8.recipe='rows'"),
        ({'strategy__context_attention': 'rng'}, "context_attention='rng'.*'ring'"),
        ({'strategy__float8': {}, 'strategy__kernels': {'fuse': True}}, 'float8 does not go with'),
        ({'strategy__float8': {}, 'model__adapter__rank': 4}, 'float8 does not go with model.adap'),
        (
            {'strategy__kernels': {'norm': 'apex'}},
            "kernels.norm='apex' needs .*NVIDIA's apex.*; for GPUs that are elsewhere: --rehearse",
        ),
        (
            {'strategy__attention': 'flash4'},
            "strategy.attention='flash4' needs CUDA .*; for GPUs that are elsewhere: --rehearse N",
        ),
        (
            {'strategy__kernels': {'norm': 'fused'}, 'strategy__parallel': {'tensor': 2}},
            "kernels.norm='fused' does not go with strategy.parallel.tensor=2",
        ),
        (
            {
                'strategy__kernels': {'fuse_accumulation': True},
                'strategy__parallel': {'tensor': 2},
            },
            'fuse_accumulation=True does not go with strategy.parallel.tensor=2',
        ),
    ],
)
def test_what_the_run_would_refuse_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_config(tmp_path, **changes))


def test_without_data_it_says_how_to_make_some(tmp_path: Path, capsys) -> None:
    arguments = [str(CONFIGS / 'internlm_7b_pretrain.py'), '--dry-run', '--work-dir', str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert 'data/text/tokenizer' in error
    assert 'train_tokenizer.py' in error and 'preprocess_data.py' in error
    assert 'RandomTokens' in error


@pytest.mark.parametrize('axis', ['context', 'tensor'])
def test_rows_of_an_evaluation_fit_the_layout_too(tmp_path: Path, axis: str) -> None:
    """Ranks would leave out the tokens that they do not share evenly, without a word."""
    config = tiny_config(tmp_path, val_dataloader__dataset__seq_len=31)
    dry_run(config)
    config.strategy['parallel'] = {axis: 2}
    with pytest.raises(ValueError, match=rf'{axis}=2.*val_dataloader'):
        dry_run(config)


def test_frozen_weights_have_no_masters(tmp_path: Path) -> None:
    half = dict(strategy__precision__param='bfloat16')
    config = tiny_config(tmp_path, model__adapter__rank=4, **half)
    with torch.device('meta'):
        parameters = list(MODELS.build(config.model).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    text = dry_run(config)
    assert f'{frozen + trained:,} parameters, of which {trained:,} are trained' in text
    states, weights = (f'{size / 2**20:.1f} MiB' for size in (12 * trained, 2 * frozen))
    assert f'{states} masters and moments' in text and f'{weights} frozen weights' in text


def test_weights_in_four_bits_need_what_a_run_asks_for(tmp_path: Path, monkeypatch) -> None:
    four = dict(model__adapter=dict(rank=4, four_bit=True))
    saving = dict(default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=4))
    monkeypatch.setattr('internlm_mm.parallel.adapters.obstacles', lambda *_: [])  # as installed
    with pytest.raises(ValueError, match='set load_from to the weights that they belong to'):
        dry_run(tiny_config(tmp_path, **four, **saving))
    assert 'everything fits together' in dry_run(tiny_config(tmp_path, **four))
    with pytest.raises(ValueError, match=r'does not go with strategy\.offload=True'):
        dry_run(tiny_config(tmp_path, strategy__offload=True, **four))


def test_packed_rows_are_refused_as_in_a_run(tmp_path: Path, monkeypatch) -> None:
    def whole_rows(q, k, v, documents):
        raise AssertionError('the first step would be too late')

    monkeypatch.setitem(ATTENTIONS.module_dict, 'whole_rows', whole_rows)
    whole_rows.needs, whole_rows.needs_mask = Needs(packed=False), False
    options = dict(strategy__attention='whole_rows', default_hooks={})
    message = r"strategy\.attention='whole_rows' takes one document a row, train_dataloader"
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_config(tmp_path / 'a', **options))
    with pytest.raises(ValueError, match=message):
        tiny_runner(tmp_path / 'b', **options).train()


def test_a_budget_is_for_a_number_of_gpus(tmp_path: Path) -> None:
    text = dry_run(tiny_config(tmp_path, strategy__recompute=dict(budget_gib=0.01)))
    assert "{'budget_gib': 0.01} was not tried: --rehearse N tells" in text
    assert text.endswith('dry run: all else fits together, nothing was trained')
