"""Choosing tokens, against transformers' own processors of logits."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internlm_mm.inference.sampling import Sampling, SeenTokens, draw, probabilities

ROWS, VOCAB = 16, 500


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize(
    'options',
    [
        dict(temperature=1.0),
        dict(temperature=0.3),
        dict(temperature=1.7, top_k=1),
        dict(temperature=1.7, top_k=40),
        dict(temperature=0.8, top_k=VOCAB + 1),
        dict(temperature=1.0, top_p=0.9),
        dict(temperature=2.5, top_p=0.3),
        dict(temperature=1.0, top_p=1e-4),
        dict(temperature=1.4, top_k=30, top_p=0.8),
        dict(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2),
        dict(temperature=1.0, repetition_penalty=0.7),
    ],
    ids=str,
)
def test_probabilities_equal_transformers(logits, options):
    sampling = Sampling(**options)
    held = torch.randint(VOCAB, (ROWS, 60), generator=torch.Generator().manual_seed(1))
    theirs = logits
    if sampling.repetition_penalty != 1:
        theirs = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(held, theirs)
    theirs = TemperatureLogitsWarper(sampling.temperature)(held, theirs)
    if sampling.top_k is not None:
        theirs = TopKLogitsWarper(sampling.top_k)(held, theirs)
    if sampling.top_p < 1:
        theirs = TopPLogitsWarper(sampling.top_p)(held, theirs)
    seen = SeenTokens(held, VOCAB, sampling.repetition_penalty)
    ours = probabilities(seen.penalise(logits), sampling)
    expected = theirs.softmax(-1)
    assert torch.equal(ours > 0, expected > 0)
    # The same operations on the same numbers, but for the order of a sum: a few times 2^-24.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_seen_tokens_are_added_as_they_come(logits):
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    held = torch.randint(VOCAB, (ROWS, 20), generator=torch.Generator().manual_seed(1))
    seen = SeenTokens(held[:, :5], VOCAB, 1.5)
    for end in range(6, 21):
        seen.add(held[:, end - 1 : end])
        assert torch.equal(seen.penalise(logits), penalty(held[:, :end], logits))


def test_draw_follows_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        tokens = draw(logits, Sampling(**options), generator)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    def near(expected, **options):
        expected = torch.tensor(expected)
        # 20,000 draws: four standard deviations are at most 0.0142.
        torch.testing.assert_close(
            frequencies(**options), expected / expected.sum(), rtol=0, atol=0.0142
        )

    near([0.5, 0.3, 0.15, 0.05], temperature=1.0)
    near([0.25, 0.09, 0.0225, 0.0025], temperature=0.5)
    near([0.5, 0.3, 0.0, 0.0], temperature=1.0, top_k=2)
    near([0.5, 0.3, 0.0, 0.0], temperature=1.0, top_p=0.8)
    near([0.5, 0.3, 0.15, 0.0], temperature=1.0, top_p=0.81)
    near([1.0, 0.0, 0.0, 0.0], temperature=1.0, top_p=0.01)
    assert frequencies(temperature=0.0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    'extreme',
    [
        dict(temperature=1e-6),
        dict(temperature=1e6),
        dict(temperature=1e-6, repetition_penalty=1e-6),
        dict(temperature=1e-6, repetition_penalty=1e6),
        dict(temperature=1.0, seed=-(2**63)),
        dict(temperature=1.0, seed=2**64 - 1),
    ],
    ids=str,
)
def test_whatever_is_in_range_can_be_drawn_from(logits, extreme):
    sampling = Sampling(**extreme)
    generator = torch.Generator()
    generator.manual_seed(sampling.seed or 0)
    seen = SeenTokens(torch.arange(VOCAB).expand(ROWS, -1), VOCAB, sampling.repetition_penalty)
    assert draw(seen.penalise(logits), sampling, generator).shape == (ROWS,)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=1e-40),
        dict(temperature=float('nan')),
        dict(temperature=float('inf')),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=1e-40),
        dict(repetition_penalty=float('nan')),
        dict(seed=2**64),
        dict(stop='###'),
        dict(stop=('a', '')),
    ],
    ids=str,
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
