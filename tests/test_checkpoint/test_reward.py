"""Reward models in Hugging Face's form; that scores are equal is in tests/test_alignment.py too."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from internlm_mm.checkpoint.huggingface import export_hf, find_form, verify_scores
from internlm_mm.checkpoint.reward import WithScore, has_score, scored_config, scored_layout
from internlm_mm.models import InternLM, InternLM2, Llama, Mistral, Qwen2, Qwen3
from tests.test_models.helpers import SIZES, randomize

REWARD = dict(type='PairwiseReward')
IDS = torch.arange(1, 31).reshape(2, 15)


def state_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('family', [InternLM, InternLM2, Llama, Mistral, Qwen2, Qwen3])
def test_transformers_scores_alike(family, tmp_path) -> None:
    model = randomize(family(**SIZES, objective=REWARD), 0.2)
    with torch.device('meta'):
        empty = family(**SIZES, objective=REWARD)
    difference = export_hf(empty, state_of(model), tmp_path / 'hf', dtype='float32')
    assert difference < 1e-4
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'hf').eval()
    assert [type(theirs).__name__] == config['architectures']
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        wanted = theirs(IDS).logits.squeeze(1)
        hidden = model.hidden_states(IDS, torch.arange(15).expand(2, -1))
        torch.testing.assert_close(
            model.objective.score(hidden[:, -1]).squeeze(1), wanted, rtol=1e-4, atol=1e-5
        )
    with torch.no_grad():
        theirs.score.weight.mul_(1.01)
    theirs.save_pretrained(tmp_path / 'other')
    with pytest.raises(ValueError, match=r'scores of \w+ForSequenceClassification differ from'):
        verify_scores(model, tmp_path / 'other', IDS.tolist())


def test_only_forms_of_transformers() -> None:
    form = find_form(InternLM2(**SIZES), 'internlm2')
    with pytest.raises(ValueError, match=r"format='internlm2'.*use format='llama'"):
        scored_config(form, {'auto_map': {}})
    layout = find_form(InternLM(**SIZES), None).layout(4, 4)
    assert scored_layout(layout).stored('objective.score.weight').name == 'score.weight'


def test_weights_with_a_score_and_no_head() -> None:
    base = {'norm.weight': 1, 'lm_head.weight': 2}
    found = WithScore(base, {'q.lora_A.weight': 4, 'objective.score.weight': 3})
    assert dict(found) == {'norm.weight': 1, 'objective.score.weight': 3} and len(found) == 2
    assert 'lm_head.weight' not in found
    own = {'norm.weight': 1, 'objective.score.weight': 3}
    assert dict(WithScore(own, own)) == own
    assert has_score(Llama(**SIZES, objective=REWARD)) and not has_score(Llama(**SIZES))
