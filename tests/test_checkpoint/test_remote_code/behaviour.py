"""What both modeling files must do, and the models they are compared with."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_models.test_hf_layouts import llama

LONGER = 160  # tokens; the longest that the models are made for is 128


def llama_model(attn_implementation='sdpa', **changes) -> LlamaForCausalLM:
    """transformers' own model, with weights of a size that makes every part of it matter."""
    config = LlamaConfig(attn_implementation=attn_implementation, **llama(**changes))
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def logits_and_gradients(model, ids, **kwargs):
    """Logits of a batch, and the gradient of its loss by name."""
    output = model(ids, labels=ids, **kwargs)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return output.logits.detach(), gradients


def check_generation(model) -> None:
    """Greedy generation is the same with a cache, without one, and in a left-padded batch."""
    rows = [torch.randint(3, 500, (length,)) for length in (9, 4)]
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    alone = [model.generate(row[None], **options)[0, len(row) :] for row in rows]
    uncached = model.generate(rows[0][None], use_cache=False, **options)
    assert torch.equal(uncached[0, 9:], alone[0])
    padded = torch.cat([torch.full((5,), 2), rows[1]])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    together = model.generate(torch.stack([rows[0], padded]), attention_mask=mask, **options)
    assert torch.equal(together[:, 9:], torch.stack(alone))


def check_recomputing(model) -> None:
    """Gradient checkpointing changes no gradient."""
    ids = torch.randint(500, (2, 20))
    _, plain = logits_and_gradients(model.train(), ids)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    model.zero_grad()
    # transformers renamed it in 5.23.
    new = hasattr(model, 'activation_checkpointing_enable')
    getattr(model, f'{"activation" if new else "gradient"}_checkpointing_enable')()
    runs = []
    layer = model.model.layers[0]
    next(layer.children()).register_forward_hook(lambda *_: runs.append(1))
    _, recomputed = logits_and_gradients(model, ids, use_cache=False)
    assert len(runs) == 2
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def check_saving(model, folder) -> None:
    """save_pretrained and from_pretrained give the same model, bit by bit."""
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    ids = torch.randint(500, (1, 20))
    assert torch.equal(model(ids).logits, again(ids).logits)


def check_embeddings(model) -> None:
    """Both tables are found and grow together."""
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(520)
    assert model.get_input_embeddings().weight.shape == (520, 64)
    assert model.get_output_embeddings().weight.shape == (520, 64)
    assert torch.equal(model.get_input_embeddings().weight[:512], old)
    assert model(torch.tensor([[515]])).logits.shape == (1, 1, 520)
