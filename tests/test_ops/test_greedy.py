"""The likeliest tokens against argmax over all logits."""

import pytest
import torch

from internlm_mm.ops import VocabularyShard, greedy_tokens


@pytest.mark.parametrize('chunk', [1, 7, 1024, None])
def test_equals_argmax(chunk: int | None) -> None:
    hidden, weight = torch.randn(20, 8), torch.randn(33, 8)
    expected = (hidden @ weight.T).argmax(1)
    assert torch.equal(greedy_tokens(hidden, weight, chunk), expected)


def test_of_equal_tokens_the_first_wins_on_shards_too() -> None:
    hidden = torch.ones(3, 2)
    weight = torch.tensor([[0.0, 0], [1, 1], [0, 2], [2, 0], [2, 0], [-1, 0]])
    assert greedy_tokens(hidden, weight).tolist() == [1, 1, 1]
    # Two shards in one process: what each says of itself is looked up for the other.
    scores = (hidden @ weight.T).unflatten(1, (2, 3))
    best, first = scores.max(2)

    def other(shard: int) -> VocabularyShard:
        said = iter([best[:, 1 - shard], None])

        def largest(tensor: torch.Tensor) -> torch.Tensor:
            theirs = next(said)
            if theirs is None:  # the second question: whose token is the smallest
                whole = best.max(1).values
                has = best[:, 1 - shard] == whole
                theirs = -torch.where(has, first[:, 1 - shard] + 3 * (1 - shard), 6)
            return torch.maximum(tensor, theirs)

        return VocabularyShard(3 * shard, 6, lambda tensor: tensor, largest)

    for shard in (0, 1):
        part = weight[3 * shard : 3 * shard + 3]
        assert greedy_tokens(hidden, part, shard=other(shard)).tolist() == [1, 1, 1]
