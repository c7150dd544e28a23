import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm_mm.models import InternLM
from internlm_mm.parallel import HybridParallelStrategy
from internlm_mm.parallel.initialize import initialize_parameters

MODEL = dict(
    type=InternLM, vocab_size=301, hidden_size=64, intermediate_size=99, num_layers=4, num_heads=4
)  # odd, so that two ranks cannot halve every tensor


def placed(
    parallel: dict, seed: int = 5, model: dict = MODEL, **options: object
) -> dict[str, Tensor]:
    """Whole weights as a strategy makes them from nothing; of a pipeline, those held here."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = HybridParallelStrategy(
            parallel=parallel,
            work_dir=folder,
            experiment_name=folder.replace('/', '_'),
            env_kwargs={'launcher': 'none', 'randomness': {'seed': seed}},
            log_kwargs={'log_level': 'WARNING'},
            **options,
        )
        built = strategy.prepare(dict(model))
    values = {name: p.detach() for name, p in built.named_parameters()}
    return {n: v.full_tensor() if hasattr(v, 'full_tensor') else v for n, v in values.items()}


def assert_start_equal(ranks: list[dict], alone: dict[str, Tensor]) -> None:
    """Each weight is somewhere, and wherever it is it has the same bits."""
    assert set().union(*ranks) == alone.keys()
    for together in ranks:
        for name, value in together.items():
            assert value.dtype == alone[name].dtype, name
            assert torch.equal(value, alone[name]), name


@pytest.mark.parametrize(
    'options',
    [
        {'parallel': {'data_shard': 2}},
        {'parallel': {'data_replicate': 2}},
        {'parallel': {'context': 2}},
        {'parallel': {'pipeline': 2}},
        {'parallel': {'pipeline': 2}, 'pipeline': {'schedule': 'zbv_zero_bubble'}},
        {'parallel': {'data_shard': 2}, 'precision': {'param': 'bfloat16'}},
        {'parallel': {'data_shard': 2}, 'reshard': 'never', 'recompute': 0.5},
        {'parallel': {'data_shard': 2}, 'offload': True},
    ],
    ids=str,
)
def test_one_and_two_ranks_start_equal(two_ranks, options: dict) -> None:
    ranks = two_ranks(placed, **options)
    assert_start_equal(ranks, placed({}))
    if 'pipeline' in options['parallel']:
        assert not ranks[0].keys() & ranks[1].keys()
    else:
        assert ranks[0].keys() == ranks[1].keys()


def test_split_matrices_start_equal(two_ranks) -> None:
    even = MODEL | {'vocab_size': 302, 'intermediate_size': 98}
    assert_start_equal(two_ranks(placed, {'tensor': 2}, model=even), placed({}, model=even))


def test_float64_starts_with_the_same_numbers(two_ranks) -> None:
    wide = {name: value.double() for name, value in placed({}).items()}
    precision = {'param': 'float64', 'reduce': 'float64'}
    assert_start_equal([placed({}, precision=precision)], wide)
    assert_start_equal(two_ranks(placed, {'data_shard': 2}, precision=precision), wide)


def test_one_process_in_half_precision_starts_equal() -> None:
    try:
        assert_start_equal([placed({}, precision={'param': 'bfloat16'})], placed({}))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_as_the_family_declares() -> None:
    weights = placed({})
    for name, value in weights.items():
        if name.endswith('.bias'):
            assert torch.count_nonzero(value) == 0, name
        elif 'norm' in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            std = 0.0052 if name in ('embed_tokens.weight', 'lm_head.weight') else 0.006
            if name.split('.')[-2] in ('o_proj', 'down_proj'):
                std /= (2 * (int(name.split('.')[1]) + 1)) ** 0.5
            # The standard deviation of n draws is known to about 1 / sqrt(2 n).
            assert value.std().item() == pytest.approx(std, rel=4 / (2 * value.numel()) ** 0.5), (
                name
            )
            assert abs(value.mean().item()) < 4 * std / value.numel() ** 0.5, name


def test_no_two_tensors_share_their_numbers() -> None:
    matrices = [value.reshape(-1)[:50] for value in placed({}).values() if value.ndim == 2]
    for index, one in enumerate(matrices):
        for two in matrices[:index]:
            assert abs(torch.corrcoef(torch.stack((one, two)))[0, 1]) < 0.6


def test_the_seed_decides_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = placed({}, seed=8)['layers.2.mlp.up_proj.weight']
    torch.manual_seed(2)
    again = placed({}, seed=8)['layers.2.mlp.up_proj.weight']
    other = placed({}, seed=9)['layers.2.mlp.up_proj.weight']
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_tensor_keeps_its_numbers_when_the_model_grows() -> None:
    sizes = {key: value for key, value in MODEL.items() if key != 'type'}
    small, large = InternLM(**sizes), InternLM(**{**sizes, 'num_layers': 6})
    for model in (small, large):
        initialize_parameters(model, 5)
    for name, value in small.named_parameters():
        assert torch.equal(value, dict(large.named_parameters())[name]), name
