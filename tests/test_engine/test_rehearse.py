"""A rank that is rehearsed holds what a rank that is started holds."""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_report import render
from internlm_mm.engine.train_cli import parse_args, resolve_config
from internlm_mm.utils.shards import local_tensor
from tests.helpers import tiny_config, tiny_runner

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = dict(
    model__num_layers=4,
    model__num_heads=4,
    train_cfg__global_batch_size=16,
    train_cfg__micro_batch_size=1,
    val_dataloader=None,
    val_cfg=None,
)
TOTAL = 2 * 64 * 32 + 4 * (4 * (32 * 32 + 32) + 3 * 32 * 48 + 2 * 32) + 32
PAIRS = dict(model__objective=dict(type='DPO'), model__adapter=dict(type='LoRA', rank=4))
WHOLE = 4 * 3 * 32 + 32  # two norms and the bias of o in every layer, and the last norm


def shipped(name: str, *options: str) -> dict:
    arguments = [str(CONFIGS / name), '--cfg-options', *options]
    return rehearse(resolve_config(parse_args(arguments if options else arguments[:1])), 1024)


def started_shapes(work_dir: str, changes: dict) -> dict[str, tuple]:
    """What a rank of a real group of processes holds."""
    runner = tiny_runner(Path(work_dir), default_hooks={}, **changes)
    runner.prepare_training()
    found = {}
    for name, parameter in runner.model.named_parameters():
        local = local_tensor(parameter)
        found[name] = (list(parameter.shape), list(local.shape))
    return found


@pytest.mark.parametrize('axis', ['data_shard', 'data_replicate', 'context', 'tensor', 'pipeline'])
def test_shapes_are_those_of_a_run(two_ranks, tmp_path: Path, axis: str) -> None:
    precision = dict(param='bfloat16', reduce='float32')
    changes = SMALL | dict(strategy__parallel={axis: 2}, strategy__precision=precision)
    started = two_ranks(started_shapes, str(tmp_path), changes)
    for rank in (0, 1):
        report = rehearse(tiny_config(tmp_path, **changes), 2, rank=rank)
        (found,) = report['ranks']
        shapes = {one['name']: (one['global'], one['local']) for one in found['shapes']}
        assert shapes == started[rank]


@pytest.mark.parametrize(
    ('parallel', 'copies', 'tensor'),
    [
        (dict(data_shard=8), 1, 1),
        (dict(data_replicate=2, data_shard=2, context=2), 2, 1),
        (dict(pipeline=4, data_shard=2), 1, 1),
        (dict(pipeline=2, data_replicate=2, tensor=2), 2, 2),
        (dict(pipeline=2, context=2, tensor=2), 1, 2),
    ],
)
def test_all_ranks_together_hold_the_model(
    tmp_path: Path, parallel: dict, copies: int, tensor: int
) -> None:
    config = tiny_config(tmp_path, **SMALL, strategy__parallel=parallel)
    ranks = [rehearse(config, 8, rank=rank)['ranks'][0] for rank in range(8)]
    held = sum(rank['parameters']['here'] for rank in ranks)
    assert held == copies * (TOTAL + (tensor - 1) * WHOLE)
    # The planner knew every shard, also of the ranks that are not the first.
    assert all(rank['memory'] for rank in ranks)
    for rank in ranks:
        if rank['coordinate']['data_shard'] == rank['coordinate']['context'] == 0:
            assert rank['memory']['kinds']['parameters'] == rank['parameters']['bytes']


@pytest.mark.slow
def test_seven_billion_on_1024_gpus() -> None:
    report = shipped(
        'internlm_7b_pretrain.py', 'strategy.parallel.pipeline=4', 'strategy.parallel.tensor=2'
    )
    assert report['nodes'] == 128
    assert report['model']['parameters'] == 7_321_948_160
    assert report['layout'] == dict(
        pipeline=4, data_replicate=32, data_shard=4, context=1, tensor=2
    )
    assert [rank['rank'] for rank in report['ranks']] == [0, 256, 512, 768]
    assert sum(rank['parameters']['of'] for rank in report['ranks']) == 7_321_948_160
    assert report['data']['checked'].startswith('not checked: ')
    assert report['step']['micro_batches'] == 8
    peaks = [rank['memory']['peak'] for rank in report['ranks']]
    assert peaks[0] > peaks[1] > peaks[2]  # micro-batches wait longest on the first stage


def test_twenty_billion_on_1024_gpus() -> None:
    (rank,) = shipped('internlm_20b_pretrain.py')['ranks']
    assert rank['parameters']['of'] == 20_089_943_040
    assert rank['memory']['kinds']['parameters'] == 4 * rank['parameters']['here']
    assert rank['groups']['shard']['ranks'] == list(range(8))


