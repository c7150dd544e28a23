import pytest
from torch import nn

from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_report import ranges, render, size
from internlm_mm.registry import MODELS
from tests.helpers import tiny_config
from tests.test_engine.test_rehearse import SMALL


@pytest.mark.parametrize(
    ('numbers', 'text'),
    [
        ([], ''),
        ([3], '3'),
        ([0, 1], '0,1'),
        ([4, 5, 6], '4-6'),
        ([0, 8, 16], '0,8,16'),
        ([0, 8, 16, 24], '0,8,...,24'),
        ([1, 2, 4], '1,2,4'),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_sizes() -> None:
    assert size(3 * 2**29) == '1.50 GiB'
    assert size(2**20) == '1.00 MiB'


def test_the_page(tmp_path) -> None:
    parallel = dict(pipeline=2, tensor=2, data_shard=2, data_replicate=2)
    page = render(rehearse(tiny_config(tmp_path, **SMALL, strategy__parallel=parallel), 16))
    lines = page.splitlines()
    assert lines[0] == 'rehearsal  16 GPUs: 2 nodes of 8'
    assert '  0         embedding | 0,1   0: 0-7' in lines
    assert '  1         2,3 | norm, head  1: 8-15' in lines
    assert '  tensor          0  1  0  1  0  1  0  1' in lines
    assert '  data_shard      0  0  1  1  0  0  1  1' in lines
    assert 'rank 8: node 1, GPU 0; pipeline 1, data_replicate 0, data_shard 0' in page
    assert '  pipeline        2  0,8  across nodes' in lines
    assert '  shard           2  0,2  inside the node' in lines
    row = next(line for line in lines if 'down_proj.weight' in line)
    assert row.split('  ')[-1] == 'shard: dim 0, tensor: dim 1'
    assert '32 x 48' in row and '16 x 24' in row
    assert 'then in all' in page
    assert lines[-1].endswith('nothing was trained')


def test_long_jobs_are_abbreviated(tmp_path) -> None:
    changes = SMALL | dict(train_cfg__global_batch_size=256, strategy__parallel=dict(pipeline=4))
    page = render(rehearse(tiny_config(tmp_path, **changes), 256))
    assert '  0         embedding | 0   0: 0-7   1: 8-15   ...   7: 56-63' in page
    small = SMALL | dict(model__num_layers=8, strategy__parallel=dict(pipeline=8))
    page = render(rehearse(tiny_config(tmp_path, **small), 8))
    assert '4 more ranks were rehearsed' in page


def test_a_model_of_another_kind_has_no_memory(tmp_path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

    MODELS.register_module(module=Table, force=True)
    report = rehearse(tiny_config(tmp_path, model=dict(type='Table')), 2)
    assert report['ranks'][0]['parameters']['of'] == 40
    assert 'not reckoned' in render(report)
