"""A backend beside the reference: what is found, and what 'auto' makes of it."""

from collections.abc import Iterator

import pytest
import torch

from internlm_mm.datasets.packing import collate_rows, pack_row
from internlm_mm.ops import attention_choice
from internlm_mm.ops.attention import make_documents, reference_attention, sdpa_attention
from internlm_mm.ops.attention_choice import choose_attention
from internlm_mm.ops.attention_trial import (
    document_lengths,
    fault_of,
    make_rows,
    try_attention,
)
from internlm_mm.ops.needs import Needs
from internlm_mm.registry import ATTENTIONS

CPU = torch.device('cpu')


def leaky(q, k, v, documents):
    """Looks across boundaries of documents."""
    return reference_attention(q, k, v, None)


def half_a_gradient(q, k, v, documents):
    """What no comparison of results would show."""
    return reference_attention(0.5 * q + 0.5 * q.detach(), k, v, documents)


def broken(q, k, v, documents):
    raise RuntimeError('no kernel image is available\nfor execution on the device')


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backends of another package, which is installed."""
    for attend in (sdpa_attention, leaky, half_a_gradient, broken):
        named = lambda *args, attend=attend: attend(*args)  # noqa: E731  needs of its own
        named.needs = Needs(module='torch')
        monkeypatch.setitem(ATTENTIONS.module_dict, f'their_{attend.__name__}', named)
    fault_of.cache_clear()
    yield
    fault_of.cache_clear()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('packed', [False, True], ids=['dense', 'packed'])
def test_what_is_right_passes(dtype: torch.dtype, packed: bool) -> None:
    for width in (None, 16, 48, 128):
        try_attention(sdpa_attention, CPU, dtype, packed, width)


def test_it_works_where_nothing_is_learned() -> None:
    with torch.inference_mode():
        try_attention(sdpa_attention, CPU, torch.float32, True)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r'its gradient of q is .* off'):
        try_attention(half_a_gradient, CPU, torch.float32, True)


def test_faults(foreign) -> None:
    def fault(name: str, packed: bool) -> str | None:
        return fault_of(f'their_{name}', CPU, torch.bfloat16, packed, 32)

    assert fault('sdpa_attention', True) is fault('leaky', False) is None
    assert fault('leaky', True).startswith('fails here: its result is ')
    for packed in (False, True):
        assert fault('half_a_gradient', packed).startswith('fails here: its gradient of q is ')
        assert fault('broken', packed) == 'fails here: no kernel image is available'


def test_a_backend_by_name_is_tried_before_it_is_taken(foreign) -> None:
    name, _ = choose_attention('their_sdpa_attention', CPU, torch.float32, True)
    assert name == 'their_sdpa_attention'
    with pytest.raises(
        ValueError,
        match=r"strategy\.attention='their_half_a_gradient' fails here: its gradient of q .*'auto'",
    ):
        choose_attention('their_half_a_gradient', CPU, torch.float32, False)
    # Elsewhere it may be another release.
    assert choose_attention('their_broken', CPU, torch.float32, False, elsewhere=True)


def test_auto_passes_over_what_fails(foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA alone it chooses; the trial is made on the CPU here."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    tried = []

    def on_the_cpu(name, device, dtype, packed, head_dim):
        tried.append((name, device.type, head_dim))
        return fault_of(name, CPU, dtype, packed, head_dim)

    monkeypatch.setattr(attention_choice, 'fault_of', on_the_cpu)
    monkeypatch.setitem(
        attention_choice.PREFERRED,
        True,
        ('their_half_a_gradient', 'their_sdpa_attention', 'varlen'),
    )
    name, why = choose_attention('auto', 'cuda', torch.bfloat16, True, 96)
    assert name == 'their_sdpa_attention'
    assert 'their_half_a_gradient fails here: its gradient of q' in why
    assert tried == [(f'their_{n}', 'cuda', 96) for n in ('half_a_gradient', 'sdpa_attention')]
    monkeypatch.setitem(attention_choice.PREFERRED, True, ('their_broken', 'varlen'))
    assert choose_attention('auto', 'cuda', torch.bfloat16, True, 96)[0] == 'varlen'


@pytest.mark.parametrize(('rows', 'seq'), [(2, 64), (1, 100), (2, 4096)])
def test_packed_rows_are_those_of_a_batch(rows: int, seq: int) -> None:
    lengths = torch.tensor(document_lengths(seq)).numpy()
    assert lengths.sum() == seq and len(lengths) == 8 and lengths.min() > 0
    ones = torch.ones(seq, dtype=torch.int64).numpy()
    row = pack_row(ones, ones, lengths, seq_len=seq, max_docs=8)
    expected = make_documents(collate_rows([row] * rows), need_mask=True)
    made = make_rows(rows, seq, CPU)
    assert made.max_seqlen == expected.max_seqlen
    for name in ('document_ids', 'cu_seqlens', 'mask'):
        left, right = getattr(made, name), getattr(expected, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name
