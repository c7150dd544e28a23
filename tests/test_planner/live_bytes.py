"""Counts the bytes of all tensors that are alive, operation by operation: an oracle for peaks."""

from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm_mm.utils.shards import local_tensor


class LiveBytes(TorchDispatchMode):
    """Inside `with`, follows every storage that an operation reads or makes until it is freed.

    What kernels take and give back inside one operation is not seen.

    Attributes:
        peak: The most bytes alive at once.
        at_peak: The operation that had just ended then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.at_peak = ''
        self._storages: dict[int, Any] = {}

    def follow(self, tensor: Tensor) -> None:
        """Count what exists already."""
        local = local_tensor(tensor)
        if not local.is_meta:
            storage = local.untyped_storage()
            self._storages[storage._cdata] = ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        now = 0
        for key, weak in list(self._storages.items()):
            storage = weak()
            if storage is None:
                del self._storages[key]
            else:
                now += storage.nbytes()  # asked anew: FSDP2 empties storages in place
        if now > self.peak:
            self.peak, self.at_peak = now, str(func)
        return out
