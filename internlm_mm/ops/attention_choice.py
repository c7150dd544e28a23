"""Which attention backend runs a model: the one that is named, or the fastest that works here."""

from __future__ import annotations

import torch

from internlm_mm.ops.attention_trial import fault_of
from internlm_mm.ops.needs import Needs, missing_package, obstacles
from internlm_mm.registry import ATTENTIONS
from internlm_mm.utils.suggest import did_you_mean

PREFERRED: dict[bool, tuple[str, ...]] = {
    False: ('flash4', 'cudnn'),
    True: ('flash4', 'varlen'),
}
"""What 'auto' takes on CUDA in half precision, by whether rows are packed: the first that runs
here, or 'sdpa'. A backend is put in front of the others here, once it was measured to be faster in
whole training steps (docs/en/performance.md)."""

_REASONS = {
    False: 'one document a row: the fastest here in half precision',
    True: 'documents are packed: no work is done across boundaries',
}


def choose_attention(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    packed: bool,
    head_dim: int | None = None,
    elsewhere: bool = False,
) -> tuple[str, str]:
    """Resolve 'auto' to a backend and check that a named one can run.

    Args:
        name: A name in ATTENTIONS, or 'auto'.
        device: Where the model runs.
        dtype: Dtype of queries, keys and values.
        packed: Whether a row may hold several documents.
        head_dim: Width of a head, where that is known.
        elsewhere: Whether the model will run on another machine: a package that a named backend
            needs may be there, and its reason says that it is not here.

    Returns:
        The backend's name in ATTENTIONS, and why, for the log.

    Raises:
        ValueError: If the name is unknown or the backend cannot serve what is asked; never for
            'auto'. Backends of other packages are tried first, with their gradients.
    """
    asked = (device, dtype, packed, head_dim, elsewhere)
    if name == 'auto':
        kind = torch.device(device).type
        if kind != 'cuda' or dtype not in (torch.float16, torch.bfloat16):
            return 'sdpa', f'{kind} in {dtype}: torch picks the kernel'
        refused: list[str] = []
        for candidate in PREFERRED[packed]:
            found = attention_obstacles(candidate, *asked) or _faults(candidate, *asked)
            if not found:
                reason = _REASONS[packed]
                return candidate, '; '.join([reason, *refused])
            refused.append(f'{candidate} {found[0]}')
        return 'sdpa', '; '.join(refused)
    if ATTENTIONS.get(name) is None:
        choices = [*ATTENTIONS.module_dict, 'auto']
        hint = did_you_mean(name, choices)
        raise ValueError(f'strategy.attention={name!r} is unknown.{hint}')
    found = attention_obstacles(name, *asked)
    reason = 'named in the config'
    if elsewhere:
        missing = missing_package(getattr(ATTENTIONS.get(name), 'needs', Needs()))
        found = [one for one in found if one not in missing]
        reason = '; on this machine it '.join([reason, *missing])
    found = found or _faults(name, *asked)
    if found:
        raise ValueError(
            f"strategy.attention={name!r} {'; '.join(found)}; 'auto' picks one that runs"
        )
    return name, reason


def attention_obstacles(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    packed: bool,
    head_dim: int | None = None,
    elsewhere: bool = False,
) -> list[str]:
    """Every reason why a backend cannot run here; arguments as `choose_attention`.

    A plug-in that has no attribute `needs` is taken at its word: none.
    """
    needs = getattr(ATTENTIONS.get(name), 'needs', Needs())
    return obstacles(needs, device, dtype, packed=packed, head_dim=head_dim, elsewhere=elsewhere)


def _faults(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    packed: bool,
    head_dim: int | None,
    elsewhere: bool,
) -> list[str]:
    """What a trial on this machine finds against a backend of another package."""
    device = torch.device(device)
    needs = getattr(ATTENTIONS.get(name), 'needs', Needs())
    is_here = device.type != 'cuda' or torch.cuda.is_available()
    if needs.module is None or elsewhere or not is_here:
        return []
    fault = fault_of(name, device, dtype, packed, head_dim)
    return [] if fault is None else [fault]
