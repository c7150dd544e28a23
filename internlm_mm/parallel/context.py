"""Context parallelism: the tokens of a sequence spread over ranks.

A row is cut into two chunks a rank, and rank r takes the chunks r and 2 * ranks - 1 - r: under a
causal mask the first chunks are cheap and the last ones dear, and every such pair costs the same.
Each rank computes the queries of its own tokens; keys and values are gathered from all ranks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel

from internlm_mm.ops import Documents
from internlm_mm.ops.attention import (
    Attend,
    flash_attention,
    masked_attention,
    varlen_between,
)
from internlm_mm.parallel.tensor import gather_tokens
from internlm_mm.structures import Batch
from internlm_mm.utils.suggest import did_you_mean


def own_positions(seq_len: int, rank: int, ranks: int, device: Any = None) -> Tensor:
    """Which tokens of a row a rank holds, in its order, [seq_len / ranks]."""
    chunk = seq_len // (2 * ranks)
    starts = (rank * chunk, (2 * ranks - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])


def share_batch(batch: Batch, mesh: DeviceMesh) -> Batch:
    """This rank's tokens of a micro-batch.

    What describes the whole rows stays whole: `document_ids`, `cu_seqlens`, `max_seqlen`, and
    `num_targets`, which is counted before.

    Args:
        batch: The whole rows, the same on every rank of `mesh`.
        mesh: The context axis.
    """
    seq_len = batch.input_ids.shape[1]
    own = own_positions(seq_len, mesh.get_local_rank(), mesh.size(), batch.input_ids.device)

    domains = batch.domain_ids
    return replace(
        batch,
        input_ids=batch.input_ids.index_select(1, own),
        labels=batch.labels.index_select(1, own),
        position_ids=batch.position_ids.index_select(1, own),
        domain_ids=None if domains is None else domains.index_select(1, own),
        own_positions=own,
    )


def gather_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whole rows, in their order, from every rank's tokens; gradients are added up on the way back.

    Args:
        x: Keys or values of this rank's tokens, [rows, seq / ranks, heads, head_dim].
        mesh: The context axis.

    Returns:
        [rows, seq, heads, head_dim].
    """
    whole = gather_tokens(x, mesh)
    firsts, seconds = whole.unflatten(1, (mesh.size(), 2, -1)).unbind(
        2
    )  # [rows, ranks, chunk, ...]
    return torch.cat((firsts, seconds.flip(1)), dim=1).flatten(1, 2)


def gather_attention(mesh: DeviceMesh, use_kernel: bool) -> Attend:
    """Attention of this rank's queries to the gathered keys and values of all ranks.

    Args:
        mesh: The context axis.
        use_kernel: Whether to use FlashAttention over documents, which needs CUDA in half
            precision; a mask otherwise.
    """
    attend_between = _kernel_attention if use_kernel else _mask_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        # One exchange for both.
        heads = k.shape[2]
        k, v = gather_sequence(torch.cat((k, v), dim=2), mesh).split(heads, dim=2)
        return attend_between(q, k, v, documents, mesh.get_local_rank(), mesh.size())

    attend.needs_mask = False  # type: ignore[attr-defined]  # of whole rows, which is not ours
    return attend


def _mask_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, rank: int, ranks: int
) -> Tensor:
    seq_len = k.shape[1]
    own = own_positions(seq_len, rank, ranks, q.device)
    mask = own.unsqueeze(1) >= torch.arange(seq_len, device=q.device)
    if documents is not None:
        ids = documents.document_ids
        mask = mask & (ids.index_select(1, own).unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)
    return masked_attention(q, k, v, mask)


def _kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, rank: int, ranks: int
) -> Tensor:
    chunk = q.shape[1] // 2
    parts = []
    for index, queries in ((rank, q[:, :chunk]), (2 * ranks - 1 - rank, q[:, chunk:])):
        start = index * chunk
        rows, seq_len = k.shape[:2]
        ends = chunk_boundaries(documents, start, chunk, rows, seq_len, q.device)
        # Of keys: those that no query sees can be one long segment.
        parts.append(varlen_between(queries, k, v, *ends, chunk, k.shape[1]))
    return torch.cat(parts, dim=1)


