"""Sequences that ranks share: boundaries by brute force, attention by the reference."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.ops import Documents, make_documents
from internlm_mm.ops.attention import reference_attention
from internlm_mm.parallel import context
from internlm_mm.parallel.context import (
    CONTEXT_ATTENTIONS,
    check_documents,
    chunk_boundaries,
    gather_sequence,
    own_positions,
    share_batch,
)
from internlm_mm.structures import Batch
from tests.test_models.helpers import make_batch

PACKED = [[5, 1, 10], [16], [3, 13], [4, 4, 4, 4]]
DENSE = [[16], [16], [16], [16]]


def mesh():
    return init_device_mesh('cpu', (2,), mesh_dim_names=('context',))


# ------------------------------------------------------------------------------------- positions


@settings(deadline=None)
@given(ranks=st.integers(1, 9), chunk=st.integers(1, 12))
def test_every_token_is_somewhere_and_work_is_even(ranks: int, chunk: int) -> None:
    seq_len = 2 * ranks * chunk
    own = [own_positions(seq_len, rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat(own).tolist()) == list(range(seq_len))
    # A causal query at position p sees p + 1 keys.
    pairs = {int((positions + 1).sum()) for positions in own}
    assert len(pairs) == 1
    for positions in own:
        assert positions.tolist() == sorted(positions.tolist())


def test_positions_by_hand() -> None:
    assert own_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert own_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


def shared(lengths: list, domains: int) -> Batch:
    return share_batch(make_batch(lengths, domains=domains), mesh())


@pytest.mark.parametrize('domains', [0, 3])
def test_a_batch_is_shared_token_by_token(two_ranks, domains: int) -> None:
    whole = make_batch(PACKED, domains=domains)
    for rank, part in enumerate(two_ranks(shared, PACKED, domains)):
        own = [0, 1, 2, 3, 12, 13, 14, 15] if rank == 0 else list(range(4, 12))
        for field in fields(Batch):
            ours, theirs = getattr(part, field.name), getattr(whole, field.name)
            if field.name in ('input_ids', 'labels', 'position_ids', 'domain_ids'):
                theirs = None if theirs is None else theirs[:, own]
            if field.name == 'own_positions':
                theirs = torch.tensor(own)
            if isinstance(theirs, Tensor):
                assert torch.equal(ours, theirs), field.name
            else:
                assert ours == theirs, field.name


def gathered() -> tuple[bool, Tensor, Tensor]:
    axis = mesh()
    rank = axis.get_local_rank()
    whole = torch.arange(2 * 12 * 3 * 2, dtype=torch.float64).reshape(2, 12, 3, 2)
    own = own_positions(12, rank, 2)
    x = whole[:, own].clone().requires_grad_()
    out = gather_sequence(x, axis)
    (out * whole.cos() * (1 + 10 * rank)).sum().backward()
    return torch.equal(out, whole), x.grad, 12 * whole.cos()[:, own]


def test_gathered_sequences_are_in_order_and_sum_gradients(two_ranks) -> None:
    for in_order, gradient, expected in two_ranks(gathered):
        assert in_order
        torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)


# ------------------------------------------------------------------------------------- attention


def inputs(kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = [(4, 16, heads, 6) for heads in (4, kv_heads, kv_heads)]
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.requires_grad_() for x in draw]


def out_weight() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(4, 16, 4, 6, generator=generator, dtype=torch.float64)


def attended(name: str, lengths: list, kv_heads: int) -> tuple[Tensor, list[Tensor]]:
    axis = mesh()
    own = own_positions(16, axis.get_local_rank(), 2)
    attend = CONTEXT_ATTENTIONS[name](axis, False)
    documents = make_documents(make_batch(lengths), need_mask=False)
    q, k, v = (x.detach()[:, own].requires_grad_() for x in inputs(kv_heads))
    out = attend(q, k, v, documents)
    (out * out_weight()[:, own]).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v)]


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('lengths', [PACKED, DENSE], ids=['packed', 'dense'])
@pytest.mark.parametrize('name', ['all_gather'])
def test_two_ranks_attend_as_one(two_ranks, name: str, lengths: list, kv_heads: int) -> None:
    whole = inputs(kv_heads)
    out = reference_attention(*whole, make_documents(make_batch(lengths), need_mask=True))
    (out * out_weight()).sum().backward()
    for rank, (ours, gradients) in enumerate(two_ranks(attended, name, lengths, kv_heads)):
        own = [0, 1, 2, 3, 12, 13, 14, 15] if rank == 0 else list(range(4, 12))
        torch.testing.assert_close(ours, out.detach()[:, own], rtol=1e-12, atol=1e-12)
        for found, x in zip(gradients, whole, strict=True):
            torch.testing.assert_close(found, x.grad[:, own], rtol=1e-12, atol=1e-12)


LONG, LONG_DOCUMENTS = 8192, [3000, 1, 5000, 191]


def long_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(1, LONG, 1, 8, generator=generator, dtype=torch.float64) for _ in range(4)]


def long_row() -> tuple[Tensor, list[Tensor]]:
    axis = mesh()
    own = own_positions(LONG, axis.get_local_rank(), 2)
    *qkv, weight = (x[:, own] for x in long_inputs())
    qkv = [x.requires_grad_() for x in qkv]
    documents = make_documents(make_batch([LONG_DOCUMENTS]), need_mask=False)
    out = CONTEXT_ATTENTIONS['all_gather'](axis, False)(*qkv, documents)
    (out * weight).sum().backward()
    return out.detach(), [x.grad for x in qkv]


@pytest.mark.slow
def test_a_row_of_eight_thousand_tokens(two_ranks) -> None:
    """Against torch's attention, one document after the other."""
    *qkv, weight = long_inputs()
    qkv = [x.transpose(1, 2).requires_grad_() for x in qkv]
    parts = zip(*(x.split(LONG_DOCUMENTS, dim=2) for x in qkv), strict=True)
    out = torch.cat([F.scaled_dot_product_attention(*p, is_causal=True) for p in parts], dim=2)
    (out * weight.transpose(1, 2)).sum().backward()
    for rank, found in enumerate(two_ranks(long_row)):
        own = own_positions(LONG, rank, 2)
        for ours, whole in zip((found[0], *found[1]), (out, *(x.grad for x in qkv)), strict=True):
            theirs = whole.detach().transpose(1, 2)[:, own]
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------ boundaries


