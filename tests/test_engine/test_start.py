import itertools
import json
import logging
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.foreign import open_source
from internlm_mm.checkpoint.internlm_shards import InternLMWeights
from internlm_mm.datasets import RandomTokens
from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.start import CONTENT, Start, adopt_model, choose_start
from internlm_mm.models import InternLM
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.utils.config import check_config, load_config
from tests.helpers import TINY, tiny_config, tiny_runner
from tests.internlm_oracle import SIZES, full_state, write_shards
from tests.marks import slow

LOG = logging.getLogger('test_start')


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A work dir with two whole checkpoints."""
    for step in (2, 10):
        Checkpointer(async_save=False).save(tmp_path / f'iter_{step}', {'x': torch.ones(3)}, {})
    return tmp_path


def start(work_dir: Path, resume=False, load_from=None, training=True) -> Start | None:
    return choose_start(resume, load_from, work_dir, training, LOG)


def test_from_nothing(tmp_path: Path, caplog) -> None:
    assert start(tmp_path) is None
    with caplog.at_level(logging.INFO):
        assert start(tmp_path, resume=True) is None
    assert 'nothing to resume' in caplog.text


def test_resume_takes_everything_of_the_newest(work_dir: Path) -> None:
    newest = work_dir / 'iter_10'
    assert start(work_dir, resume=True) == Start(newest, CONTENT, True)
    assert start(work_dir, resume=True, training=False) == Start(newest, ('model',), False)
    assert start(work_dir, resume=str(work_dir / 'iter_2')).path == work_dir / 'iter_2'


def test_resume_passes_over_what_is_damaged(work_dir: Path, caplog) -> None:
    (work_dir / 'iter_10' / 'state.json').unlink()
    assert start(work_dir, resume=True).path == work_dir / 'iter_2'
    assert 'iter_10 is not whole (state.json is missing)' in caplog.text
    with pytest.raises(ValueError, match=r'state\.json'):
        start(work_dir, resume=str(work_dir / 'iter_10'))


def test_load_from_takes_what_it_says(work_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / 'other'
    assert start(other, load_from=str(work_dir)) == Start(work_dir / 'iter_10', ('model',), False)
    chosen = start(other, load_from={'path': str(work_dir), 'content': ['model', 'data']})
    assert chosen == Start(work_dir / 'iter_10', ('model', 'data'), False)


def test_resume_wins_over_load_from(work_dir: Path) -> None:
    both = start(work_dir, resume=True, load_from=str(work_dir / 'iter_2'))
    assert both.path == work_dir / 'iter_10'
    (work_dir / 'empty').mkdir()
    neither = start(work_dir / 'empty', resume=True, load_from=str(work_dir / 'iter_2'))
    assert neither == Start(work_dir / 'iter_2', ('model',), False)


@pytest.mark.parametrize(
    ('load_from', 'error', 'message'),
    [
        ('/nowhere', FileNotFoundError, '/nowhere does not exist'),
        ({'content': ['model']}, ValueError, 'expected dict'),
        ({'path': 'x', 'contents': ['model']}, ValueError, "contents=.*Did you mean 'content'"),
        ({'path': 'x', 'content': ['modell']}, ValueError, "Did you mean 'model'?"),
    ],
)
def test_what_is_not_understood(tmp_path: Path, load_from, error, message: str) -> None:
    with pytest.raises(error, match=message):
        start(tmp_path, load_from=load_from)


def steps_of(work_dir: Path) -> list[str]:
    return sorted(path.name for path in work_dir.glob('iter_*'))


def saving(every: int, keep: int | None = None) -> dict:
    return {'type': 'StepCheckpointHook', 'interval': every, 'keep_last': keep}


def test_a_rewound_run_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(2)).train()
    assert steps_of(tmp_path) == ['iter_2', 'iter_4', 'iter_6']
    tiny_runner(
        tmp_path, default_hooks__checkpoint=saving(1, keep=1), resume=str(tmp_path / 'iter_2'),
        train_cfg__max_iters=4,
    ).train()  # fmt: skip
    assert steps_of(tmp_path) == ['iter_4', 'iter_4.abandoned', 'iter_6.abandoned']
    assert start(tmp_path, resume=True).path == tmp_path / 'iter_4'


def test_a_new_run_in_a_used_folder_is_not_mixed_with_the_old(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(6)).train()
    new = tiny_runner(tmp_path, default_hooks__checkpoint=saving(2, 1), train_cfg__max_iters=2)
    new.train()
    assert steps_of(tmp_path) == ['iter_2', 'iter_6.abandoned']


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(2), train_cfg__max_iters=4).train()
    (tmp_path / 'iter_4' / 'shard_0.safetensors').write_bytes(b'')
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(1, keep=1), resume=True).train()
    assert steps_of(tmp_path) == ['iter_4.abandoned', 'iter_6']
    assert start(tmp_path, resume=True).path == tmp_path / 'iter_6'


def test_a_smaller_model_is_another_model(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(6)).train()
    smaller = tiny_runner(tmp_path, model__num_layers=1, resume=True)
    with pytest.raises(ValueError, match=r"it holds 'model\.layers\.1\..*does not have"):
        smaller.train()


def test_a_start_that_fails_leaves_the_resolved_config_alone(tmp_path: Path) -> None:
    tiny_runner(tmp_path).train()
    before = (tmp_path / 'tiny.py').read_text()
    with pytest.raises(ValueError, match='num_heads=5'):
        tiny_runner(tmp_path, model__num_heads=5).train()
    assert (tmp_path / 'tiny.py').read_text() == before


def test_an_unnamed_seed_goes_on_with_the_run(tmp_path: Path) -> None:
    first = tiny_runner(
        tmp_path, randomness={'seed': None}, default_hooks__checkpoint=saving(6)
    )  # fmt: skip
    first.train()
    second = tiny_runner(tmp_path, randomness={'seed': None}, resume=True, train_cfg__max_iters=7)
    second.train()
    assert second.seed == first.seed
    assert second.train_dataloader.dataset.seed == first.seed


# ---------------------------------------------------------------- weights of other programs

TINY_SIZES = SIZES | dict(
    vocab_size=64, num_layers=2, num_heads=2, max_seq_len=64, intermediate_size=48
)


HF_CONFIG = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'attention_bias': True,
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10_000.0,
}


@pytest.fixture(params=['hf', 'bin', 'shards'])
def foreign(tmp_path: Path, request) -> tuple[Path, dict]:
    """A folder of another program with weights for the config of `tests/configs/tiny.py`."""
    state = full_state(TINY_SIZES, biases=True)
    folder = tmp_path / request.param
    if request.param != 'shards':
        folder.mkdir()
        (folder / 'config.json').write_text(json.dumps(HF_CONFIG))
        stored = {
            name if name == 'lm_head.weight' else f'model.{name}': tensor
            for name, tensor in state.items()
        }
        if request.param == 'hf':
            save_file(stored, folder / 'model.safetensors')
        else:
            torch.save(stored, folder / 'pytorch_model.bin')
    else:
        said = {'max_position_embeddings': 64}
        write_shards(folder, state, TINY_SIZES, tp=2, pp=2, config=said)
    return folder, state


class Losses(Hook):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.found.append(float(outputs['loss']))


def begin(work_dir: Path, folder: Path, parallel: dict) -> tuple[dict[str, Tensor], float]:
    """The weights that are loaded, whole, and the loss of the first step; in float64."""
    losses = Losses()
    runner = tiny_runner(
        work_dir,
        [losses],
        load_from=str(folder),
        strategy__parallel=parallel,
        strategy__precision={'param': 'float64', 'reduce': 'float64'},
        train_cfg__max_iters=1,
        val_dataloader=None,
        val_cfg=None,
        experiment_name=f'begin_{folder.parent.name}_{"_".join(parallel)}',
    )
    loaded: dict[str, Tensor] = {}
    load = runner.load_or_resume

    def load_and_keep() -> None:
        load()
        for name, tensor in runner.model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            loaded[name] = whole.clone()

    runner.load_or_resume = load_and_keep
    runner.train()
    return loaded, losses.found[0]


@pytest.mark.parametrize('axis', ['data_shard', slow('tensor'), 'pipeline'])
def test_every_layout_begins_from_the_same_weights(
    two_ranks, tmp_path: Path, foreign, axis: str
) -> None:
    folder, state = foreign
    weights, loss = begin(tmp_path / 'one', folder, {})
    plain = InternLM(**TINY_SIZES).double()
    plain.load_state_dict(state)
    assert loss == pytest.approx(first_loss(plain), rel=1e-12)
    found = two_ranks(begin, tmp_path / 'two', folder, {axis: 2})
    names: set[str] = set()
    for part, _ in [(weights, loss), *found]:
        names |= set(part)
        for name, tensor in part.items():
            assert torch.equal(tensor, state[name].double()), name
    assert names == set(state)
    if axis == 'pipeline':
        assert not set(found[0][0]) & set(found[1][0])
    for _, other in found:
        assert other == pytest.approx(loss, rel=1e-12)


@torch.no_grad()
def first_loss(model: InternLM) -> float:
    """Of the four rows of the first step, by torch's own cross-entropy, a document at a time."""
    seed, total, count = 1024, 0.0, 0
    data = RandomTokens(vocab_size=64, seq_len=32, document_lengths=[5, 9, 14], seed=seed)
    for row in (data[i] for i in range(4)):
        ids, labels = torch.tensor(row.input_ids), torch.tensor(row.labels)
        ends = itertools.accumulate(row.lengths.tolist(), initial=0)
        for begin_at, end in itertools.pairwise(ends):
            logits, wanted = model.logits(ids[None, begin_at:end])[0], labels[begin_at:end]
            loss = F.cross_entropy(logits, wanted, reduction='sum', ignore_index=IGNORE_INDEX)
            total += float(loss)
            count += int((wanted != IGNORE_INDEX).sum())
    return total / count


