"""The reference against torch's own AdamW, clip and loss over micro-batches."""

import math
import subprocess
import sys

import pytest
import torch

from internlm_mm.datasets import RandomTokens, collate_rows
from internlm_mm.models import InternLM
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.verify.reference import TYPICAL, initial_weights, train_reference
from internlm_mm.verify.rows import UnevenRows

MODEL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
BETAS, DECAY, ROWS, STEPS = (0.9, 0.95), 0.1, 4, 3
DATA = UnevenRows(RandomTokens(vocab_size=37, seq_len=24, document_lengths=[3, 8]), seq_len=24)


def build() -> InternLM:
    return InternLM(**MODEL)


def rate(step: int) -> float:
    return 0.02 * (step + 1)


def reference(max_norm: float | None = None):
    return train_reference(
        build,
        DATA,
        seed=5,
        steps=STEPS,
        rows_of_a_step=ROWS,
        betas=BETAS,
        weight_decay=DECAY,
        rate=rate,
        max_norm=max_norm,
        device='cpu',
    )


def test_it_is_what_torch_does() -> None:
    found = reference()
    model = build().double()
    model.load_state_dict(found.initial)
    groups = [
        {'params': [p for p in model.parameters() if p.ndim >= 2], 'weight_decay': DECAY},
        {'params': [p for p in model.parameters() if p.ndim < 2], 'weight_decay': 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=found.eps)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group['lr'] = rate(step)
        rows = [DATA[step * ROWS + row] for row in range(ROWS)]
        targets = sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
        loss = 0.0
        for row in rows:  # a row at a time: sums over the whole batch do not care
            part = model(collate_rows([row]))['loss'] / targets
            part.backward()
            loss += part.item()
        assert loss == pytest.approx(found.losses[step], rel=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, found.gradients[step][name], rtol=1e-9, atol=1e-13
            )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), found.max_norm)
        assert norm.item() == pytest.approx(found.norms[step], rel=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), found.weights[step][name], rtol=1e-9, atol=1e-13
            )


def test_the_clip_bites_whatever_the_config_has() -> None:
    norm = reference().norms[0]
    assert reference().max_norm == pytest.approx(0.3 * norm)
    assert reference(max_norm=10 * norm).max_norm == pytest.approx(0.3 * norm)
    own = reference(max_norm=0.5 * norm)
    assert own.max_norm == 0.5 * norm
    size = sum(p.numel() for p in build().parameters())
    assert own.eps == pytest.approx(own.max_norm / math.sqrt(size))


def test_initial_weights_are_large_and_exact() -> None:
    with torch.device('meta'):
        model = build()
    weights, exponents = initial_weights(model, seed=5)
    again, _ = initial_weights(model, seed=5)
    other, _ = initial_weights(model, seed=6)
    for name, weight in weights.items():
        assert torch.equal(weight, again[name])
        drawn = weight * 2.0 ** -exponents[name]
        assert torch.equal(drawn, drawn.float().double())  # as it was drawn, in float32
        if weight.ndim >= 2:
            assert not torch.equal(weight, other[name])
            size = weight.square().mean().sqrt().item()
            assert TYPICAL / 1.5 < size < TYPICAL * 1.5
        else:
            assert exponents[name] == 0


def test_it_knows_nothing_of_what_it_judges() -> None:
    """In a process of its own, which has imported nothing but the reference."""
    code = 'import sys, internlm_mm.verify.reference; print(*sys.modules)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    judged = ('parallel', 'optim', 'engine', 'checkpoint')
    assert not [
        name for name in found.stdout.split()
        if name.startswith(tuple(f'internlm_mm.{part}' for part in judged))
    ]  # fmt: skip
    assert 'internlm_mm.verify.reference' in found.stdout.split()
