"""InternLM2, as transformers computes the Llama of the same weights, un-interleaved by hand."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from internlm_mm.checkpoint.remote_code.configuration_internlm2 import InternLM2Config
from internlm_mm.checkpoint.remote_code.modeling_internlm2 import (
    InternLM2ForCausalLM,
    InternLM2ForSequenceClassification,
)
from internlm_mm.models.hf_layouts import to_internlm2_config
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

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 8
NAMES = {
    'embed_tokens': 'tok_embeddings',
    'self_attn.o_proj': 'attention.wo',
    'mlp.gate_proj': 'feed_forward.w1',
    'mlp.down_proj': 'feed_forward.w2',
    'mlp.up_proj': 'feed_forward.w3',
    'input_layernorm': 'attention_norm',
    'post_attention_layernorm': 'ffn_norm',
    'lm_head': 'output',
}


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's tensors as InternLM2 has them: row by row, written out."""
    result = {}
    for name, tensor in tensors.items():
        if 'q_proj' in name:
            q, k, v = (tensors[name.replace('q_proj', f'{x}_proj')] for x in 'qkv')
            rows = []
            for group in range(KV_HEADS):
                for head in range(group * HEADS // KV_HEADS, (group + 1) * HEADS // KV_HEADS):
                    rows += [q[head * HEAD_DIM + channel] for channel in range(HEAD_DIM)]
                rows += [k[group * HEAD_DIM + channel] for channel in range(HEAD_DIM)]
                rows += [v[group * HEAD_DIM + channel] for channel in range(HEAD_DIM)]
            result[name.replace('self_attn.q_proj', 'attention.wqkv')] = torch.stack(rows)
        elif 'k_proj' not in name and 'v_proj' not in name:
            old = next((old for old in NAMES if old in name), name)
            result[name.replace(old, NAMES.get(old, old))] = tensor
    return result


def build(weights_of=None, attn_implementation='sdpa', **changes) -> InternLM2ForCausalLM:
    changes = dict(num_key_value_heads=KV_HEADS) | changes
    said = to_internlm2_config(llama(**changes))
    model = InternLM2ForCausalLM(InternLM2Config(attn_implementation=attn_implementation, **said))
    model.load_state_dict(packed((weights_of or llama_model(**changes)).state_dict()))
    return model.eval()


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_equals_llama(rope, bias, attention):
    changes = dict(
        rope_parameters=rope,
        attention_bias=bias,
        num_key_value_heads=KV_HEADS,
        attn_implementation=attention,
    )
    wanted = llama_model(**changes).double()
    model = build(wanted, **changes).double()
    assert model.config._attn_implementation == attention
    ids = torch.randint(512, (2, LONGER))
    logits, gradients = logits_and_gradients(wanted, ids)
    ours, our_gradients = logits_and_gradients(model, ids)
    torch.testing.assert_close(ours, logits)
    gradients = packed(gradients)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, msg=name)


def test_weights_that_are_tied():
    model = build(tie_word_embeddings=True)
    assert model.output.weight is model.model.tok_embeddings.weight


def test_hidden_states_and_attentions():
    changes = dict(num_key_value_heads=KV_HEADS, attn_implementation='eager')
    wanted = llama_model(**changes)
    model = build(wanted, **changes)
    ids = torch.randint(512, (1, 10))
    options = dict(output_hidden_states=True, output_attentions=True)
    ours, theirs = model(ids, **options), wanted(ids, **options)
    assert len(ours.hidden_states) == 3 and len(ours.attentions) == 2
    for a, b in zip(ours.hidden_states + ours.attentions, theirs[-2] + theirs[-1], strict=True):
        torch.testing.assert_close(a, b)


def test_generation():
    check_generation(build())


def test_recomputing():
    check_recomputing(build())


def test_saving(tmp_path):
    check_saving(build(), tmp_path)


def test_embeddings():
    check_embeddings(build())


def test_tables_of_names():
    """What transformers places by name names what is there."""
    model = build()
    names = [name for name, _ in model.named_modules()]
    for plan in (model._tp_plan, model._pp_plan, model._fsdp_plan):
        for name in plan:
            assert name.replace('*', '0') in names, name
    assert set(model._tied_weights_keys) == {'output.weight'}


def test_classifier():
    said = llama(num_key_value_heads=KV_HEADS, dtype='float32')
    wanted = LlamaForSequenceClassification(LlamaConfig(num_labels=3, **said)).eval()
    config = InternLM2Config(num_labels=3, **to_internlm2_config(said))
    model = InternLM2ForSequenceClassification(config).eval()
    model.load_state_dict(packed(wanted.state_dict()))
    ids = torch.randint(3, 512, (2, 9))
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits)


def test_prompt(internlm2_tokenizer):
    inputs = build().build_inputs(internlm2_tokenizer, 'and now?', [('hi', 'hello')], 'Be kind.')
    text = internlm2_tokenizer.decode(inputs.input_ids[0])
    assert text == (
        '<s><|im_start|>system\nBe kind.<|im_end|>\n'
        '<|im_start|>user\nhi<|im_end|>\n'
        '<|im_start|>assistant\nhello<|im_end|>\n'
        '<|im_start|>user\nand now?<|im_end|>\n'
        '<|im_start|>assistant\n'
    )


def test_prompt_of_its_own(internlm2_tokenizer):
    model = build()
    own = internlm2_tokenizer.decode(model.build_inputs(internlm2_tokenizer, 'hi').input_ids[0])
    assert 'InternLM' in own.partition('<|im_end|>')[0]
    without = model.build_inputs(internlm2_tokenizer, 'hi', meta_instruction='')
    assert 'system' not in internlm2_tokenizer.decode(without.input_ids[0])