def fail_on_one_rank(work_dir: Path, folder: Path) -> str:
    own = folder if dist.get_rank() == 0 else folder.with_name('nowhere')
    with mock.patch('internlm_mm.engine.start.open_source', lambda path: open_source(own)):
        try:
            begin(work_dir, folder, {'data_shard': 2})
        except (OSError, ValueError) as error:
            return f'{type(error).__name__}: {error}'
    return ''


@pytest.mark.parametrize('foreign', ['hf'], indirect=True)
def test_an_error_of_one_rank_reaches_all(two_ranks, tmp_path: Path, foreign) -> None:
    first, second = two_ranks(fail_on_one_rank, tmp_path / 'two', foreign[0])
    assert second.startswith(f'FileNotFoundError: {tmp_path / "nowhere"} is no folder')
    assert first == f'ValueError: rank 1: {second}'


def count_checks(work_dir: Path, folder: Path) -> int:
    passes = []
    check = InternLMWeights.check_files
    with mock.patch.object(InternLMWeights, 'check_files', lambda w: passes.append(check(w))):
        begin(work_dir, folder, {'data_shard': 2})
    return len(passes)


@pytest.mark.parametrize('foreign', ['shards'], indirect=True)
def test_one_rank_reads_checksums(two_ranks, tmp_path: Path, foreign) -> None:
    assert two_ranks(count_checks, tmp_path / 'two', foreign[0]) == [1, 0]