def documents_of(lengths: list[list[int]], padding: int) -> Documents:
    """With `padding` more places for documents than any row has."""
    seq_len, widest = sum(lengths[0]), max(map(len, lengths)) + padding
    starts = []
    for row, sizes in enumerate(lengths):
        places = [sum(sizes[:index]) for index in range(len(sizes))]
        places += [seq_len] * (widest - len(places))
        starts += [row * seq_len + place for place in places]
    ids = [[index for index, size in enumerate(sizes) for _ in range(size)] for sizes in lengths]
    return Documents(
        document_ids=torch.tensor(ids, dtype=torch.int32),
        cu_seqlens=torch.tensor([*starts, len(lengths) * seq_len], dtype=torch.int32),
        max_seqlen=max(map(max, lengths)),
        mask=None,
    )


@st.composite
def packed_rows(draw) -> tuple[list[list[int]], int, int]:
    """Lengths of documents in rows of one length, ranks and tokens of a chunk."""
    ranks, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seq_len = 2 * ranks * chunk
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = draw(st.sets(st.integers(1, seq_len - 1)))
        rows.append([end - start for start, end in pairwise([0, *sorted(cuts), seq_len])])
    return rows, ranks, chunk


def assert_right_segments(
    ends: tuple[Tensor, Tensor], lengths: list[list[int]], start: int, chunk: int
) -> None:
    """Token by token: which keys the segments show a query, and which a causal mask would."""
    queries, keys = (one.tolist() for one in ends)
    rows, seq_len = len(lengths), sum(lengths[0])
    assert all(one.dtype == torch.int32 for one in ends)
    assert len(queries) == len(keys)
    assert (queries[0], queries[-1]) == (0, rows * chunk)
    assert (keys[0], keys[-1]) == (0, rows * seq_len)
    assert queries == sorted(queries) and keys == sorted(keys)  # so each token is in one segment
    shown: dict[int, set[int]] = {}
    for (q_start, q_end), (k_start, k_end) in zip(pairwise(queries), pairwise(keys), strict=True):
        for query in range(q_start, q_end):
            # The last query of a segment sees its last key, one before sees one less.
            shown[query] = set(range(k_start, k_end - (q_end - 1 - query)))
    for row, sizes in enumerate(lengths):
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        for offset in range(chunk):
            position = start + offset
            document = max(begin for begin in starts if begin <= position)
            visible = range(row * seq_len + document, row * seq_len + position + 1)
            assert shown[row * chunk + offset] == set(visible), (row, position)


