"""What a kernel asks of the machine and the installation, and in which words it is refused."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a kernel asks for; the defaults ask for nothing.

    Attributes:
        module: What it is imported from, if that is no requirement of ours.
        install: What to type where that is missing.
        cuda: Whether it runs on CUDA devices only.
        half: Whether it takes float16 and bfloat16 only.
        capability: The oldest compute capability that it runs on.
        majors: Major compute capabilities that it was written for; none for all of them.
        packed: Whether a row may hold several documents.
        head_dim: The widest head it takes; None for any.
        head_dim_multiple: Of what the width of a head is a multiple, where there is a widest.
    """

    module: str | None = None
    install: str = ''
    cuda: bool = False
    half: bool = False
    capability: tuple[int, int] = (0, 0)
    majors: tuple[int, ...] = ()
    packed: bool = True
    head_dim: int | None = None
    head_dim_multiple: int = 8


def obstacles(
    needs: Needs,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    head_dim: int | None = None,
    elsewhere: bool = False,
) -> list[str]:
    """Every reason why a kernel cannot run, as predicates of its name; empty if it can.

    Args:
        needs: What it asks for.
        device: Where it would run. A GPU that is not in this machine is not asked for its age.
        dtype: What it would compute in.
        packed: Whether rows may hold several documents.
        head_dim: Width of a head, where that is known.
        elsewhere: Whether it would run on another machine: no GPU of this one is asked for its age.
    """
    found = []
    kind = torch.device(device).type
    is_half = dtype in (torch.float16, torch.bfloat16)
    if (needs.cuda and kind != 'cuda') or (needs.half and not is_half):
        precision = ' in half precision' if needs.half else ''
        found.append(f'needs CUDA{precision}, not {kind} in {dtype}')
    elif kind == 'cuda' and not elsewhere and torch.cuda.is_available():
        found += _obstacles_of_gpu(needs, torch.cuda.get_device_capability(device))
    if packed and not needs.packed:
        found.append('takes one document a row')
    wide, unit = needs.head_dim, needs.head_dim_multiple
    if head_dim is not None and wide is not None and (head_dim > wide or head_dim % unit):
        found.append(f'takes heads of up to {wide} channels, a multiple of {unit}, not {head_dim}')
    return found + missing_package(needs)


def _obstacles_of_gpu(needs: Needs, capability: tuple[int, int]) -> list[str]:
    this = 'sm_{}{}'.format(*capability)
    if capability < needs.capability:
        return ['needs a GPU of sm_{}{} or newer, not {}'.format(*needs.capability, this)]
    if needs.majors and capability[0] not in needs.majors:
        known = ', '.join(f'sm_{major}x' for major in needs.majors)
        return [f'needs a GPU of {known}, not {this}']
    return []


def missing_package(needs: Needs) -> list[str]:
    """Why the package of a kernel cannot be imported here, as one predicate; empty if it can.

    Args:
        needs: What the kernel asks for.
    """
    if needs.module is None:
        return []
    module, install = needs.module, needs.install
    package = module.partition('.')[0]
    try:
        if find_spec(package) is None:
            return [f'is not installed: {install}']
        with warnings.catch_warnings():  # an error, where the caller turns warnings into errors
            warnings.simplefilter('ignore')
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return [f'is not installed: {install}']
        return [f'cannot be imported ({error}): {install}']
    except Exception as error:  # whatever another package does at import, 'auto' goes on
        return [f'cannot be imported ({type(error).__name__}: {error}): {install}']
    return []