@pytest.mark.parametrize('foreign', ['shards'], indirect=True)
def test_damage_that_one_rank_finds_reaches_all(two_ranks, tmp_path: Path, foreign) -> None:
    path = foreign[0] / 'model_tp1_pp1.pt'
    whole, tensor = path.read_bytes(), torch.load(path)['model.head.weight']
    place = whole.index(tensor.numpy().tobytes()) + 5
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for message in two_ranks(message_of, tmp_path / 'two', foreign[0]):
        assert 'model_tp1_pp1.pt is damaged: Bad CRC' in message


@pytest.mark.parametrize('foreign', ['hf'], indirect=True)
def test_numbers_that_are_none_stop_all_before_a_step(two_ranks, tmp_path: Path, foreign) -> None:
    file = foreign[0] / 'model.safetensors'
    stored = load_file(file)
    stored['lm_head.weight'][3, 5] = float('nan')  # which the second stage alone reads
    save_file(stored, file)
    found = two_ranks(message_of, tmp_path / 'two', foreign[0], {'pipeline': 2})
    words = f"{foreign[0]}: 'lm_head.weight' holds values that are not finite in float32"
    assert found[1].startswith(words) and found[0].startswith(f'rank 1: ValueError: {words}')
    assert not list((tmp_path / 'two').glob('iter_*'))


