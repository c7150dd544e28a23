"""Configs made small."""

import pytest
from mmengine.config import Config

from internlm_mm.utils.config import dump_config, load_config
from internlm_mm.utils.config_check import check_config
from internlm_mm.verify.layouts import Case, default_cases, parse_case
from internlm_mm.verify.shrink import (
    alike,
    default_precision,
    micro_batches,
    rows_of_a_step,
    shrink,
    shrink_model,
    with_precision,
)
from tests.helpers import TINY

FOUR = default_cases(4, 'cpu')


def test_the_7b_config() -> None:
    small = shrink(load_config('internlm_7b_pretrain'), FOUR, 'cpu', random_data=False)
    assert small.model == {
        'type': 'internlm_mm.models.InternLM',
        'vocab_size': 103_168,  # the data's
        'hidden_size': 32,
        'intermediate_size': 88,  # 86 would not divide by 4, as 11008 does
        'num_layers': 8,  # two a stage of the deepest pipeline
        'num_heads': 4,
        'max_seq_len': 32,
    }
    dataset = small.dataset['dataset']
    assert dataset['type'] == 'internlm_mm.datasets.PretrainDataset'
    assert (dataset['seq_len'], dataset['min_document_length']) == (4096, 32)
    assert small.dataset['seq_len'] == 32
    assert small.config['strategy']['precision'] == {'param': 'bfloat16', 'reduce': 'float32'}
    assert default_precision(small.config['strategy']) == 'bfloat16'
    assert small.notes == ['strategy.compile=True is left out on the CPU']
    assert (small.betas, small.weight_decay, small.max_norm) == ((0.9, 0.95), 0.1, 1.0)


def test_on_gpus_layers_are_compiled() -> None:
    small = shrink(load_config('internlm_7b_pretrain'), FOUR, 'cuda', random_data=False)
    assert small.config['strategy']['compile'] is True and not small.notes
    assert small.config['randomness'] == {'seed': 1024, 'deterministic': False}


def test_random_data() -> None:
    small = shrink(load_config('internlm_7b_pretrain'), FOUR, 'cpu', random_data=True)
    assert small.dataset['dataset'] == {
        'type': 'internlm_mm.datasets.RandomTokens',
        'vocab_size': 103_168,
        'seq_len': 32,
        'document_lengths': [5, 10, 17],
    }


def test_the_small_config_is_a_config(tmp_path) -> None:
    path = tmp_path / 'small.json'
    small = shrink(load_config(TINY), FOUR, 'cpu', random_data=False)
    path.write_text(dump_config(Config(small.config))[1])
    check_config(load_config(path))


def test_everything_else_is_kept() -> None:
    options = {
        'strategy.recompute': 0.5,
        'strategy.attention': 'varlen',
        'strategy.reshard': 'layer',
        'strategy.parallel': {'tensor': 8},
        'custom_hooks': [{'type': 'GarbageCollectionHook'}],
        'optim_wrapper.clip_grad': None,
    }
    small = shrink(load_config(TINY, options), FOUR, 'cpu', random_data=False)
    assert small.config['strategy'] == {
        'type': 'internlm_mm.parallel.HybridParallelStrategy',
        'recompute': 0.5,
        'attention': 'auto',
        'reshard': 'layer',
    }
    assert len(small.notes) == 2 and small.max_norm is None


def test_grouped_heads_stay_grouped() -> None:
    model = {'hidden_size': 4096, 'num_heads': 32, 'num_kv_heads': 8, 'head_dim': 128}
    small = shrink_model(model, FOUR, 32)
    assert (small['num_heads'], small['num_kv_heads'], small['head_dim']) == (8, 4, 8)
    assert small['hidden_size'] == 64


def test_positions_are_stretched_from_the_same_share_of_a_row() -> None:
    scaling = {'rope_type': 'dynamic', 'factor': 2.0, 'original_max_position_embeddings': 2048}
    model = {'num_layers': 2, 'max_seq_len': 8192, 'rope_scaling': scaling}
    small = shrink_model(model, FOUR, 32)
    assert small['max_seq_len'] == 32
    assert small['rope_scaling'] == scaling | {'original_max_position_embeddings': 8}
    assert scaling['original_max_position_embeddings'] == 2048  # the user's own is left alone
    linear = {'rope_type': 'linear', 'factor': 2.0}
    assert shrink_model(model | {'rope_scaling': linear}, FOUR, 32)['rope_scaling'] == linear
    assert shrink_model(model | {'rope_scaling': None}, FOUR, 32)['rope_scaling'] is None


@pytest.mark.parametrize(
    ('heads', 'processes', 'small'), [(3, 4, 3), (32, 4, 4), (40, 4, 4), (32, 2, 2), (1, 4, 1)]
)
def test_heads_divide_by_what_they_divided_by(heads: int, processes: int, small: int) -> None:
    cases = default_cases(processes, 'cpu')
    found = shrink_model({'hidden_size': heads * 8, 'num_heads': heads}, cases, 32)
    assert found['num_heads'] == small


@pytest.mark.parametrize(
    ('own', 'device', 'small'), [(128, 'cuda', 32), (80, 'cuda', 8), (128, 'cpu', 8)]
)
def test_heads_on_a_gpu_go_through_the_kernels_that_the_model_takes(
    own: int, device: str, small: int
) -> None:
    found = shrink_model({'hidden_size': 32 * own, 'num_heads': 32}, FOUR, 32, device)
    assert found == {'hidden_size': 4 * small, 'num_heads': 4}


def test_alike() -> None:
    assert [alike(11_008, 4, 86), alike(11_006, 4, 85), alike(7, 4, 30)] == [88, 86, 7]


@pytest.mark.parametrize('processes', [1, 2, 4, 8])
def test_every_rank_has_two_micro_batches_and_pipelines_are_full(processes: int) -> None:
    cases = default_cases(processes, 'cpu')
    rows = rows_of_a_step(cases)
    for case in cases:
        share, left = divmod(rows, case.data)
        size, rest = divmod(share, micro_batches(case))
        assert left == rest == 0 and size >= 2
        assert micro_batches(case) >= max(2, 2 * case.degree('pipeline'))
    assert rows_of_a_step([Case(), parse_case('data_shard=3')]) == 12


def test_precision() -> None:
    own = {'precision': {'param': 'bfloat16', 'reduce': 'bfloat16'}, 'attention': 'varlen'}
    assert with_precision(own, 'bfloat16') == own
    assert with_precision(own, 'float64') == {
        'precision': {'param': 'float64', 'reduce': 'float64'}, 'attention': 'auto',
    }  # fmt: skip
    assert with_precision({}, 'bfloat16')['precision'] == {'param': 'bfloat16', 'reduce': 'float32'}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'optim_wrapper.optimizer.type': 'SGD'}, 'plain torch.optim.AdamW'),
        ({'optim_wrapper.optimizer.amsgrad': True}, 'plain torch.optim.AdamW'),
        (
            {'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor'},
            'as DecayGroupsConstructor does',
        ),
        ({'train_dataloader': None}, 'train_dataloader is missing'),
        ({'train_dataloader.dataset.seq_len': None, 'model.max_seq_len': None}, 'how long'),
    ],
)
def test_what_cannot_be_verified(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrink(load_config(TINY, options), FOUR, 'cpu', random_data=False)
