"""Who a rank that is not there would talk to."""

from pathlib import Path

import pytest
import torch.distributed as dist

from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_rank import groups_of, pretended_group
from internlm_mm.parallel.mesh import Layout, ParallelMesh
from tests.helpers import tiny_config
from tests.test_engine.test_rehearse import SMALL


def test_groups_are_the_mesh() -> None:
    layout = Layout(pipeline=2, data_replicate=2, data_shard=2, context=2, tensor=2)
    for rank in (0, 13, 31):
        with pretended_group(rank, 32):
            mesh = ParallelMesh(layout, 'cpu')
            assert mesh.tensor and mesh.context and mesh.pipeline
            expected = {
                'tensor': mesh.tensor.mesh.tolist(),
                'context': mesh.context.mesh.tolist(),
                'pipeline': mesh.pipeline.mesh.tolist(),
            }
            place = mesh.fsdp.get_coordinate()
            assert place is not None
            expected['shard'] = mesh.fsdp.mesh[place[0]].tolist()
            expected['data_replicate'] = mesh.fsdp.mesh[:, place[1]].tolist()
        found = groups_of(layout, rank, gpus_per_node=8)
        assert {kind: group['ranks'] for kind, group in found.items()} == expected
        assert found['tensor']['inside_node']
        assert not found['pipeline']['inside_node']
        config = tiny_config(Path('unused'), **SMALL, strategy__parallel=layout.as_dict())
        (one,) = rehearse(config, 32, rank=rank)['ranks']
        assert one['groups'] == found
    assert not dist.is_initialized()


def test_a_process_of_a_job_does_not_rehearse() -> None:
    with (
        pretended_group(0, 2),
        pytest.raises(ValueError, match='without a launcher'),
        pretended_group(0, 2),
    ):
        pass
    assert not dist.is_initialized()
