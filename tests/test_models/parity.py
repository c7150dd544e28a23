"""Comparison with a model of transformers: logits, the gradient of every parameter, decoding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.test_models.helpers import make_batch, randomize

THEIRS = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    attn_implementation='eager',
)
"""What transformers calls the sizes of `helpers.SIZES`."""


def llama_name(name: str) -> str:
    """The name of one of our parameters in most models of transformers."""
    return name if name.startswith('lm_head.') else f'model.{name}'


def fill(ours: nn.Module, theirs: nn.Module) -> None:
    """Random weights for ours, biases and norms included, and the same ones for theirs."""
    randomize(ours)
    state = {llama_name(name): p.detach() for name, p in ours.named_parameters()}
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert not extra
    assert missing == (['lm_head.weight'] if ours.tie_word_embeddings else [])


def assert_same(
    ours: Any,
    theirs: Any,
    length: int = 50,
    gradients: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Compare logits and gradients on rows of one document of `length` tokens.

    Args:
        ours: With the weights of theirs.
        theirs: Of transformers.
        length: Tokens of a row.
        gradients: Theirs by our names, where names are not Llama's.
    """
    batch = make_batch([[length], [length]])
    logits = theirs(batch.input_ids, use_cache=False).logits
    difference = (ours.logits(batch.input_ids) - logits).abs().max()
    assert difference <= 1e-5 * max(1.0, logits.abs().max())
    assert logits.std() > 0.1  # or little would matter
    ours(batch)['loss'].backward()
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction='sum'
    ).backward()
    wanted = (gradients or _llama_gradients)(theirs)
    assert wanted.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        size = wanted[name].norm()
        assert size > 0, name
        error = (parameter.grad - wanted[name]).norm() / size
        assert error <= 2e-5, f'{name}: {error:.1e}'


def _llama_gradients(theirs: nn.Module) -> dict[str, Tensor]:
    named = theirs.named_parameters()
    return {name.removeprefix('model.'): parameter.grad for name, parameter in named}


@torch.no_grad()
def assert_decodes(ours: Any, length: int = 12, start: int = 5) -> None:
    """Compare the logits of tokens that come one by one, after `start`, with those of a row."""
    ids = make_batch([[length], [length]]).input_ids
    whole = ours.logits(ids)
    cache = ours.make_cache(2, length)
    parts = [ours.logits(ids[:, :start], cache=cache)]
    parts += [ours.logits(ids[:, i : i + 1], cache=cache) for i in range(start, length)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