def test_interleaved_stages(tmp_path: Path) -> None:
    pipeline = dict(schedule='interleaved_1f1b', stages_per_rank=2)
    parallel = dict(pipeline=2, data_shard=4)
    config = tiny_config(
        tmp_path, **SMALL, strategy__parallel=parallel, strategy__pipeline=pipeline
    )
    report = rehearse(config, 8)
    assert [stage['layers'] for stage in report['stages']] == [
        {0: ['0'], 2: ['2']},
        {1: ['1'], 3: ['3']},
    ]
    assert [stage['head'] for stage in report['stages']] == [False, True]
    assert all(rank['memory'] for rank in report['ranks'])


@pytest.mark.parametrize(
    ('world_size', 'changes', 'message'),
    [
        (0, {}, '--rehearse 0: a job has at least 1 GPU'),
        (12, {}, 'do not fill machines of 8; nearest: 8 or 16'),
        (8, dict(strategy__parallel=dict(data_shard=3)), 'there are 8'),
        (32, {}, 'take a multiple of 32, for example 32'),
        (8, dict(strategy__parallel=dict(tensor=8)), 'tensor=8 does not divide model.num_heads=4'),
        (
            8,
            dict(strategy__parallel=dict(pipeline=8)),
            'the model has 4. Nearest',
        ),
        (
            8,
            dict(
                strategy__parallel=dict(pipeline=2),
                strategy__pipeline=dict(schedule='zbv_zero_bubble'),
                strategy__compile=True,
            ),
            'does not work with strategy.compile=True',
        ),
        (8, dict(model__max_seq_len=16), 'seq_len=32 is longer than model.max_seq_len=16'),
        (8, dict(strategy__precision=dict(param='float16')), 'needs optim_wrapper.loss_scale'),
        (
            8,
            dict(train_cfg__rampup=dict(start=4, increment=4, interval=1)),
            'rampup: a step of=4 rows do not divide',
        ),
        (
            8,
            dict(PAIRS, strategy__parallel=dict(context=2)),
            'context=2: DPO needs whole answers on a rank',
        ),
        (
            8,
            dict(PAIRS, strategy__parallel=dict(pipeline=2)),
            'pipeline=2: DPO does not work in stages',
        ),
        (8, dict(model__objective=PAIRS['model__objective']), "'adapters_off', and the model has"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    tmp_path: Path, world_size: int, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(tiny_config(tmp_path, **(SMALL | changes)), world_size)
    assert not dist.is_initialized()


def test_ranks_and_nodes_that_are_not_there(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SMALL)
    with pytest.raises(ValueError, match='--rehearse-rank 8: the ranks are 0 to 7'):
        rehearse(config, 8, rank=8)
    with pytest.raises(ValueError, match='--gpus-per-node 0'):
        rehearse(config, 8, gpus_per_node=0)


def test_what_the_run_begins_from_is_told(tmp_path: Path) -> None:
    saving = {'default_hooks__checkpoint': {'type': 'StepCheckpointHook', 'interval': 2}}
    tiny_runner(tmp_path / 'old', train_cfg__max_iters=2, **saving).train()
    here = {'load_from': str(tmp_path / 'old')}
    report = rehearse(tiny_config(tmp_path / 'new', **here), 1)
    assert report['start'] == f'model of {tmp_path / "old" / "iter_2"}'
    assert f'start      model of {tmp_path / "old"}' in render(report)
    report = rehearse(tiny_config(tmp_path / 'old', resume=True), 1)
    assert report['start'].startswith('model, optimizer, data, scheduler of ')
    with pytest.raises(ValueError, match=r"another model: .*'model\.embed_tokens\.weight'"):
        rehearse(tiny_config(tmp_path / 'new', model__hidden_size=64, **here), 1)


def test_what_is_not_here_to_begin_from_is_told(tmp_path: Path) -> None:
    for changes in (SMALL, SMALL | {'resume': True}):
        report = rehearse(tiny_config(tmp_path / 'new', **changes), 2)
        assert report['start'] is None and 'start      ' not in render(report)
    for key in ('load_from', 'resume'):
        report = rehearse(tiny_config(tmp_path / 'new', **SMALL, **{key: '/data/none'}), 2)
        assert report['start'].startswith('not checked: ') and '/data/none' in report['start']
        assert 'start      not checked: ' in render(report)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'strategy__kernels': {'norm': 'tirch'}}, "kernels.norm='tirch'"),
        (
            {'strategy__kernels': {'norm': 'liger'}, 'strategy__parallel': {'tensor': 2}},
            "kernels.norm='liger' does not go with strategy.parallel.tensor=2",
        ),
        (
            {'strategy__kernels': {'fuse': True}, 'model__adapter__rank': 4},
            'kernels.fuse=True does not go with model.adapter',
        ),
        (
            {
                'strategy__kernels': {'fuse_accumulation': True},
                'strategy__parallel': {'tensor': 2},
            },
            'fuse_accumulation=True does not go with strategy.parallel.tensor=2',
        ),
        (
            {
                'strategy__kernels': {'fuse_accumulation': True},
                'strategy__parallel': {'pipeline': 2},
                'strategy__pipeline': {'schedule': 'zbv_zero_bubble', 'stages_per_rank': 2},
            },
            "fuse_accumulation=True does not go with strategy.pipeline.schedule='zbv_zero_bubble'",
        ),
        (
            {'strategy__float8': {}, 'strategy__precision': dict(param='float32')},
            'float8 needs CUDA in half precision, not cuda in torch.float32',
        ),
    ],
)
def test_kernels_that_the_job_would_refuse(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(tiny_config(tmp_path, **SMALL, **options), 2)


def test_packages_that_only_the_job_has(tmp_path: Path, monkeypatch) -> None:
    for package in ('flash_attn', 'liger_kernel'):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    options = {
        'model__hidden_size': 128,  # heads of 32 channels, the least that flash4 takes
        'strategy__precision': dict(param='bfloat16'),
        'strategy__kernels': {'norm': 'liger'},
    }
    reports = [
        rehearse(tiny_config(tmp_path, **SMALL, **options, strategy__attention=name), 2)
        for name in ('flash4', 'varlen')
    ]
    found, other = (report['ranks'][0] for report in reports)
    assert 'flash4: named in the config; on this machine it is not installed: pip install' in (
        render(reports[0])
    )
    assert found['memory'] == other['memory']  # neither needs a mask
    with pytest.raises(ValueError, match=r"strategy\.attention='flash5' is unknown.*'flash4'"):
        rehearse(tiny_config(tmp_path, **SMALL, **options, strategy__attention='flash5'), 2)
    precise = SMALL | {'strategy__attention': 'flash4'}
    with pytest.raises(ValueError, match=r'flash4.* needs CUDA in half precision, not cuda'):
        rehearse(tiny_config(tmp_path, **precise), 2)


def test_packed_rows_that_a_backend_would_refuse(tmp_path: Path) -> None:
    options = SMALL | {
        'strategy__attention': 'cudnn',
        'strategy__precision': dict(param='bfloat16'),
        'model__hidden_size': 128,
    }
    whole = {'train_dataloader__dataset__document_lengths': None}
    rehearse(tiny_config(tmp_path, **options, **whole), 2)
    packs = {'train_dataloader__dataset__document_lengths': [8, 24]}
    with pytest.raises(ValueError, match=r"attention='cudnn' takes one document a row, train_data"):
        rehearse(tiny_config(tmp_path, **options, **packs), 2)


def test_four_bits_that_only_the_job_has(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)  # as if it were not installed
    held = {}
    for four_bit in (False, True):
        options = {
            'strategy__precision': dict(param='bfloat16'),
            'model__adapter': dict(type='LoRA', rank=4, four_bit=four_bit),
        }
        (rank,) = rehearse(tiny_config(tmp_path, **SMALL, **options), 1)['ranks']
        held[four_bit] = rank['memory']['kinds']['parameters']
    matrices = 4 * (4 * 32 * 32 + 3 * 32 * 48)
    # Two bytes a number; half a byte, and four for every 64 numbers' scale.
    assert held[False] - held[True] == matrices * 2 - (matrices // 2 + matrices // 16)
    with pytest.raises(ValueError, match=r'four_bit=True does not go with strategy\.par.*tensor=2'):
        rehearse(tiny_config(tmp_path, **SMALL, **options, strategy__parallel=dict(tensor=2)), 2)


def test_gathers_in_8_bits_are_reckoned(tmp_path: Path) -> None:
    """Of a model that FSDP2 shards: 1 byte a number of the layers' matrices, 2 of what is left."""
    precision = {'strategy__precision': dict(param='bfloat16'), 'strategy__parallel': {}}
    gathered = {}
    for text, float8 in {
        None: None,
        'tensorwise, gathered in 8 bits': {},
        'rowwise': {'recipe': 'rowwise'},
    }.items():
        config = tiny_config(tmp_path, **SMALL, **precision, strategy__float8=float8)
        report = rehearse(config, 2)
        assert report['techniques']['float8'] == text
        assert text is None or f'; float8 {text}' in render(report)
        gathered[text] = report['ranks'][0]['memory']['kinds']['gathered_parameters']
    wide, narrow, rowwise = gathered.values()
    assert wide == rowwise == 2 * TOTAL
    assert wide - narrow == 4 * (4 * 32 * 32 + 3 * 32 * 48)
    with pytest.raises(ValueError, match=r'float8 does not go with strategy\.parallel\.tensor=2'):
        options = precision | {'strategy__parallel': {'tensor': 2}, 'strategy__float8': {}}
        rehearse(tiny_config(tmp_path, **SMALL, **options), 2)
