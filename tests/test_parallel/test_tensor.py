"""Split matrices on two ranks against whole ones, in float64."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM, InternLM2, InternLM3, Llama, Mistral, Qwen2, Qwen3
from internlm_mm.ops import linear_cross_entropy
from internlm_mm.parallel.tensor import (
    STYLES,
    apply_tensor_parallel,
    gather_tokens,
    match_plan,
    sharded_cross_entropy,
    sharded_document_scores,
    sharded_greedy_tokens,
)
from internlm_mm.structures import IGNORE_INDEX
from tests.helpers import tiny_runner

SIZES = dict(
    vocab_size=22, hidden_size=16, intermediate_size=14, num_layers=2, num_heads=4, max_seq_len=16
)
NO_MESH = SimpleNamespace(size=lambda: 2)  # errors come before anything is asked of it


def mesh():
    return init_device_mesh('cpu', (2,), mesh_dim_names=('tensor',))


# ---------------------------------------------------------------------------------------- plans


def test_styles_by_hand() -> None:
    model = InternLM(**(SIZES | {'num_layers': 1}))
    found = match_plan(model, model.tensor_plan)
    layer = {
        'input_layernorm': 'sequence', 'self_attn': 'gather', 'self_attn.q_proj': 'column',
        'self_attn.k_proj': 'column', 'self_attn.v_proj': 'column', 'self_attn.o_proj': 'row',
        'post_attention_layernorm': 'sequence', 'mlp': 'gather', 'mlp.gate_proj': 'column',
        'mlp.up_proj': 'column', 'mlp.down_proj': 'row',
    }  # fmt: skip
    expected = {f'layers.0.{name}': style for name, style in layer.items()}
    assert found == {
        'embed_tokens': 'vocabulary', **expected, 'norm': 'gather_output', 'lm_head': 'head'
    }  # fmt: skip


def test_a_star_is_one_part_of_a_name() -> None:
    holder = nn.Module()
    holder.layers = nn.ModuleDict({'0': nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    assert match_plan(holder, {'layers.*': 'row'}) == {'layers.0': 'row'}
    assert match_plan(holder, {'layers.*.*': 'row', 'layers.*.1': 'column'}) == {
        'layers.0.0': 'row',
        'layers.0.1': 'column',
    }


def test_an_unknown_style() -> None:
    with pytest.raises(ValueError, match=r"InternLM\.tensor_plan\['norm'\]='colum'.*'column'"):
        match_plan(InternLM(**SIZES), {'norm': 'colum'})
    assert set(Qwen3.tensor_plan.values()) == set(STYLES)


def test_a_model_without_a_plan() -> None:
    with pytest.raises(ValueError, match=r'tensor=2: Linear has no `tensor_plan`'):
        apply_tensor_parallel(nn.Linear(2, 2), NO_MESH)


class Plain(nn.Module):
    """An objective that reads the head by itself."""

    def forward(self, hidden, head_weight, batch):
        return {'loss': F.cross_entropy((hidden @ head_weight.T).flatten(0, 1), batch.labels)}


def test_an_objective_without_the_seam() -> None:
    model = InternLM(**SIZES, objective=Plain())
    with pytest.raises(ValueError, match='objective Plain has no seam for split matrices'):
        apply_tensor_parallel(model, NO_MESH)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_parameters_that_the_plan_forgets() -> None:
    """Each rank would have a part of their gradient, and nobody would add it up."""
    model = InternLM(**SIZES)
    model.layers['1'].self_attn.v_norm = nn.RMSNorm(4)
    message = r"InternLM\.tensor_plan says nothing of 'layers\.1\.self_attn\.v_norm'"
    with pytest.raises(ValueError, match=message):
        apply_tensor_parallel(model, NO_MESH)


# ---------------------------------------------------------------------------------- whole models


def batch_of(rows: int):
    data = RandomTokens(vocab_size=22, seq_len=16, document_lengths=[3, 7], seed=4)
    return collate_rows([data[row] for row in range(rows)])


KINDS: dict[str, tuple[type[nn.Module], dict]] = {
    'InternLM': (InternLM, {}),
    'Llama': (Llama, dict(num_kv_heads=2)),
    'tied': (Llama, dict(num_kv_heads=2, tie_word_embeddings=True)),
    'InternLM2': (InternLM2, dict(num_kv_heads=2, attention_bias=True)),
    'InternLM3': (InternLM3, dict(num_kv_heads=2, head_dim=6)),
    'Mistral': (Mistral, dict(num_kv_heads=2)),
    'Qwen2': (Qwen2, dict(num_kv_heads=2)),
    'Qwen3': (Qwen3, dict(num_kv_heads=2, head_dim=6)),
    'Qwen3 tied': (Qwen3, dict(num_kv_heads=2, attention_bias=True, tie_word_embeddings=True)),
    'dynamic': (
        Llama,
        dict(
            rope_scaling=dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=4)
        ),
    ),
}


def model_of(kind: str) -> nn.Module:
    family, options = KINDS[kind]
    built = family(**SIZES, **options)
    generator = torch.Generator().manual_seed(6)
    for parameter in built.parameters():
        parameter.data.normal_(0.0, 0.4, generator=generator)
    return built.double()


def gradients_of(built: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = built(batch_of(2))['loss']
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in built.named_parameters()}


def split_gradients(kind: str) -> tuple[Tensor, dict[str, Tensor], dict[str, list[int]]]:
    built = model_of(kind)
    apply_tensor_parallel(built, mesh())
    widths = []
    built.layers['0'].mlp.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape))
    built.layers['0'].register_forward_pre_hook(lambda m, args: widths.append(args[0].shape))
    loss, gradients = gradients_of(built)
    assert widths == [(2, 8, 16), (2, 16, 16)]  # tokens are shared between layers, whole in them
    local = {name: list(p.to_local().shape) for name, p in built.named_parameters()}
    return loss, {name: grad.full_tensor() for name, grad in gradients.items()}, local


@pytest.mark.parametrize('kind', KINDS)
def test_every_gradient_of_a_split_model(two_ranks, kind: str) -> None:
    loss, expected = gradients_of(model_of(kind))
    for found_loss, found, local in two_ranks(split_gradients, kind):
        torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=0)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 1e-12 * gradient.norm(), name
            whole = gradient.numel()
            is_split = 'norm' not in name and name.split('.')[-2:] not in (
                ['o_proj', 'bias'],
                ['down_proj', 'bias'],
            )
            assert torch.Size(local[name]).numel() == (whole // 2 if is_split else whole), name


# ------------------------------------------------------------------------------------ single parts


def gathered_tokens() -> tuple[Tensor, Tensor]:
    axis = mesh()
    rank = axis.get_local_rank()
    whole = torch.arange(2 * 6 * 3, dtype=torch.float64).reshape(2, 6, 3)
    own = whole[:, 3 * rank : 3 * rank + 3].clone().requires_grad_()
    out = gather_tokens(own, axis)
    assert torch.equal(out, whole)
    # Each rank has its own idea of the gradient: what comes back is the sum of both, shared out.
    (out * whole.cos() * (1 + 10 * rank)).sum().backward()
    return own.grad, whole.cos()[:, 3 * rank : 3 * rank + 3] * 12


def test_gathered_tokens_share_the_summed_gradient(two_ranks) -> None:
    for gradient, expected in two_ranks(gathered_tokens):
        torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)


def case(tokens: int, vocab: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    if kind == 'first half':
        labels %= vocab // 2
    elif kind == 'second half':
        labels = labels % (vocab // 2) + vocab // 2
    elif kind == 'none':
        labels.fill_(IGNORE_INDEX)
    labels[::4] = IGNORE_INDEX
    return 3 * draw(tokens, 5), draw(vocab, 5), labels


CASES = [
    # tokens, vocabulary, labels, smoothing, chunk
    (17, 10, 'all', 0.0, 1024),
    (17, 10, 'all', 0.1, 4),
    (17, 10, 'first half', 0.0, 5),
    (17, 10, 'second half', 0.3, 5),
    (17, 10, 'none', 0.1, 17),
    (1, 2, 'all', 0.0, 1),
    (6, 2, 'second half', 0.9, 1),
]


def sharded_losses() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    axis, found = mesh(), []
    for tokens, vocab, kind, smoothing, chunk in CASES:
        hidden, weight, labels = case(tokens, vocab, kind)
        hidden.requires_grad_()
        split = distribute_tensor(weight, axis, [Shard(0)]).requires_grad_()
        loss, losses = sharded_cross_entropy(hidden, split, labels, smoothing, chunk, mesh=axis)
        assert not losses.requires_grad
        (2 * loss).backward()
        assert split.grad.placements == (Shard(0),)
        found.append((loss.detach(), losses, hidden.grad, split.grad.full_tensor()))
    return found


def test_a_split_vocabulary_has_the_loss_of_the_whole(two_ranks) -> None:
    first, second = two_ranks(sharded_losses)
    for (tokens, vocab, kind, smoothing, chunk), ours, theirs in zip(
        CASES, first, second, strict=True
    ):
        hidden, weight, labels = case(tokens, vocab, kind)
        hidden.requires_grad_()
        weight.requires_grad_()
        loss, losses = linear_cross_entropy(hidden, weight, labels, smoothing, chunk)
        (2 * loss).backward()
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        for found in (ours, theirs):
            close(found[0], loss.detach())
            close(found[1], losses)
            close(found[3], weight.grad)
        close(ours[2] + theirs[2], hidden.grad)  # parts of a sum


def largest_tensor() -> int:
    axis, largest = mesh(), 0
    hidden = torch.randn(512, 2, requires_grad=True)
    weight = distribute_tensor(torch.randn(64, 2), axis, [Shard(0)]).requires_grad_()
    labels = torch.randint(64, (512,))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not isinstance(out, DTensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        sharded_cross_entropy(hidden, weight, labels, 0.1, 64, mesh=axis)[0].backward()
    return largest


def test_logits_are_never_held_whole(two_ranks) -> None:
    # A chunk of 64 tokens by half of the vocabulary, and not one number more.
    assert two_ranks(largest_tensor) == [64 * 32, 64 * 32]


def sharded_tokens() -> list[Tensor]:
    axis, found = mesh(), []
    for tokens, vocab, kind, _, chunk in CASES:
        hidden, weight, _ = case(tokens, vocab, kind)
        split = distribute_tensor(weight.round(), axis, [Shard(0)])  # rounded: many scores tie
        found.append(sharded_greedy_tokens(hidden.round(), split, chunk, mesh=axis))
    return found


def test_a_split_vocabulary_has_the_likeliest_tokens_of_the_whole(two_ranks) -> None:
    first, second = two_ranks(sharded_tokens)
    for (tokens, vocab, kind, _, _), ours, theirs in zip(CASES, first, second, strict=True):
        hidden, weight, _ = case(tokens, vocab, kind)
        expected = (hidden.round() @ weight.round().T).argmax(1)
        assert torch.equal(ours, expected) and torch.equal(theirs, expected)


# -------------------------------------------------------------------------------- reward models


def learn_rewards(
    folder: Path, parallel: dict | None = None, resume: str = ''
) -> dict[str, Tensor]:
    """Weights after four steps on pairs, two of them before a checkpoint."""
    runner = tiny_runner(
        folder,
        experiment_name=f'{folder.parent.name}_{folder.name}',
        model__objective=dict(type='PairwiseReward', center=0.1),
        train_dataloader__dataset=dict(type='RandomPairs', vocab_size=64, seq_len=32),
        val_dataloader=None,
        val_cfg=None,
        train_cfg__max_iters=4,
        default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=2),
        strategy__parallel=parallel or {},
        strategy__precision=dict(param='float64', reduce='float64'),
        resume=resume or False,
    )
    runner.train()
    return {
        name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in runner.model.named_parameters()
    }


def test_rewards_are_learnt_and_saved_as_by_one_process(two_ranks, tmp_path: Path) -> None:
    expected = learn_rewards(tmp_path / 'one')
    for found in two_ranks(learn_rewards, tmp_path / 'two', {'tensor': 2}):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    again = learn_rewards(tmp_path / 'again', resume=str(tmp_path / 'two' / 'iter_2'))
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-12)


def documents_and_weight() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 6, 4, generator=draw, dtype=torch.float64)
    weight = torch.randn(1, 4, generator=draw, dtype=torch.float64)
    return hidden, weight, torch.tensor([[0, 2, 6, 6], [0, 6, 6, 6]])


def split_scores() -> tuple[Tensor, Tensor, Tensor]:
    """Scores, and gradients of their squares' sum; those of hidden states are parts of a sum."""
    hidden, weight, bounds = documents_and_weight()
    axis = mesh()
    hidden.requires_grad_()
    weight.requires_grad_()
    own = hidden.chunk(2, 1)[axis.get_local_rank()].contiguous()
    scores = sharded_document_scores(gather_tokens(own, axis), weight, bounds, mesh=axis)
    scores[:, :1].square().sum().backward()
    return scores.detach(), weight.grad, hidden.grad


def test_scores_of_split_models(two_ranks) -> None:
    hidden, weight, bounds = documents_and_weight()
    hidden.requires_grad_()
    weight.requires_grad_()
    scores = torch.stack([hidden[0, 1] @ weight[0], hidden[1, 5] @ weight[0]])
    scores.square().sum().backward()
    ranks = two_ranks(split_scores)
    for found, gradient, _ in ranks:
        torch.testing.assert_close(found[:, 0], scores.detach())
        torch.testing.assert_close(gradient, weight.grad)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], hidden.grad)
    assert bounds.shape == (2, 4)
