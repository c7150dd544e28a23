from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm_mm.datasets import RandomPairs, RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import DPO, InternLM, Llama, LoRA
from internlm_mm.ops.cross_entropy import reference_linear_cross_entropy
from internlm_mm.parallel.recompute import recompute_layers, recomputed_layers
from internlm_mm.utils.flops import flops_per_token, model_flops


def test_internlm_7b_by_hand() -> None:
    """6 x parameters without the input embedding, + 12 or 6 x layers x width x sequence."""
    parameters = 7_321_948_160 - 103_168 * 4096
    flops = flops_per_token(parameters, num_layers=32, attention_width=4096, seq_len=4096)
    assert flops.full == 6 * 6_899_372_032 + 12 * 32 * 4096 * 4096 == 47_838_683_136
    assert flops.causal == 6 * 6_899_372_032 + 6 * 32 * 4096 * 4096 == 44_617_457_664


def test_torch_counts_the_same_in_the_matrix_products_of_a_step() -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4)
    model = InternLM(**sizes)
    rows = RandomTokens(vocab_size=96, seq_len=48)
    batch = collate_rows([rows[0], rows[1]])
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    flops = flops_per_token(matrices - 96 * 64, num_layers=3, attention_width=64, seq_len=48)
    for layer in model.layers.values():
        layer.self_attn.attend = plain_attention
    # The counter misses products that are written into a tensor given by `out`, as the loss does.
    model.objective.cross_entropy = reference_loss
    with FlopCounterMode(display=False) as counted:
        model(batch)['loss'].backward()
    assert counted.get_total_flops() == pytest.approx(flops.full * batch.num_tokens, rel=1e-12)


def test_torch_counts_the_same_where_layers_are_recomputed() -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=4, num_heads=4)
    rows = RandomTokens(vocab_size=96, seq_len=48)
    batch = collate_rows([rows[0]])
    counted = {}
    for share in (0.0, 0.5, 1.0):
        model = InternLM(**sizes)
        for layer in model.layers.values():
            layer.self_attn.attend = plain_attention
        model.objective.cross_entropy = reference_loss
        assert recompute_layers(model, share) == 4 * share
        assert recomputed_layers(model) == (4 * share, 4)
        with FlopCounterMode(display=False) as counter:
            model(batch)['loss'].backward()
        counted[share] = counter.get_total_flops() / batch.num_tokens
    flops = model_flops(model, 48)
    # Vectors (biases, norms) are parameters to the formula and no products to the counter.
    vectors = 2 * sum(p.numel() for p in model.layers.parameters() if p.ndim == 1)
    for share in (0.5, 1.0):
        full, causal = flops.with_recomputation(share)
        assert full - flops.full == counted[share] - counted[0.0] + share * vectors
        assert full - causal == (6 + 2 * share) * 4 * 64 * 48
    assert flops.with_recomputation(0.0) == (flops.full, flops.causal)


@pytest.mark.parametrize(
    'target, below, share',
    [('*_proj', 0, 0.0), ('*_proj', 0, 1.0), ('layers.[23].*_proj', 2, 0.0)],
)
def test_torch_counts_the_same_where_weights_are_frozen(
    target: str, below: int, share: float
) -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=4, num_heads=4)
    rows = RandomTokens(vocab_size=96, seq_len=48)
    batch = collate_rows([rows[0]])
    model = LoRA(rank=4, targets=[target]).apply(InternLM(**sizes, attention_bias=False))
    for layer in model.layers.values():
        layer.self_attn.attend = plain_attention
    model.objective.cross_entropy = reference_loss
    recompute_layers(model, share)
    with FlopCounterMode(display=False) as counter:
        model(batch)['loss'].backward()
    flops = model_flops(model, 48)
    # Norms are parameters to the formula, frozen ones, and no products to the counter.
    norms = 2 * 64 * (2 * 4 + 1) + 2 * 64 * (2 * (4 - below) + 1) + share * 2 * 64 * 2 * 4
    full, causal = flops.with_recomputation(share)
    assert full - norms == counter.get_total_flops() / batch.num_tokens
    assert full - causal == (6 + 2 * share) * 4 * 64 * 48 - 4 * below * 64 * 48
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.trained_share == trained / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('tied', [False, True])
def test_torch_counts_the_same_of_a_model_that_is_asked_without_adapters(tied: bool) -> None:
    """What DPO's second forward adds, against a batch that knows already what it would find."""
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=4, num_heads=4)
    batch = collate_rows([RandomPairs(vocab_size=96, seq_len=48)[0]])
    model = LoRA(rank=4).apply(Llama(**sizes, tie_word_embeddings=tied, objective=DPO()))
    for layer in model.layers.values():
        layer.self_attn.attend = plain_attention
    counted, flops = [], []
    for references in (torch.zeros(1, batch.cu_seqlens.shape[1] - 1), None):
        with FlopCounterMode(display=False) as counter:
            model(replace(batch, references=references))['loss'].backward()
        counted.append(counter.get_total_flops() / batch.num_tokens)
    for reference in ('precomputed', 'adapters_off'):
        model.objective.reference = reference
        flops.append(model_flops(model, 48))
    norms = 2 * 64 * (2 * 4 + 1)
    assert flops[1].full - flops[0].full == counted[1] - counted[0] + norms
    attention = flops[1].full - flops[1].causal - (flops[0].full - flops[0].causal)
    assert attention == 2 * 4 * 64 * 48


def test_a_tied_head_is_computed_all_the_same() -> None:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4)
    apart, tied = Llama(**sizes), Llama(**sizes, tie_word_embeddings=True)
    assert model_flops(tied, 48) == model_flops(apart, 48)


def reference_loss(hidden, weight, labels, label_smoothing, chunk):
    return reference_linear_cross_entropy(hidden, weight, labels, label_smoothing)


def plain_attention(q, k, v, documents):
    """Two batched products, which the counter knows on every device."""
    rows, seq, heads, width = q.shape
    q, k, v = (x.transpose(1, 2).reshape(rows * heads, seq, width) for x in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).reshape(rows, heads, seq, width).transpose(1, 2)
