"""Log-probabilities out of packed rows against each request alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from internlm_mm.evaluation import LogProb, LogProbScorer
from internlm_mm.models import InternLM

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_seq_len=600
)


@pytest.fixture(scope='module')
def model():
    built = InternLM(**SIZES).double().eval()
    torch.manual_seed(1)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return built


def alone(model, request: LogProb) -> tuple[float, int, bool]:
    """Of one request, from all logits."""
    whole = torch.tensor([[*request.prompt.tolist(), *request.continuation.tolist()]])
    with torch.no_grad():
        scores = model.logits(whole)[0].log_softmax(-1)
    places = range(len(request.prompt), whole.shape[1])
    total = sum(scores[place - 1, whole[0, place]].item() for place in places)
    greedy = all(scores[place - 1].argmax() == whole[0, place] for place in places)
    return total, len(request.continuation), greedy


def requests_of(lengths: list[tuple[int, int]]) -> list[LogProb]:
    draw = np.random.default_rng(0)
    return [
        LogProb(draw.integers(32, size=first, dtype=np.int32),
                draw.integers(32, size=second, dtype=np.int32))
        for first, second in lengths
    ]  # fmt: skip


def scorer(model, **options) -> LogProbScorer:
    def evaluate(batches):
        (batch,) = batches
        with torch.no_grad():
            return model(batch)

    return LogProbScorer(evaluate, max_seq_len=600, **({'batch_size': 2} | options))


@given(some.lists(some.tuples(some.integers(1, 40), some.integers(1, 9)), min_size=1, max_size=30))
@settings(max_examples=15)
def test_equals_each_request_alone(model, lengths: list[tuple[int, int]]) -> None:
    asked = requests_of(lengths)
    for options in ({}, {'one_each': True}):
        for request, answer in zip(asked, scorer(model, **options)(asked), strict=True):
            total, count, greedy = alone(model, request)
            assert answer.log_prob == pytest.approx(total, rel=1e-9)
            assert (answer.num_tokens, answer.is_greedy) == (count, greedy)


def test_a_greedy_continuation_is_known(model) -> None:
    (request,) = requests_of([(5, 1)])
    with torch.no_grad():
        best = model.logits(torch.tensor([request.prompt.tolist()]))[0, -1].argmax().item()
    asked = [LogProb(request.prompt, np.array([token], np.int32)) for token in (best, best ^ 1)]
    assert [answer.is_greedy for answer in scorer(model)(asked)] == [True, False]


def test_ranks_share_rows_and_add_up(model) -> None:
    asked = requests_of([(100 + index, 3) for index in range(11)])
    whole = scorer(model)(asked)
    kept: list[list] = [[], []]

    def keep(rank: int):
        def evaluate(batches):
            with torch.no_grad():
                kept[rank].append((batches[0], model(batches[0])))
            return kept[rank][-1][1]

        return evaluate

    for rank in (0, 1):
        LogProbScorer(keep(rank), max_seq_len=600, batch_size=1, data_rank=rank, data_world_size=2)(
            asked
        )
    assert len(kept[0]) == len(kept[1]) > 1
    for (first, _), (second, _) in zip(*kept, strict=True):
        assert first.input_ids.shape == second.input_ids.shape
        assert first.num_domains == second.num_domains
    steps = iter([
        {key: ours[key] + theirs[key] for key in ours}
        for (_, ours), (_, theirs) in zip(*kept, strict=True)
    ])  # fmt: skip
    summed = LogProbScorer(
        lambda batches: next(steps), max_seq_len=600, batch_size=1, data_world_size=2
    )(asked)
    for one, other in zip(summed, whole, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, rel=1e-9)


def test_row_lengths_suit_the_layout(model) -> None:
    shapes = []

    def evaluate(batches):
        shapes.append(tuple(batches[0].input_ids.shape))
        with torch.no_grad():
            return model(batches[0])

    for multiple, lengths in ((1, (10, 1)), (12, (10, 1)), (12, (580, 9)), (1, (599, 1))):
        asked = requests_of([lengths])
        LogProbScorer(evaluate, max_seq_len=600, batch_size=1, multiple=multiple)(asked)
    assert shapes == [(1, 512), (1, 576), (1, 600), (1, 600)]
    assert LogProbScorer(evaluate, max_seq_len=100, batch_size=1, multiple=64).longest == 64


def test_what_cannot_be(model) -> None:
    assert scorer(model)([]) == []
    with pytest.raises(ValueError, match='has 601 tokens, rows have 600'):
        scorer(model)(requests_of([(600, 2)]))
    with pytest.raises(ValueError, match='task_batch_size=0 must be at least 1'):
        scorer(model, batch_size=0)
    with pytest.raises(ValueError, match='max_seq_len=600 is shorter than 1024'):
        scorer(model, multiple=1024)
    other = SimpleNamespace(evaluate=lambda batches: {'loss': torch.zeros(())})
    lost = LogProbScorer(other.evaluate, max_seq_len=600, batch_size=1)
    with pytest.raises(
        ValueError, match=r"sums no 'domain_loss'.*objective=dict\(type=NextToken\)"
    ):
        lost(requests_of([(3, 1)]))