def message_of(work_dir: Path, folder: Path, parallel: dict | None = None) -> str:
    try:
        begin(work_dir, folder, parallel or {'data_shard': 2})
    except ValueError as error:
        return str(error)
    return ''


def test_training_goes_on_from_other_programs_weights(tmp_path: Path, foreign) -> None:
    folder, state = foreign
    chosen = start(tmp_path / 'work', load_from=str(folder))
    assert chosen == Start(folder, ('model',), False, {})
    runner = tiny_runner(tmp_path / 'work', load_from=str(folder))
    runner.prepare_training()
    loaded = runner.model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    tiny_runner(tmp_path / 'work', load_from=str(folder), train_cfg__max_iters=1).train()


def test_a_dry_run_says_what_will_be_loaded(tmp_path: Path, foreign) -> None:
    plan = dry_run(tiny_config(tmp_path / 'work', load_from=str(foreign[0])))
    form = "InternLM's own shards" if foreign[0].name == 'shards' else 'a Hugging Face folder'
    line = next(line for line in plan.splitlines() if line.startswith('start '))
    assert f'the weights of {foreign[0]}, {form}: InternLM, 29 tensors, 0.1 MiB in float32' in line


def without_model(work_dir: Path, **options) -> Config:
    config = load_config(TINY, options)
    config.work_dir = str(work_dir)
    config.pop('model')
    return config


def test_a_config_without_a_model_takes_the_folders(tmp_path: Path, foreign) -> None:
    config = without_model(tmp_path / 'work', load_from=str(foreign[0]))
    adopt_model(config)
    check_config(config)
    assert config.model.pop('type') in ('internlm_mm.models.internlm.InternLM', 'InternLM')
    assert dict(config.model) == TINY_SIZES
    config.model = {'max_seq_len': 48}  # what is said wins
    adopt_model(config)
    assert config.model.max_seq_len == 48 and config.model.num_layers == 2
    assert 'start      the weights of' in dry_run(config)
    kept = tiny_config(tmp_path / 'work', load_from=str(foreign[0]), model__num_layers=9)
    adopt_model(kept)
    assert kept.model.num_layers == 9


def test_a_config_without_a_model_takes_the_checkpoints(tmp_path: Path) -> None:
    work_dir, model = tmp_path / 'work', dict(type='InternLM', **TINY_SIZES)
    for step in (2, 10):
        said = {'model': model | {'objective': {'type': 'NextToken'}}}
        tensors, texts = {'model.x': torch.zeros(2)}, {'config.json': json.dumps(said)}
        Checkpointer(async_save=False).save(work_dir / f'iter_{step}', tensors, {}, texts)
    (work_dir / 'iter_10' / 'config.json').unlink()
    for path in (work_dir, work_dir / 'iter_2'):
        config = without_model(tmp_path, load_from={'path': str(path)})
        adopt_model(config)
        assert dict(config.model) == model
    call = {'model': {'type': 'os.system', 'command': f'touch {tmp_path}/ran'}}
    texts = {'config.json': json.dumps(call)}
    Checkpointer(async_save=False).save(work_dir / 'iter_20', tensors, {}, texts)
    with pytest.raises(ValueError, match=r"model\.type='os\.system' is no model"):
        adopt_model(without_model(tmp_path, load_from=str(work_dir)))
    nothing = without_model(tmp_path, load_from=str(tmp_path / 'nothing'))
    with pytest.raises(FileNotFoundError, match='nothing does not exist'):
        adopt_model(nothing)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('num_layers', 1, r'model\.num_layers=1, but .* holds InternLM with num_layers=2'),
        ('hidden_size', 64, r'model\.hidden_size=64, but .* with hidden_size=32'),
        ('attention_bias', False, r'model\.attention_bias=False, but .* with attention_bias=True'),
        ('norm_eps', 1e-6, r'model\.norm_eps=1e-06, but .* with norm_eps=1e-05'),
        ('type', 'Llama', r'model\.type=Llama, but .* holds InternLM: .* is left over'),
    ],
)
def test_another_model_than_the_folders_is_refused(
    tmp_path: Path, foreign, key: str, value, message: str
) -> None:
    changes = {'load_from': str(foreign[0]), f'model__{key}': value}
    with pytest.raises(ValueError, match=message):
        tiny_runner(tmp_path / 'work', **changes).train()
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_config(tmp_path / 'work', **changes))


