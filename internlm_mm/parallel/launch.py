"""Join the job's processes."""

import datetime

import torch
import torch.distributed as dist
from mmengine.logging import MMLogger

from internlm_mm.utils.launch import Launch, host_name


def join_process_group(
    launcher: str,
    launch: Launch,
    device: torch.device,
    timeout: datetime.timedelta,
    backend: str | None = None,
) -> int:
    """Create the default process group. Collective; nothing to do for one process.

    Args:
        launcher: 'none', or who started the processes.
        launch: This process's place.
        device: The process's device.
        timeout: How long a collective may wait for a rank.
        backend: For tensors on the device: gloo on CPUs and NCCL on GPUs by default. Small counts
            always travel through gloo from host memory, so that they never wait for a GPU.

    Returns:
        Processes on this machine (the smallest number over all machines).

    Raises:
        ValueError: If another program listens where they are to meet.
    """
    if launcher != 'none' and not dist.is_initialized():
        try:
            _create_group(launcher, launch, device, timeout, backend)
        except dist.DistNetworkError as error:
            if 'EADDRINUSE' not in str(error):
                raise
            raise ValueError(
                f'MASTER_PORT={launch.master_port}: another program listens there on '
                f'{host_name()}. Set another one, the same for all processes'
            ) from error
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 1
    hosts: list[str] = [''] * dist.get_world_size()
    dist.all_gather_object(hosts, host_name())
    return min(hosts.count(host) for host in hosts)


def _create_group(
    launcher: str,
    launch: Launch,
    device: torch.device,
    timeout: datetime.timedelta,
    backend: str | None,
) -> None:
    cuda = device.type == 'cuda'
    # torchrun brings a store of its own; others meet at rank 0.
    store = (
        None
        if launcher == 'pytorch'
        else dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=launch.rank == 0,
            timeout=timeout,
        )
    )
    dist.init_process_group(
        with_host_backend(backend, cuda),
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )


def with_host_backend(backend: str | None, cuda: bool) -> str:
    """torch's name for a backend that serves host memory, too: 'nccl' -> 'cpu:gloo,cuda:nccl'."""
    if backend is not None and (':' in backend or backend == 'gloo'):
        return backend
    return f'cpu:gloo,cuda:{backend or "nccl"}' if cuda else backend or 'gloo'


def unused_timestamp(timestamp: str, experiment_name: str | None) -> str:
    """A timestamp with which no run of this process has got its name yet.

    MMEngine keeps a run's log, curves and scope under its name and the second of its start. Two
    runs that begin within one second would share them: the second would write to the folder of
    the first.

    Args:
        timestamp: Of the start: `20261231_235959`.
        experiment_name: What the run's name begins with, if anything.

    Returns:
        The same, or the next second that is free.
    """
    prefix = '' if experiment_name is None else f'{experiment_name}_'
    layout = '%Y%m%d_%H%M%S'
    while MMLogger.check_instance_created(prefix + timestamp):
        later = datetime.datetime.strptime(timestamp, layout) + datetime.timedelta(seconds=1)
        timestamp = later.strftime(layout)
    return timestamp
