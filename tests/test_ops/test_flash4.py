"""The operations around FlashAttention-4, on the CPU over a stand-in with its signatures."""

import ast
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from internlm_mm.ops import flash4
from internlm_mm.ops.attention import make_documents
from internlm_mm.ops.flash4 import flash4_attention, flash4_backward, flash4_forward
from tests import flash_standins
from tests.attention_cases import LENGTHS, oracle, packed_batch, qkv

DENSE = [[16]] * 3


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    flash_standins.install(monkeypatch, 'flash4')


def documents_of(lengths):
    return make_documents(packed_batch(lengths, 4 if lengths is LENGTHS else 1), need_mask=False)


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('lengths', [LENGTHS, DENSE], ids=['packed', 'dense'])
def test_values_and_gradients(lengths, kv_heads):
    inputs = qkv(kv_heads=kv_heads)
    out = flash4_attention(*inputs, documents_of(lengths))
    expected = oracle(*inputs, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    wanted = torch.autograd.grad(expected, inputs, weight.double())
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.float(), rtol=1e-4, atol=1e-5)


def arguments(lengths, kv_heads):
    inputs = qkv(kv_heads=kv_heads)
    documents = documents_of(lengths)
    if documents is None:
        return (*inputs, None, 0)
    flat = (x.detach().flatten(0, 1).requires_grad_() for x in inputs)
    return (*flat, documents.cu_seqlens, documents.max_seqlen)


@pytest.mark.parametrize('kv_heads', [4, 2])
@pytest.mark.parametrize('lengths', [LENGTHS, DENSE], ids=['packed', 'dense'])
def test_torch_finds_the_operations_well_registered(lengths, kv_heads):
    """Schemas, shape functions with their strides, gradients, all of it under tracing."""
    forward = arguments(lengths, kv_heads)
    torch.library.opcheck(flash4_forward, forward)
    with torch.no_grad():
        out, normaliser = flash4_forward(*forward)
    inputs = [x.detach() for x in forward[:3]]
    grad = torch.randn_like(out)
    torch.library.opcheck(flash4_backward, (grad, *inputs, out, normaliser, *forward[3:]))


def test_inputs_that_are_slices_of_one_tensor():
    """As fused products give them: results lie in memory as the shape function says."""
    whole = torch.randn(3, 16, 12, 8, requires_grad=True)
    q, k, v = whole.split(4, dim=2)
    out = flash4_attention(q, k, v, None)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), oracle(q, k, v, DENSE), rtol=1e-5, atol=1e-5)
    out.sum().backward()  # an expanded gradient, which has no memory of its own
    assert whole.grad is not None and whole.grad.abs().sum() > 0


@pytest.mark.parametrize('lengths', [LENGTHS, DENSE], ids=['packed', 'dense'])
def test_a_compiled_layer_has_it_in_one_graph(lengths):
    inputs, documents = qkv(kv_heads=2), documents_of(lengths)

    def around(q, k, v):
        return flash4_attention(q * 2, k, v, documents) + 1

    compiled = torch.compile(around, fullgraph=True, backend='aot_eager')
    expected = around(*inputs)
    out = compiled(*inputs)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, inputs, weight)
    for grad, want in zip(torch.autograd.grad(out, inputs, weight), wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_lengths_of_documents_do_not_compile_again():
    torch._dynamo.reset()
    compiled = torch.compile(flash4_attention, fullgraph=True, backend='aot_eager', dynamic=None)
    inputs = qkv()
    cases = [[[5, 1, 10]] * 3, [[9, 7]] * 3, [[13, 3]] * 3, [[12, 2, 2]] * 3]
    documents = [make_documents(packed_batch(x, 4), need_mask=False) for x in cases]
    for one in documents[:2]:  # the second length makes the number a variable
        compiled(*inputs, one)
    with torch.compiler.set_stance('fail_on_recompile'):
        for one, lengths in zip(documents[2:], cases[2:], strict=True):
            out = compiled(*inputs, one)
            torch.testing.assert_close(out.double(), oracle(*inputs, lengths), rtol=1e-5, atol=1e-5)


def test_the_real_package_has_the_arguments_that_are_given():
    try:
        package = distribution('flash-attn-4')
    except PackageNotFoundError:
        pytest.skip('flash-attn-4 is not installed')
    files = [f for f in package.files or () if str(f) == 'flash_attn/cute/interface.py']
    source = ast.parse(files[0].read_text(encoding='utf-8'))
    there = {
        node.name: {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        for node in source.body
        if isinstance(node, ast.FunctionDef)
    }
    boundaries = set(flash4._boundaries(torch.zeros(2), 1))
    assert boundaries == flash_standins.BOUNDARIES
    assert there['_flash_attn_fwd'] >= flash_standins.FLASH4_FORWARD | boundaries
    assert there['_flash_attn_bwd'] >= flash_standins.FLASH4_BACKWARD | boundaries
