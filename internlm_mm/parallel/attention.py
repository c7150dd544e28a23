"""Puts the attention backend of the config, or the best one here, on every layer."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from internlm_mm.ops.attention import Attend, Documents, needs_mask
from internlm_mm.ops.attention_choice import attention_obstacles, choose_attention
from internlm_mm.ops.needs import Needs
from internlm_mm.parallel.context import CONTEXT_ATTENTIONS
from internlm_mm.registry import ATTENTIONS
from internlm_mm.utils.suggest import did_you_mean


def apply_attention(
    model: nn.Module,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    context: DeviceMesh | None = None,
    context_attention: str = 'all_gather',
    elsewhere: bool = False,
) -> str:
    """Set `attend` on every module that has one.

    'auto' may mean one backend for rows of one document and another for packed rows; which rows
    come is only known batch by batch.

    Args:
        model: Changed in place.
        name: A name in ATTENTIONS, or 'auto'.
        device: Where the model will run.
        dtype: What it computes in.
        context: The mesh axis whose ranks share each sequence, if there is one.
        context_attention: A name in CONTEXT_ATTENTIONS: how they exchange keys and values.
        elsewhere: Whether the model will run on another machine, see `choose_attention`.

    Returns:
        What was chosen and why, for the log.

    Raises:
        ValueError: If a backend is unknown or cannot serve what is asked.
    """
    if context is not None:
        ranks = context.size()
        width = head_dim_of(model)
        backend = check_shared_attention(
            name, device, dtype, ranks, context_attention, width, elsewhere
        )
        _set(model, CONTEXT_ATTENTIONS[context_attention](context, backend == 'varlen'))
        return f'{backend}, keys and values by {context_attention} over {ranks} ranks'
    width = head_dim_of(model)
    dense_name, reason = choose_attention(name, device, dtype, False, width, elsewhere)
    attend = ATTENTIONS.get(dense_name)
    chosen = dense_name
    if name == 'auto':
        packed_name, packed_reason = choose_attention(name, device, dtype, True, width, elsewhere)
        if packed_name != dense_name:
            attend = _by_rows(attend, ATTENTIONS.get(packed_name))
            chosen = f'{dense_name} ({reason}), packed rows {packed_name}'
            reason = packed_reason
    _set(model, attend)
    return f'{chosen}: {reason}'


def check_shared_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    degree: int,
    exchange: str,
    head_dim: int | None = None,
    elsewhere: bool = False,
) -> str:
    """The backend for sequences that ranks share: a kernel between boundaries, or a mask.

    Args:
        name: A name in ATTENTIONS, or 'auto'.
        device: Where the model will run.
        dtype: What it computes in.
        degree: Ranks of the context axis, for messages.
        exchange: A name in CONTEXT_ATTENTIONS.
        head_dim: Width of a head, where that is known.
        elsewhere: Whether the model will run on another machine.

    Raises:
        ValueError: If one of them is unknown or cannot serve what is asked.
    """
    if exchange not in CONTEXT_ATTENTIONS:
        hint = did_you_mean(exchange, CONTEXT_ATTENTIONS)
        raise ValueError(f'strategy.context_attention={exchange!r}.{hint}')
    if name not in ('auto', 'varlen', 'sdpa'):
        raise ValueError(
            f'strategy.attention={name!r} does not work with strategy.parallel.context='
            f"{degree}: use 'auto', 'varlen' (CUDA, half precision) or 'sdpa' (a mask)"
        )
    if name == 'auto':  # of these two; what is faster for whole rows serves no parts of them
        found = attention_obstacles('varlen', device, dtype, True, head_dim, elsewhere)
        name = 'sdpa' if found else 'varlen'
    backend, _ = choose_attention(name, device, dtype, True, head_dim, elsewhere)
    if exchange == 'ring' and backend != 'varlen':
        raise ValueError(
            "strategy.context_attention='ring' needs CUDA in half precision; "
            "'all_gather' runs everywhere"
        )
    return backend


def check_packed_rows(name: str, max_docs: int, key: str) -> None:
    """Refuse packed rows where a backend that is named takes one document a row.

    Args:
        name: A name in ATTENTIONS, or 'auto'.
        max_docs: Most documents that a row may hold.
        key: The config's key of the loader.

    Raises:
        ValueError: With both keys and what would work.
    """
    needs = getattr(ATTENTIONS.module_dict.get(name), 'needs', Needs())
    if max_docs > 1 and not needs.packed:
        raise ValueError(
            f'strategy.attention={name!r} takes one document a row, {key}.dataset packs several: '
            "use 'varlen', or 'auto', which picks one for either"
        )


def head_dim_of(model: nn.Module) -> int | None:
    """Width of the widest head of the layers that attend, or None where none says so."""
    widths = (getattr(m, 'head_dim', None) for m in model.modules() if hasattr(m, 'attend'))
    return max((width for width in widths if isinstance(width, int)), default=None)


def _set(model: nn.Module, attend: Attend) -> None:
    for module in model.modules():
        if hasattr(module, 'attend'):
            module.attend = attend  # type: ignore[assignment]


def _by_rows(dense: Attend, packed: Attend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        return (dense if documents is None else packed)(q, k, v, documents)

    attend.needs_mask = needs_mask(packed)  # type: ignore[attr-defined]
    return attend
