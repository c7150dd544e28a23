"""Equality with transformers' Llama: logits, and the gradient of every parameter."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.models import InternLM, Llama
from tests.test_models.helpers import SIZES, make_batch, randomize

CASES = {
    'InternLM': (InternLM, {}),
    'Llama': (Llama, {}),
    'Llama-grouped': (Llama, dict(num_kv_heads=2, head_dim=16, rope_theta=500_000.0)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def pair(request):
    family, options = request.param
    ours = randomize(family(**SIZES, **options))
    config = ours.hf_config()
    config.pop('architectures')
    theirs = LlamaForCausalLM(LlamaConfig(**config, attn_implementation='eager'))
    theirs.load_state_dict({hf_name(ours, n): p.detach() for n, p in ours.named_parameters()})
    return ours, theirs


def hf_name(model, name):
    return next(
        their + name.removeprefix(our)
        for our, their in model.hf_names.items()
        if name.startswith(our)
    )


def test_logits_and_every_gradient(pair):
    ours, theirs = pair
    batch = make_batch([[50], [50]])
    logits = theirs(batch.input_ids).logits
    difference = (ours.logits(batch.input_ids) - logits).abs().max()
    assert difference <= 1e-5 * max(1.0, logits.abs().max())
    ours(batch)['loss'].backward()
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction='sum'
    ).backward()
    wanted = dict(theirs.named_parameters())
    assert len(wanted) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        grad = wanted[hf_name(ours, name)].grad
        error = (parameter.grad - grad).norm() / grad.norm()
        assert error <= 1e-5, f'{name}: {error:.1e}'


def test_config_survives_transformers(pair):
    ours, theirs = pair
    config = theirs.config.to_dict() | {'architectures': ['LlamaForCausalLM']}
    again = type(ours)(**type(ours).from_hf_config(config))
    assert again.hf_config() == ours.hf_config()


def config_of(family=Llama, **changes):
    with torch.device('meta'):
        return family(**SIZES).hf_config() | changes


@pytest.mark.parametrize(
    ('family', 'changes', 'message'),
    [
        (Llama, dict(attention_bias=True), 'Llama has attention_bias=False, not True'),
        (InternLM, dict(attention_bias=False), 'InternLM has attention_bias=True, not False'),
        (Llama, dict(tie_word_embeddings=True), 'tie_word_embeddings=False'),
        (Llama, dict(hidden_act='gelu'), "hidden_act='silu', not 'gelu'"),
        (Llama, dict(rope_parameters={'rope_type': 'llama3'}), "rope_type='default', not 'llama3'"),
        (Llama, dict(architectures=['GPT2LMHeadModel']), 'GPT2LMHeadModel'),
        (InternLM, dict(num_key_value_heads=2), 'num_key_value_heads=4, not 2'),
        (InternLM, dict(head_dim=16), 'head_dim'),
    ],
)
def test_what_a_family_does_not_do(family, changes, message):
    with pytest.raises(ValueError, match=message):
        family.from_hf_config(config_of(family, **changes))


def test_configs_of_before_transformers_5():
    config = config_of(rope_theta=5000.0)
    del config['rope_parameters'], config['head_dim']
    sizes = Llama.from_hf_config(config | {'num_key_value_heads': None})
    assert (sizes['rope_theta'], sizes['head_dim'], sizes['num_kv_heads']) == (5000.0, 8, 4)
