"""The record that travels from the data to the loss."""

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

from internlm_mm.structures import Batch


def batch(domain_ids: Tensor | None = None) -> Batch:
    tokens = torch.arange(6).reshape(2, 3)
    return Batch(
        input_ids=tokens,
        labels=tokens + 1,
        position_ids=tokens % 3,
        document_ids=torch.zeros(2, 3, dtype=torch.int32),
        cu_seqlens=torch.tensor([[0, 3], [0, 3]], dtype=torch.int32),
        max_seqlen=3,
        num_targets=5,
        domain_ids=domain_ids,
        num_domains=0 if domain_ids is None else 2,
    )


def test_counts_every_position() -> None:
    assert batch().num_tokens == 6 and batch().num_targets == 5


@pytest.mark.parametrize('domains', [None, torch.ones(2, 3, dtype=torch.int64)])
def test_every_tensor_moves_and_nothing_else_changes(domains: Tensor | None) -> None:
    before = batch(domains)
    after = before.to('meta')
    for field in dataclasses.fields(Batch):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(old, Tensor):
            assert new.device.type == 'meta'
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        else:
            assert new == old
    assert before.input_ids.device.type == 'cpu'


def test_is_pinned_as_a_data_loader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, 'pin_memory', lambda tensor: pinned.append(tensor) or tensor)
    assert batch(torch.ones(2, 3)).pin_memory() is not None
    assert len(pinned) == 6


def test_is_a_record_and_not_a_bag() -> None:
    assert not hasattr(batch(), '__dict__')
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch().max_seqlen = 4  # type: ignore[misc]
    assert all(
        parameter.kind is parameter.KEYWORD_ONLY
        for parameter in inspect.signature(Batch).parameters.values()
    )


def test_how_long_the_document_of_each_token_is() -> None:
    found = batch().document_lengths()
    assert found.tolist() == [[3, 3, 3], [3, 3, 3]]
    packed = dataclasses.replace(
        batch(),
        document_ids=torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.int32),
        cu_seqlens=torch.tensor([[0, 1, 3, 3], [0, 2, 3, 3]], dtype=torch.int32),
    )
    assert packed.document_lengths().tolist() == [[1, 2, 2], [2, 2, 1]]
    # A rank that has some tokens of each row, as context parallelism shares them out.
    part = dataclasses.replace(packed, own_positions=torch.tensor([2, 0]))
    assert part.document_lengths().tolist() == [[2, 1], [1, 2]]
