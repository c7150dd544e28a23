"""The reward model against transformers' model for classification, and TRL's trainer."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

from internlm_mm.datasets.packing import collate_rows, untrained_row
from internlm_mm.models import InternLM, Llama, PairwiseReward
from internlm_mm.registry import MODELS
from internlm_mm.structures import IGNORE_INDEX
from tests.test_models.helpers import SIZES, make_batch, randomize
from tests.test_models.parity import THEIRS
from tests.test_models.test_preference import pairs_of, row_of, tokenizer_with_padding


def theirs_of(name: str) -> str:
    return 'score.weight' if name == 'objective.score.weight' else f'model.{name}'


def models(objective: PairwiseReward):
    ours = randomize(InternLM(**SIZES, objective=objective), 0.2)
    config = LlamaConfig(**THEIRS, attention_bias=True, num_labels=1, pad_token_id=0)
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.load_state_dict({theirs_of(n): p.detach() for n, p in ours.named_parameters()})
    return ours, theirs


def scores_of(theirs) -> torch.Tensor:
    """[pairs, 2], of conversations one by one."""
    return torch.stack(
        [
            torch.cat([theirs(torch.tensor([prompt + answer])).logits[0] for answer in answers])
            for row in pairs_of()
            for prompt, *answers in row
        ]
    )


@pytest.mark.parametrize('center', [0.0, 0.3])
def test_loss_gradients_and_measures(center: float) -> None:
    ours, theirs = models(PairwiseReward(center=center))
    rows = [row_of(pairs, domain=index % 2) for index, pairs in enumerate(pairs_of())]
    batch = collate_rows([*rows, untrained_row(rows[0])])
    found = ours(batch)
    found['loss'].backward()
    chosen, rejected = scores_of(theirs).unbind(1)
    losses = -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2
    losses.sum().backward()
    torch.testing.assert_close(found['loss'], losses.sum(), rtol=1e-5, atol=1e-5)
    for name, parameter in ours.named_parameters():
        wanted = theirs.get_parameter(theirs_of(name)).grad
        error = (parameter.grad - wanted).norm() / wanted.norm()
        assert error < 1e-4, f'{name}: {error:.1e}'
    wanted = {
        'rewards/chosen': chosen.sum(),
        'rewards/rejected': rejected.sum(),
        'rewards/margin': (chosen - rejected).sum(),
        'rewards/accuracy': (chosen > rejected).sum(),
        'domain_loss': torch.stack([losses[:2].sum() + losses[4], losses[2:4].sum()]),
        'domain_targets': torch.tensor([3, 2]),
    }
    assert found.keys() == wanted.keys() | {'loss'} and batch.num_targets == 5
    assert 0 < found['rewards/accuracy'] < 5
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value.detach().float(), rtol=1e-4, atol=1e-4)


def test_a_score_takes_the_place_of_the_head() -> None:
    model = Llama(**SIZES, tie_word_embeddings=True, objective=dict(type='PairwiseReward'))
    names = [name for name, _ in model.named_parameters()]
    assert names[-1] == 'objective.score.weight' and 'lm_head.weight' not in names
    assert model.get_parameter('objective.score.weight').shape == (1, 32)
    assert not model.tie_word_embeddings and 'lm_head' not in model.tensor_plan


def test_the_score_learns_beside_adapters() -> None:
    config = dict(type='InternLM', **SIZES, adapter=dict(type='LoRA', rank=2, targets=['*']))
    model = MODELS.build(config | dict(objective=dict(type='PairwiseReward')))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert 'objective.score.weight' in trained
    assert all('.lora_' in name for name in trained - {'objective.score.weight'})


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r'model\.objective\.center=-1'):
        PairwiseReward(center=-1)
    model = InternLM(**SIZES, objective=dict(type='PairwiseReward'))
    batch = make_batch([[10, 10]])
    assert (batch.labels != IGNORE_INDEX).any()
    with pytest.raises(ValueError, match='PairwiseReward compares two answers'):
        model(batch)


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.filterwarnings('ignore')  # of trl and what it imports
@pytest.mark.parametrize('center', [None, 0.2])
def test_it_is_what_trl_does(center, tmp_path) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    ours, theirs = models(PairwiseReward(center=center or 0.0))
    batch = collate_rows([row_of(pairs) for pairs in pairs_of()])
    found = ours(batch)
    (found['loss'] / 5).backward()
    pairs = [pair for row in pairs_of() for pair in row]
    trainer = RewardTrainer(
        theirs,
        args=RewardConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None,
            gradient_checkpointing=False, center_rewards_coefficient=center, disable_dropout=True,
        ),
        train_dataset=Dataset.from_list([dict(chosen='a b', rejected='a c')] * 5),
        processing_class=tokenizer_with_padding(),
    )  # fmt: skip
    inputs = trainer.data_collator(
        [dict(chosen_ids=p + c, rejected_ids=p + r) for p, c, r in pairs]
    )
    loss = trainer.compute_loss(theirs, inputs)
    loss.backward()
    torch.testing.assert_close(found['loss'].detach() / 5, loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in ours.named_parameters():
        wanted = theirs.get_parameter(theirs_of(name)).grad
        assert (parameter.grad - wanted).norm() / wanted.norm() < 1e-4, name
    metrics = {key: value[-1] for key, value in trainer._metrics['eval'].items()}
    assert found['rewards/accuracy'] / 5 == pytest.approx(metrics['accuracy'])
    assert found['rewards/margin'].item() / 5 == pytest.approx(metrics['margin'], rel=1e-4)