def chunk_boundaries(
    documents: Documents | None, start: int, length: int, rows: int, seq_len: int, device: Any
) -> tuple[Tensor, Tensor]:
    """Where the segments of a chunk's queries, and the keys each may see, begin and end.

    Kernels align a causal mask at the ends of a segment's queries and keys. So the keys of a
    document end where its queries of this chunk end, and begin with the document. Keys that no
    query of the chunk may see form segments of their own without a query, because kernels write
    the gradient of keys segment by segment.

    Args:
        documents: Boundaries inside the rows; None when each row is one document.
        start: First token of the chunk in its row.
        length: Tokens of the chunk.
        rows: Rows.
        seq_len: Tokens of a row.
        device: Of the result.

    Returns:
        Boundaries of the queries in `rows * length` tokens, and of the keys in `rows * seq_len`,
        both [segments + 1], int32.
    """
    row = torch.arange(rows, device=device, dtype=torch.int32).unsqueeze(1)
    if documents is None:
        begins = torch.zeros_like(row)
    else:
        begins = documents.cu_seqlens[:-1].unflatten(0, (rows, -1)) - row * seq_len
    # The document that the chunk begins in; earlier ones are of no interest.
    first = torch.where(begins <= start, begins, 0).amax(1, keepdim=True)
    keys = begins.maximum(first).clamp(max=start + length)
    queries = begins.clamp(start, start + length) - start
    # Each row: [keys before], documents, [keys after].
    keys = torch.cat((torch.zeros_like(row), keys, torch.full_like(row, start + length)), dim=1)
    queries = torch.cat((torch.zeros_like(row), queries, torch.full_like(row, length)), dim=1)
    keys, queries = (keys + row * seq_len).flatten(), (queries + row * length).flatten()
    return F.pad(queries, (0, 1), value=rows * length), F.pad(keys, (0, 1), value=rows * seq_len)


def ring_attention(mesh: DeviceMesh, use_kernel: bool) -> Attend:  # noqa: ARG001  as its sibling
    """torch's ring: keys and values travel from rank to rank while blocks are computed.

    It takes one document a row and works inside `around_step`. Less memory than gathering, which
    tells at very long sequences. CUDA and half precision only.

    Args:
        mesh: The context axis.
        use_kernel: True; there is no other.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        if documents is not None:
            raise ValueError(
                "strategy.context_attention='ring' takes one document a row; "
                "use 'all_gather' for packed rows"
            )
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        return flash_attention(q, k, v)

    attend.needs_mask = False  # type: ignore[attr-defined]
    return attend


CONTEXT_ATTENTIONS: dict[str, Callable[[DeviceMesh, bool], Attend]] = {
    'all_gather': gather_attention,
    'ring': ring_attention,
}
"""How ranks that share a sequence exchange keys and values."""


def check_exchange(exchange: str) -> None:
    """Raise ValueError if `strategy.context_attention` is no name in CONTEXT_ATTENTIONS."""
    if exchange not in CONTEXT_ATTENTIONS:
        hint = did_you_mean(exchange, CONTEXT_ATTENTIONS)
        raise ValueError(f'strategy.context_attention={exchange!r}.{hint}')


def check_documents(exchange: str, degree: int, max_docs: int, key: str) -> None:
    """Refuse packed rows where the exchange cannot keep documents apart.

    Args:
        exchange: A name in CONTEXT_ATTENTIONS.
        degree: Ranks of the context axis.
        max_docs: Most documents that a row may hold.
        key: The config's key of the loader.

    Raises:
        ValueError: With the key and what would work.
    """
    if degree > 1 and exchange == 'ring' and max_docs > 1:
        raise ValueError(
            f"strategy.context_attention='ring' takes one document a row, {key}.dataset packs "
            f"several: use 'all_gather'"
        )


def around_step(
    mesh: DeviceMesh | None, exchange: str, seq_len: int, device: torch.device
) -> AbstractContextManager[None]:
    """What forward and backward must run in; nothing but for torch's ring.

    Args:
        mesh: The context axis, if there is one.
        exchange: A name in CONTEXT_ATTENTIONS.
        seq_len: Tokens of a whole row.
        device: Where the model runs.
    """
    if mesh is None or exchange != 'ring':
        return nullcontext()
    # torch wants to cut up a tensor of ours to learn the length; the batch is cut already.
    positions = torch.arange(seq_len, device=device)
    return context_parallel(
        mesh, buffers=[positions], buffer_seq_dims=[0], no_restore_buffers={positions}
    )
