"""What this device does at best, measured: matrix products, copies, sums over ranks.

Rates from data sheets are not reached; these are what a step may be compared with.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from internlm_mm.utils.device import synchronize

# [rows, in] x [in, out]: a layer of 7B width on a GPU; on a CPU what a few cores do in a moment.
MATMUL_SIZES = {'cuda': (8192, 4096, 11_008), 'cpu': (512, 1024, 2752)}
_COPY_BYTES = {'cuda': 1 << 30, 'cpu': 1 << 27}
_HOST_BYTES = 1 << 28
_REDUCE_BYTES = {'cuda': 1 << 29, 'cpu': 1 << 25}


def repeat_for(step: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Seconds of one call, over as many as fit into `seconds`, at least three.

    The device is waited for now and then only, so that launching hides behind the work.
    """
    step()
    synchronize(device)
    calls, spent, batch = 0, 0.0, 1
    while spent < seconds or calls < 3:
        start = time.perf_counter()
        for _ in range(batch):
            step()
        synchronize(device)
        took = time.perf_counter() - start
        calls, spent = calls + batch, spent + took
        if took < 0.05:
            batch *= 2
    return spent / calls


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 1.0,
    sizes: tuple[int, int, int] | None = None,
) -> float:
    """FLOP/s of the three matrix products of a linear layer: forward, both gradients.

    Long enough, this is the rate that a GPU's power cap allows, which is less than its first
    milliseconds'.

    Args:
        device: Where.
        dtype: Of the factors.
        seconds: How long to measure.
        sizes: Rows, inputs and outputs; by default those of `MATMUL_SIZES`.
    """
    rows, inner, outer = sizes or MATMUL_SIZES.get(device.type, MATMUL_SIZES['cpu'])
    # Random: the power that products take, and with it the clock, depends on the bits.
    x, weight, gradient = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((rows, inner), (outer, inner), (rows, outer))
    )

    def products() -> None:
        F.linear(x, weight)
        gradient @ weight
        gradient.t() @ x

    return 6.0 * rows * inner * outer / repeat_for(products, seconds, device)


def float8_matmul_rate(
    device: torch.device, seconds: float = 1.0, sizes: tuple[int, int, int] | None = None
) -> float:
    """FLOP/s of a product in float8 (e4m3, a scale a tensor) with a bfloat16 result.

    Raises:
        RuntimeError: If the device has none.
    """
    rows, inner, outer = sizes or MATMUL_SIZES.get(device.type, MATMUL_SIZES['cpu'])
    x, weight = (
        torch.randn(shape, device=device).to(torch.float8_e4m3fn)
        for shape in ((rows, inner), (outer, inner))
    )
    one = torch.ones((), device=device)

    def product() -> None:
        torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2.0 * rows * inner * outer / repeat_for(product, seconds, device)


def copy_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second read and written by a copy inside the device's memory."""
    size = _COPY_BYTES.get(device.type, _COPY_BYTES['cpu'])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / repeat_for(lambda: target.copy_(source), seconds, device)


def host_copy_rates(device: torch.device, seconds: float = 0.5) -> tuple[float, float]:
    """Bytes per second from page-locked host memory to a GPU, and back."""
    host = torch.zeros(_HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_HOST_BYTES, dtype=torch.uint8, device=device)
    up = repeat_for(lambda: there.copy_(host, non_blocking=True), seconds, device)
    down = repeat_for(lambda: host.copy_(there, non_blocking=True), seconds, device)
    return _HOST_BYTES / up, _HOST_BYTES / down


def all_reduce_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bus bytes per second of a sum over all ranks of the job. Collective.

    2 (n - 1) / n of the tensor's bytes pass each rank's link in a ring, whatever really runs, so
    that figures of different n compare with a link's rate.
    """
    ranks = dist.get_world_size()
    size = _REDUCE_BYTES.get(device.type, _REDUCE_BYTES['cpu'])
    tensor = torch.zeros(size // 4, device=device)

    def several(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(tensor)
        synchronize(device)
        return time.perf_counter() - start

    several(2)  # the first one connects
    slowest = torch.tensor([several(1)], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # every rank must call as often as the others
    calls = max(3, int(seconds / slowest.item()))
    return 2 * (ranks - 1) / ranks * size / (several(calls) / calls)
