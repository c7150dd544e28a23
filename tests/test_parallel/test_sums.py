import torch

from internlm_mm.parallel.sums import add_up, reduce_all


def test_micro_batches() -> None:
    sums = [{'loss': torch.tensor(1.5), 'domain': torch.tensor([1.0, 0.0])}] * 2
    sums.append({'loss': torch.tensor(2.0), 'domain': torch.tensor([0.0, 3.0])})
    totals = add_up(sums)
    assert totals['loss'].item() == 5.0
    assert totals['domain'].tolist() == [2.0, 3.0]
    assert add_up([]) == {}


def reduced(rank_matters: bool) -> dict:
    offset = torch.distributed.get_rank() if rank_matters else 0
    found = reduce_all({'a': torch.tensor(2.0**24 - 1 + offset), 'b': torch.ones(2, 3) * offset})
    return {key: (value.dtype, value.tolist()) for key, value in found.items()}


def test_ranks(two_ranks) -> None:
    for found in two_ranks(reduced, True):
        assert found['a'] == (torch.float64, 2.0**25 - 1)  # more digits than float32 has
        assert found['b'] == (torch.float64, [[1.0] * 3] * 2)