def test_another_length_is_told(tmp_path: Path, foreign, caplog) -> None:
    plan = tiny_config(tmp_path / 'work', load_from=str(foreign[0]), model__max_seq_len=128)
    dry_run(plan)
    assert 'model.max_seq_len=128 differs from 64' in caplog.text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'content': ['model', 'optimizer']}, r"\['model'\] alone and not 'optimizer'"),
        ({'format': 'internevoo'}, "Did you mean 'internevo'"),
        ({'settings': {'num_headz': 1}}, "Did you mean 'num_heads'"),
        ({'formatt': 'hf'}, "formatt='hf'.*Did you mean 'format'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, foreign, options: dict, message: str) -> None:
    load_from = {'path': str(foreign[0]), **options}
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_config(tmp_path / 'work', load_from=load_from))


def test_options_of_other_programs_with_a_checkpoint(work_dir: Path) -> None:
    with pytest.raises(ValueError, match=r'load_from\.format is for weights of other programs'):
        start(work_dir / 'x', load_from={'path': str(work_dir), 'format': 'hf'})


def test_settings_of_other_programs(tmp_path: Path) -> None:
    write_shards(tmp_path / 'x', full_state(TINY_SIZES, True), TINY_SIZES, tp=2)
    options = {'format': 'internlm-2023', 'settings': {'num_heads': 2}}
    load_from = {'path': str(tmp_path / 'x'), **options}
    plan = dry_run(tiny_config(tmp_path / 'work', load_from=load_from))
    assert "InternLM's own shards: InternLM, 29 tensors" in plan


@pytest.mark.parametrize(
    ('inside', 'message'),
    [
        (None, r'x does not exist; expected .* Nothing is downloaded'),
        ('', r'holds no checkpoint iter_N, and neither a Hugging Face model .*_pp\*\.pt\)$'),
        ('20000/model_tp0_pp0.pt', r'; its folder 20000 does$'),
        ('iter_3.tmp/x', r'holds no checkpoint iter_N'),
    ],
)
def test_nothing_to_load(tmp_path: Path, inside: str | None, message: str) -> None:
    if inside is not None:
        file = tmp_path / 'x' / (inside or 'notes.txt')
        file.parent.mkdir(parents=True)
        file.touch()
    with pytest.raises(FileNotFoundError, match=message):
        start(tmp_path / 'work', load_from=str(tmp_path / 'x'))
    with pytest.raises(FileNotFoundError, match=message):
        adopt_model(without_model(tmp_path / 'work', load_from=str(tmp_path / 'x')))


def test_a_file_is_no_folder_to_load(tmp_path: Path) -> None:
    (tmp_path / 'model.safetensors').touch()
    with pytest.raises(
        FileNotFoundError, match=r'model\.safetensors is no folder; expected a work'
    ):
        start(tmp_path / 'work', load_from=str(tmp_path / 'model.safetensors'))
    with pytest.raises(FileNotFoundError, match=r"downloaded\. Did you mean '.*/model\.safetens"):
        start(tmp_path / 'work', load_from=str(tmp_path / 'modle.safetensors'))


def test_other_programs_have_no_run_to_resume(tmp_path: Path, foreign) -> None:
    with pytest.raises(ValueError, match='no run to go on with: use load_from'):
        start(tmp_path / 'work', resume=str(foreign[0]))


def test_a_damaged_folder_stops_before_training(tmp_path: Path, foreign) -> None:
    names = ('*.safetensors', '*.bin', 'model_tp1*')
    file = next(path for name in names for path in foreign[0].glob(name))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f'{file.name} is truncated'):
        tiny_runner(tmp_path / 'work', load_from=str(foreign[0])).train()
    assert not list((tmp_path / 'work').glob('iter_*'))
