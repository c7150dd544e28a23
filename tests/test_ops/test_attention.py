"""Every backend against attention computed one document at a time in float64."""

import dataclasses

import pytest
import torch

from internlm_mm.ops.attention import (
    Documents,
    cached_attention,
    cudnn_attention,
    make_documents,
    masked_attention,
    needs_mask,
    varlen_between,
)
from internlm_mm.ops.attention_choice import attention_obstacles
from internlm_mm.registry import ATTENTIONS
from tests.attention_cases import LENGTHS, oracle, packed_batch, qkv


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('lengths', [LENGTHS, [[16]] * 3], ids=['packed', 'dense'])
@pytest.mark.parametrize('name', ['reference', 'sdpa'])
def test_values_and_gradients(name, lengths, kv_heads):
    inputs = qkv(kv_heads=kv_heads)
    batch = packed_batch(lengths, max_docs=4 if lengths is LENGTHS else 1)
    documents = make_documents(batch, need_mask=True)
    assert (documents is None) == (lengths is not LENGTHS)
    out = ATTENTIONS.get(name)(*inputs, documents)
    expected = oracle(*inputs, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    for grad, want in zip(
        grads, torch.autograd.grad(expected, inputs, weight.double()), strict=True
    ):
        torch.testing.assert_close(grad, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['reference', 'sdpa'])
def test_bfloat16_stays_near_float32(name):
    inputs = qkv(kv_heads=2)
    documents = make_documents(packed_batch(), need_mask=True)
    half = ATTENTIONS.get(name)(*(x.bfloat16() for x in inputs), documents)
    # Inputs, weights and output are rounded to 8 bits: 3 * 2^-8 of values of about 1.
    torch.testing.assert_close(half.double(), oracle(*inputs, LENGTHS), rtol=0, atol=5e-2)


def test_lengths_of_documents():
    expected = torch.cat([torch.full((n,), n) for row in LENGTHS for n in row]).reshape(3, 16)
    documents = make_documents(packed_batch(), need_mask=False)
    assert torch.equal(documents.lengths(), expected.int())


def test_documents_are_laid_end_to_end():
    documents = make_documents(packed_batch(), need_mask=False)
    assert documents.mask is None
    assert documents.cu_seqlens.tolist() == [0, 5, 6, 16, 16, 32, 32, 32, 32, 35, 48, 48, 48]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.max_seqlen == 16


def test_mask_by_hand():
    mask = make_documents(packed_batch([[2, 1], [3]], max_docs=2), need_mask=True).mask
    assert mask.shape == (2, 1, 3, 3)
    assert mask[:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]


def test_cached_attention_sees_what_the_mask_shows():
    q, k, v = qkv(heads=4, kv_heads=2)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()[-3:].expand(3, 1, 3, 16)
    out = cached_attention(q[:, -3:], k, v, mask)
    torch.testing.assert_close(
        out.double(), oracle(q, k, v, [[16]] * 3)[:, -3:], rtol=1e-5, atol=1e-5
    )


def test_cudnn_refuses_packed_rows():
    documents = Documents(torch.zeros(1), torch.zeros(1), 1, None)
    with pytest.raises(ValueError, match='varlen'):
        cudnn_attention(*qkv(), documents)


def test_only_backends_that_read_the_mask_ask_for_it():
    asking = {name for name, attend in ATTENTIONS.module_dict.items() if needs_mask(attend)}
    assert asking == {'reference', 'sdpa'}
    assert needs_mask(lambda q, k, v, documents: q)  # of a plug-in that says nothing


# What torch's compiler looks at is no mistake of ours.
ignore_dynamo = pytest.mark.filterwarnings(
    'ignore:The .grad attribute of a Tensor that is not a leaf'
)


@ignore_dynamo
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('width', [32, 64, 128])
@pytest.mark.parametrize('kv_heads', [4, 2])
@pytest.mark.parametrize('packed', [True, False], ids=['packed', 'dense'])
@pytest.mark.parametrize('name', sorted(set(ATTENTIONS.module_dict) - {'reference'}))
def test_cuda_kernels(name, packed, kv_heads, width):
    """Every backend that is installed here, values and all gradients."""
    found = attention_obstacles(name, 'cuda', torch.bfloat16, packed, width)
    if found:
        pytest.skip(f'{name} {"; ".join(found)}')
    torch._dynamo.reset()  # it compiles for 8 shapes, and these are more
    lengths = LENGTHS if packed else [[16]] * 3
    inputs = [
        torch.randn(3, 16, h, width, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for h in (4, kv_heads, kv_heads)
    ]
    batch = packed_batch(lengths, max_docs=4 if packed else 1).to('cuda')
    attend = ATTENTIONS.get(name)
    out = attend(*inputs, make_documents(batch, need_mask=needs_mask(attend)))
    expected = oracle(*inputs, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-2)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    for grad, want in zip(
        grads, torch.autograd.grad(expected, inputs, weight.double()), strict=True
    ):
        torch.testing.assert_close(grad.double(), want.double(), rtol=5e-2, atol=1e-1)


@ignore_dynamo
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('name', ['cudnn', 'flash2', 'flash3', 'flash4', 'flex', 'varlen'])
def test_cuda_kernels_in_a_compiled_graph(name):
    """No graph break, and no other numbers than eager."""
    packed = name != 'cudnn'
    found = attention_obstacles(name, 'cuda', torch.bfloat16, packed, 64)
    if found:
        pytest.skip(f'{name} {"; ".join(found)}')
    torch._dynamo.reset()
    lengths = [[100, 28, 128]] * 2 if packed else [[256]] * 2
    documents = make_documents(packed_batch(lengths, 3 if packed else 1).to('cuda'), False)
    attend = ATTENTIONS.get(name)

    def around(q, k, v):
        return attend(q * 2, k, v, documents) + 1

    inputs = [
        torch.randn(2, 256, 4, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for _ in 'qkv'
    ]
    weight = torch.randn(2, 256, 4, 64, device='cuda', dtype=torch.bfloat16)
    expected = around(*inputs)
    wanted = torch.autograd.grad(expected, inputs, weight)
    out = torch.compile(around, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    for grad, want in zip(torch.autograd.grad(out, inputs, weight), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=5e-2, atol=1e-1)


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_masked_attention_of_some_queries(kv_heads):
    inputs = qkv(kv_heads=kv_heads)
    mask = make_documents(packed_batch(), need_mask=True).mask
    own = [0, 1, 6, 14, 15]
    out = masked_attention(inputs[0][:, own], *inputs[1:], mask[:, :, own])
    expected = oracle(*inputs, LENGTHS)[:, own]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_documents_of_rows_whose_tokens_are_shared_out():
    """Boundaries are those of the whole rows, however few tokens are here."""
    whole = packed_batch()
    part = dataclasses.replace(whole, input_ids=whole.input_ids[:, :4])
    expected, found = (make_documents(one, need_mask=False) for one in (whole, part))
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(found.document_ids, whole.document_ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_kernel_between_boundaries_of_two_kinds():
    """The second half of each row as queries, segments without queries among the keys."""
    inputs = [
        torch.randn(3, 16, h, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        for h in (4, 2, 2)
    ]
    # Rows of 5, 1, 10; of 16; of 3, 13 tokens. Keys before the document that a chunk begins in
    # are a segment without a query.
    keys = torch.tensor([0, 6, 16, 32, 35, 48], dtype=torch.int32, device='cuda')
    queries = torch.tensor([0, 0, 8, 16, 16, 24], dtype=torch.int32, device='cuda')
    out = varlen_between(inputs[0][:, 8:], *inputs[1:], queries, keys, 8, 16)
    expected = oracle(*inputs, LENGTHS)[:, 8:]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-2)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    wanted = torch.autograd.grad(expected, inputs, weight.double())
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), want.double(), rtol=5e-2, atol=1e-1)
    assert grads[1][0, :6].abs().max() == 0  # written, though no query saw them
