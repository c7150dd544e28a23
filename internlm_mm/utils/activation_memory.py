"""How much of what a forward computes is kept for backward, by module."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from internlm_mm.utils.shards import local_tensor


class ActivationMeter:
    """Counts the bytes that autograd keeps from each module's forward until backward.

    A storage counts once and whole, for the module that keeps it first, from when autograd takes it
    until it lets go; parameters never count. Inside a recomputed layer autograd keeps nothing, so
    what such a layer holds for a moment in backward does not count. A module that is compiled is
    one piece. No value is changed.

    Args:
        model: Modules are told apart by their names in it; '' is the model itself. Or the parts of
            a model that are called one by one, as stages of a pipeline are.
        parameters: Tensors whose storages are no activations, asked at the end of a forward;
            the model's parameters when None.

    Attributes:
        by_module: Bytes that each module holds at the end of the forward that held most.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        parameters: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        self.by_module: dict[str, int] = {}
        self._parts = [model] if isinstance(model, nn.Module) else list(model)
        self._parameters = parameters or (lambda: (p for m in self._parts for p in m.parameters()))
        self._kept: dict[int, _Storage] = {}
        self._inside: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._compiled: list[tuple[nn.Module, Any]] = []
        self._packing: torch.autograd.graph.saved_tensors_hooks | None = None

    def attach(self) -> None:
        """Watch every forward from now on."""
        covered: set[nn.Module] = set()
        for name, module in (pair for part in self._parts for pair in part.named_modules()):
            if module in covered:
                continue
            compiled = getattr(module, '_compiled_call_impl', None)
            if compiled is not None and name:
                # Hooks would be compiled with it, or be left out; so its call is watched instead.
                module._compiled_call_impl = partial(self._call, name, compiled)
                self._compiled.append((module, compiled))
                covered.update(module.modules())
                continue
            enter, leave = (self._enter, self._leave) if name else (self._begin, self._end)
            self._handles.append(module.register_forward_pre_hook(partial(enter, name)))
            self._handles.append(
                module.register_forward_hook(partial(leave, name), always_call=True)
            )

    def detach(self) -> None:
        """Leave the model as it was. Harmless when not attached."""
        for handle in self._handles:
            handle.remove()
        for module, compiled in self._compiled:
            module._compiled_call_impl = compiled
        self._handles, self._compiled = [], []
        self._stop_packing()

    def _begin(self, name: str, *_: Any) -> None:
        self._inside = [name]
        pack, unpack = self._pack, _unpack
        if self._compiled:  # or they would be compiled, too
            pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
        self._packing = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        self._packing.__enter__()

    def _end(self, *_: Any) -> None:
        self._stop_packing()
        self._inside = []
        no_activation = {_key(local_tensor(tensor)) for tensor in self._parameters()}
        found: dict[str, int] = {}
        for key, storage in self._kept.items():
            if key not in no_activation:
                found[storage.module] = found.get(storage.module, 0) + storage.bytes
        if sum(found.values()) > sum(self.by_module.values()):
            self.by_module = found

    def _stop_packing(self) -> None:
        if self._packing is not None:
            self._packing.__exit__()
            self._packing = None

    def _enter(self, name: str, *_: Any) -> None:
        self._inside.append(name)

    def _leave(self, name: str, *_: Any) -> None:
        if name in self._inside:  # recomputation in backward may stop half-way
            del self._inside[self._inside.index(name) :]

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._enter(name)
        try:
            return function(*args, **kwargs)
        finally:
            self._leave(name)

    def _pack(self, tensor: Tensor) -> '_Kept':
        local = local_tensor(tensor)
        key = _key(local)
        if key not in self._kept:
            self._kept[key] = _Storage(self._inside[-1], local.untyped_storage().nbytes())
        self._kept[key].uses += 1
        # Detached: a node that held its own output would never be freed.
        return _Kept(tensor.detach(), partial(self._release, key))

    def _release(self, key: int) -> None:
        storage = self._kept[key]
        storage.uses -= 1
        if not storage.uses:
            del self._kept[key]


class _Storage:
    """Memory that autograd keeps, and for whom."""

    def __init__(self, module: str, size_bytes: int) -> None:
        self.module, self.bytes, self.uses = module, size_bytes, 0


class _Kept:
    """Stands for a tensor in autograd's graph and tells when the graph lets go of it."""

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        self.release()


def _unpack(kept: _Kept) -> Tensor:
    return kept.tensor


def _key(tensor: Tensor) -> int:
    """The same for all views of a storage, and no other's while one of them lives."""
    return tensor.untyped_storage()._cdata