@settings(deadline=None)
@given(case=packed_rows(), padding=st.integers(0, 2))
def test_segments_show_what_a_causal_mask_would(case, padding: int) -> None:
    lengths, ranks, chunk = case
    documents = documents_of(lengths, padding)
    seq_len = sum(lengths[0])
    for start in range(0, seq_len, chunk):
        ends = chunk_boundaries(documents, start, chunk, len(lengths), seq_len, 'cpu')
        assert_right_segments(ends, lengths, start, chunk)
    assert seq_len == 2 * ranks * chunk


@settings(deadline=None)
@given(rows=st.integers(1, 4), chunks=st.integers(1, 6), chunk=st.integers(1, 6))
def test_segments_of_rows_of_one_document(rows: int, chunks: int, chunk: int) -> None:
    seq_len = chunks * chunk
    for start in range(0, seq_len, chunk):
        ends = chunk_boundaries(None, start, chunk, rows, seq_len, 'cpu')
        assert_right_segments(ends, [[seq_len]] * rows, start, chunk)


def test_segments_of_rows_as_a_loader_packs_them() -> None:
    data = RandomTokens(vocab_size=9, seq_len=24, document_lengths=[3, 5, 11], seed=3)
    batch = collate_rows([data[row] for row in range(4)])
    documents = make_documents(batch, need_mask=False)
    lengths = [row.bincount().tolist() for row in batch.document_ids]
    for start in range(0, 24, 6):
        ends = chunk_boundaries(documents, start, 6, 4, 24, 'cpu')
        assert_right_segments(ends, lengths, start, 6)


def kernel_by_hand(q, k, v, query_ends, key_ends, longest_query, longest_key):
    """What FlashAttention does between boundaries, segment by segment."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out = torch.zeros_like(flat_q)
    groups = q.shape[2] // k.shape[2]
    for (a, b), (c, d) in zip(
        pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True
    ):
        assert b - a <= longest_query and d - c <= longest_key
        keys = flat_k[c:d].repeat_interleave(groups, 1)
        values = flat_v[c:d].repeat_interleave(groups, 1)
        for query in range(a, b):
            seen = d - c - (b - 1 - query)
            scores = torch.einsum('hd,khd->hk', flat_q[query], keys[:seen]) * q.shape[-1] ** -0.5
            out[query] = torch.einsum('hk,khd->hd', scores.softmax(-1), values[:seen])
    return out.unflatten(0, q.shape[:2])


@pytest.mark.parametrize('lengths', [PACKED, DENSE], ids=['packed', 'dense'])
def test_the_kernel_is_called_with_both_chunks(monkeypatch, lengths: list) -> None:
    """Without a GPU: the kernel is replaced by loops, and ranks take turns in one process."""
    monkeypatch.setattr(context, 'varlen_between', kernel_by_hand)
    q, k, v = (x.detach() for x in inputs(2))
    documents = make_documents(make_batch(lengths), need_mask=True)
    expected = reference_attention(q, k, v, documents)
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            own = own_positions(16, rank, ranks)
            out = context._kernel_attention(q[:, own], k, v, documents, rank, ranks)
            torch.testing.assert_close(out, expected[:, own], rtol=1e-12, atol=1e-12)


def test_a_ring_takes_one_document_a_row() -> None:
    check_documents('ring', 2, 1, 'train_dataloader')
    check_documents('ring', 1, 5, 'train_dataloader')
    check_documents('all_gather', 2, 5, 'train_dataloader')
    with pytest.raises(ValueError, match=r"'ring' .* val_dataloader\.dataset packs .*'all_gather'"):
        check_documents('ring', 2, 5, 'val_dataloader')
