"""Blocks of FlexAttention against torch's own, values against float64. Gradients need a GPU."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from internlm_mm.ops.attention import make_documents
from internlm_mm.ops.flex import BLOCK, document_blocks, flexible_attention
from tests.attention_cases import LENGTHS, oracle, packed_batch, qkv


def attend(*inputs):
    with warnings.catch_warnings():
        # Without a compiler torch writes the scores out, which is what a small case may do.
        warnings.filterwarnings('ignore', 'flex_attention called without torch.compile')
        return flexible_attention(*inputs)


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('lengths', [LENGTHS, [[16]] * 3, [[200, 1, 130]]], ids=str)
def test_values(lengths, kv_heads):
    rows, seq = len(lengths), sum(lengths[0])
    inputs = [x.detach() for x in qkv(kv_heads=kv_heads, rows=rows, seq=seq)]
    documents = make_documents(packed_batch(lengths, max(map(len, lengths))), need_mask=False)
    out = attend(*inputs, documents)
    torch.testing.assert_close(out.double(), oracle(*inputs, lengths), rtol=1e-5, atol=1e-5)


def test_documents_do_not_leak():
    inputs = [x.detach() for x in qkv()]
    documents = make_documents(packed_batch(), need_mask=False)
    before = attend(*inputs, documents)
    for x in inputs[1:]:
        x[0, :5] += 1  # keys and values of the first document of the first row
    after = attend(*inputs, documents)
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :5], after[0, :5])


CASES = [
    [[1024]],
    [[BLOCK] * 4],
    [[BLOCK - 1, 2, 3 * BLOCK - 1]],
    [[1, 500, 11], [512], [300, 212]],
    [[700]],  # the last block is short
    [[130, 3, 567]],
]


@pytest.mark.parametrize('lengths', CASES, ids=str)
def test_blocks_are_those_that_torch_finds_token_by_token(lengths):
    batch = packed_batch(lengths, max(map(len, lengths)))
    ids, seq = batch.document_ids, batch.document_ids.shape[1]

    def may_see(row, head, query, key):
        return (key <= query) & (ids[row, key] == ids[row, query])

    expected = create_block_mask(may_see, len(ids), None, seq, seq, device='cpu', BLOCK_SIZE=BLOCK)
    found = document_blocks(ids)
    assert found.shape == expected.shape

    def listed(counts, indices):
        pairs = zip(counts.flatten(0, -1), indices.flatten(0, -2), strict=True)
        return [sorted(row[:count].tolist()) for count, row in pairs]

    for kind in ('kv', 'q'):
        for part in ('', 'full_'):
            names = f'{part}{kind}_num_blocks', f'{part}{kind}_indices'
            theirs, ours = ([getattr(x, n) for n in names] for x in (expected, found))
            assert listed(*ours) == listed(*theirs), names


@pytest.mark.slow
def test_a_compiled_layer_has_it_in_one_graph():
    inputs = [x.detach() for x in qkv()]
    documents = make_documents(packed_batch(), need_mask=False)
    compiled = torch.compile(lambda *x: flexible_attention(*x) + 1, fullgraph=True)
    out = compiled(*inputs, documents) - 1
    torch.testing.assert_close(out.double(), oracle(*inputs, LENGTHS), rtol=1e-5, atol=1e-5)
