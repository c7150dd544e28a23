"""This rank's part of a tensor."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from internlm_mm.utils.shards import local_tensor
from tests.ranks import Ranks


def zeroed_here() -> list[list[float]]:
    """Rank 1 writes through its part; the whole tensor as all ranks see it then."""
    mesh = init_device_mesh('cpu', (2,))
    tensor = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    if dist.get_rank() == 1:
        local_tensor(tensor).zero_()
    return tensor.full_tensor().tolist()


def test_a_part_shares_memory(two_ranks: Ranks) -> None:
    expected = [[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]]  # rank 0 has two of the three rows
    assert two_ranks(zeroed_here) == [expected, expected]


def test_other_tensors_are_their_own_part() -> None:
    tensor = torch.ones(2)
    assert local_tensor(tensor) is tensor


def test_a_wrapped_master_is_what_it_wraps():
    """As torchao wraps weights that are gathered in 8 bits."""
    inner, wrapper = torch.ones(2), torch.ones(2)
    wrapper._tensor = inner
    assert local_tensor(wrapper) is wrapper  # any tensor may have such an attribute
    wrapper.fsdp_pre_all_gather = lambda mesh: None
    assert local_tensor(wrapper) is inner
