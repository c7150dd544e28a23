"""The first generation, as transformers computes its Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from internlm_mm.checkpoint.remote_code.configuration_internlm import InternLMConfig
from internlm_mm.checkpoint.remote_code.modeling_internlm import (
    InternLMForCausalLM,
    InternLMForSequenceClassification,
)
from internlm_mm.models.hf_layouts import to_internlm_config
from tests.test_checkpoint.test_remote_code.behaviour import (
    LONGER,
    check_embeddings,
    check_generation,
    check_recomputing,
    check_saving,
    llama_model,
    logits_and_gradients,
)
from tests.test_models.test_hf_layouts import ROPES, llama


def build(weights_of=None, **changes) -> InternLMForCausalLM:
    model = InternLMForCausalLM(InternLMConfig(**to_internlm_config(llama(**changes))))
    model.load_state_dict((weights_of or llama_model(**changes)).state_dict())
    return model.eval()


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
@pytest.mark.parametrize('bias', [True, False])
def test_equals_llama(rope, bias):
    changes = dict(rope_parameters=rope, attention_bias=bias)
    wanted = llama_model(**changes)
    model = build(wanted, **changes)
    ids = torch.randint(512, (2, LONGER))
    logits, gradients = logits_and_gradients(wanted, ids)
    ours, our_gradients = logits_and_gradients(model, ids)
    assert torch.equal(ours, logits)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(our_gradients[name], gradient), name


def test_generation():
    check_generation(build())


def test_recomputing():
    check_recomputing(build())


def test_saving(tmp_path):
    check_saving(build(), tmp_path)


def test_embeddings():
    check_embeddings(build())


def test_classifier():
    wanted = LlamaForSequenceClassification(
        LlamaConfig(num_labels=3, **llama(dtype='float32'))
    ).eval()
    config = InternLMConfig(num_labels=3, **to_internlm_config(llama()))
    model = InternLMForSequenceClassification(config).eval()
    model.load_state_dict(wanted.state_dict())
    ids = torch.randint(3, 512, (2, 9))
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert model(ids, labels=torch.tensor([0, 2])).loss > 0


def test_prompt(internlm_tokenizer):
    history = [('hi', 'hello'), ('how?', 'so')]
    text = internlm_tokenizer.decode(
        build().build_inputs(internlm_tokenizer, 'and now?', history).input_ids[0]
    )
    assert text == (
        '<s><|User|>:hi<eoh>\n<|Bot|>:hello<eoa>\n'
        '<|User|>:how?<eoh>\n<|Bot|>:so<eoa>\n'
        '<|User|>:and now?<eoh>\n<|Bot|>:'
    )


def test_prompt_with_a_system(internlm_tokenizer):
    inputs = build().build_inputs(internlm_tokenizer, 'hi', [], 'Be kind.')
    text = internlm_tokenizer.decode(inputs.input_ids[0])
    assert text == '<s><|System|>:Be kind.\n<|User|>:hi<eoh>\n<|Bot|>:'
