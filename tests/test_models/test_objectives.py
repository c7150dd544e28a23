"""The next-token objective against sums by hand."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from internlm_mm.models import InternLM, NextToken
from internlm_mm.registry import OBJECTIVES
from internlm_mm.structures import IGNORE_INDEX
from tests.test_models.helpers import SIZES, make_batch


def case(domains=0):
    batch = make_batch([[7, 5, 8], [20]], domains=domains)
    return torch.randn(2, 20, 16), torch.randn(128, 16), batch


def test_domains_add_up():
    hidden, weight, batch = case(domains=3)
    outputs = NextToken(chunk_tokens=7)(hidden, weight, batch)
    losses = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), batch.labels.flatten(), reduction='none'
    )
    for domain in range(3):
        here = (batch.domain_ids == domain).flatten()
        torch.testing.assert_close(outputs['domain_loss'][domain], losses[here].sum())
        count = (here & (batch.labels.flatten() != IGNORE_INDEX)).sum()
        assert outputs['domain_targets'][domain] == count
    torch.testing.assert_close(outputs['domain_loss'].sum(), outputs['loss'])
    assert outputs['domain_targets'].sum() == batch.num_targets
    assert not outputs['domain_loss'].requires_grad


def test_smoothing_is_for_training_only():
    hidden, weight, batch = case()
    objective = NextToken(label_smoothing=0.2)
    logits, labels = (hidden @ weight.T).flatten(0, 1), batch.labels.flatten()
    smooth = F.cross_entropy(logits, labels, reduction='sum', label_smoothing=0.2)
    plain = F.cross_entropy(logits, labels, reduction='sum')
    torch.testing.assert_close(objective(hidden, weight, batch)['loss'], smooth)
    torch.testing.assert_close(objective.eval()(hidden, weight, batch)['loss'], plain)


def test_chosen_by_name_in_a_config():
    model = InternLM(**SIZES, objective=dict(type='NextToken', label_smoothing=0.1))
    assert model.objective.label_smoothing == 0.1
    assert isinstance(InternLM(**SIZES).objective, NextToken)
    built = OBJECTIVES.build(dict(type='NextToken', chunk_tokens=5))
    assert InternLM(**SIZES, objective=built).objective is built


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(label_smoothing=1.0), 'label_smoothing=1.0'),
        (dict(label_smoothing=-0.1), 'label_smoothing=-0.1'),
        (dict(chunk_tokens=0), 'chunk_tokens=0'),
    ],
)
def test_values_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        NextToken(**wrong)


def test_domains_need_the_losses_of_tokens():
    hidden, weight, batch = case(domains=3)
    objective = NextToken()
    objective.cross_entropy = lambda *arguments: (torch.zeros(()), None)
    with pytest.raises(ValueError, match=r"strategy\.kernels\.cross_entropy='torch'"):
        objective(hidden, weight, batch)
    hidden, weight, batch = case()
    assert set(objective(hidden, weight, batch)) == {'loss'}


def test_right_tokens_are_counted_in_evaluation_only():
    hidden, weight, batch = case(domains=3)
    objective = NextToken(chunk_tokens=7).eval()
    logits, labels = (hidden @ weight.T).flatten(0, 1), batch.labels.flatten().clone()
    labels[::3] = torch.where(labels[::3] == IGNORE_INDEX, labels[::3], logits.argmax(1)[::3])
    batch = dataclasses.replace(batch, labels=labels.view_as(batch.labels))
    right = logits.argmax(1) == labels
    assert 0 < right.sum() < batch.num_targets
    outputs = objective(hidden, weight, batch)
    assert outputs['correct'] == right.sum()
    for domain in range(3):
        here = (batch.domain_ids == domain).flatten()
        assert outputs['domain_correct'][domain] == (right & here).sum()
    assert not {'correct', 'domain_correct'} & set(objective.train()(hidden, weight, batch))
