"""Weights of other programs come in whole, go out again unchanged, or leave nothing behind."""

import json
import re
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_mm.checkpoint.convert_from import convert_from
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model, load_tokenizer_of
from internlm_mm.checkpoint.step_folders import read_config, read_model_state, read_state, verify
from internlm_mm.models import InternLM, InternLM2
from tests.internlm_oracle import FAMILIES, GROUPED, SIZES, full_state, write_shards
from tests.trained import train_tokenizer, trained_run


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


def read_hf(folder):
    tensors = {}
    for file in folder.glob('*.safetensors'):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, tp=2, pp=2, config={})
    return tmp_path / 'x'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_framework_hf_framework(tmp_path, dtype):
    work_dir, _, tokenizer = trained_run(tmp_path)
    convert_to_hf(work_dir, tmp_path / 'hf', dtype=dtype)
    done = convert_from(tmp_path / 'hf', tmp_path / 'out')
    assert done.family == 'InternLM' and done.dtype == dtype
    assert done.vocabulary == tokenizer.vocab_size
    checkpoint = tmp_path / 'out' / 'iter_0'
    assert verify(checkpoint) == [] and [checkpoint] == list((tmp_path / 'out').iterdir())
    before = read_model_state(work_dir)
    rounded = {name: before[name].to(getattr(torch, dtype)) for name in before}
    same(read_model_state(checkpoint), rounded)
    text = 'def f7(x): return x + 7'
    assert load_tokenizer_of(tmp_path / 'out').encode(text) == tokenizer.encode(text)
    assert read_config(checkpoint)['model'] == read_config(work_dir)['model'] | {
        'rope_theta': 10_000.0,
        'norm_eps': 1e-5,
    }
    assert read_state(checkpoint)['converted_from']['form'] == 'a Hugging Face folder'
    convert_to_hf(tmp_path / 'out', tmp_path / 'again')  # in the dtype that came in
    same(read_hf(tmp_path / 'again'), read_hf(tmp_path / 'hf'))
    configs = [json.loads((tmp_path / f / 'config.json').read_text()) for f in ('hf', 'again')]
    assert configs[0] == configs[1]


@pytest.mark.parametrize('kind', list(FAMILIES))
@pytest.mark.parametrize(('tp', 'pp'), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (4, 4)])
def test_shards_to_framework_to_hf(tmp_path, kind, tp, pp):
    """Logits of all three are equal; tp only as far as there are key/value heads."""
    first = kind == 'INTERNLM'
    sizes = SIZES if first else GROUPED
    tp = tp if first else min(tp, 2)
    state = full_state(sizes, biases=first)
    write_shards(tmp_path / 'x', state, sizes, kind=kind, tp=tp, pp=pp, adapt_hf=first, config={})
    done = convert_from(tmp_path / 'x', tmp_path / 'out')
    assert done.family == FAMILIES[kind]
    same(read_model_state(tmp_path / 'out'), state)
    model = load_model(tmp_path / 'out')
    ids = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(1))
    reference = type(model)(**sizes)
    reference.load_state_dict(state)
    assert torch.equal(model.logits(ids), reference.logits(ids))
    difference = convert_to_hf(tmp_path / 'out', tmp_path / 'hf', dtype='float32')
    assert difference < 1e-4  # of transformers' logits on the export
    again = load_model(tmp_path / 'hf')
    torch.testing.assert_close(again.logits(ids), model.logits(ids), rtol=0, atol=0)
    if tp != pp:
        return
    own = type(model).hf_forms[-1].name
    assert convert_to_hf(tmp_path / 'out', tmp_path / 'own', format=own, dtype='float32') < 1e-4
    assert type(load_model(tmp_path / 'own')) is type(model)
    convert_from(tmp_path / 'own', tmp_path / 'back')
    same(read_model_state(tmp_path / 'back'), state)


def test_another_dtype_and_tokenizer(tmp_path):
    tokenizer = train_tokenizer(tmp_path / 'tokenizer')
    sizes = SIZES | {'vocab_size': tokenizer.vocab_size + 3}
    state = full_state(sizes, True)
    write_shards(tmp_path / 'x', state, sizes, config={})
    done = convert_from(
        tmp_path / 'x', tmp_path / 'out', dtype='bfloat16', tokenizer=tmp_path / 'tokenizer',
        settings={'max_seq_len': 77},
    )  # fmt: skip
    assert done.dtype == 'bfloat16' and done.vocabulary == tokenizer.vocab_size
    same(read_model_state(tmp_path / 'out'), {n: t.bfloat16() for n, t in state.items()})
    config = read_config(tmp_path / 'out')
    assert config['model']['max_seq_len'] == 77
    assert config['strategy']['precision'] == {'param': 'bfloat16', 'reduce': 'float32'}


def nothing_left(tmp_path, before):
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit(tmp_path, shards):
    train_tokenizer(shards)  # about 400 tokens, 96 rows
    before = names(tmp_path)
    with pytest.raises(ValueError, match='and the model vocab_size=96: they do not'):
        convert_from(shards, tmp_path / 'out')
    nothing_left(tmp_path, before)


def test_values_that_are_not_finite(tmp_path):
    state = full_state(SIZES, True)
    state['layers.2.mlp.up_proj.weight'][3, 4] = torch.inf
    write_shards(tmp_path / 'x', state, SIZES, config={})
    with pytest.raises(ValueError, match=r"'layers\.2\.mlp\.up_proj\.weight' holds values that"):
        convert_from(tmp_path / 'x', tmp_path / 'out')
    assert names(tmp_path) == ['x']


def test_values_that_a_narrow_dtype_cannot_hold(tmp_path):
    state = full_state(SIZES, True)
    state['norm.weight'][3] = 1e6
    write_shards(tmp_path / 'x', state, SIZES, config={})
    with pytest.raises(ValueError, match=r"'norm\.weight' .*finite in float16.*too narrow"):
        convert_from(tmp_path / 'x', tmp_path / 'out', dtype='float16')
    convert_from(tmp_path / 'x', tmp_path / 'out', dtype='bfloat16')


def test_large_sums_are_no_damage(tmp_path):
    state = {name: torch.full_like(x, 3e4).half() for name, x in full_state(SIZES, True).items()}
    state['norm.weight'] = torch.full((32,), 3e38)  # overflows when summed
    write_shards(tmp_path / 'x', state, SIZES, config={})
    convert_from(tmp_path / 'x', tmp_path / 'out')


def test_a_changed_byte(tmp_path, shards):
    path = shards / 'model_tp1_pp1.pt'
    whole, tensor = path.read_bytes(), torch.load(path)['model.head.weight']
    place = whole.index(tensor.numpy().tobytes()) + 5
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r'model_tp1_pp1\.pt is damaged: Bad CRC'):
        convert_from(shards, tmp_path / 'out')
    assert names(tmp_path) == ['x']


def test_what_exists_is_kept(tmp_path, shards):
    convert_from(shards, tmp_path / 'out')
    with pytest.raises(FileExistsError, match='overwrite'):
        convert_from(shards, tmp_path / 'out')
    convert_from(shards, tmp_path / 'out', overwrite=True, dtype='bfloat16')
    assert read_model_state(tmp_path / 'out')['norm.weight'].dtype == torch.bfloat16
    (tmp_path / 'out' / 'iter_500').mkdir()  # of a run that went on here
    with pytest.raises(FileExistsError, match="not overwritten: it holds 'iter_500'"):
        convert_from(shards, tmp_path / 'out', overwrite=True)


def test_a_full_disk(tmp_path, shards, monkeypatch):
    usage = namedtuple('usage', 'total used free')(100, 99, 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(OSError, match=r'out needs 0\.0 GB'):
        convert_from(shards, tmp_path / 'out')
    assert names(tmp_path) == ['x']


def test_unknown_dtype(tmp_path, shards):
    with pytest.raises(ValueError, match=r"dtype='bf16' is not stored.* mean 'bfloat16"):
        convert_from(shards, tmp_path / 'out', dtype='bf16')


def test_a_folder_with_pickles(tmp_path):
    with torch.device('meta'):
        model = InternLM(**SIZES)
    state = full_state(SIZES, True)
    export_hf(model, state, tmp_path / 'hf', dtype='float32', verify=False)
    tensors = read_hf(tmp_path / 'hf')
    for file in tmp_path.glob('hf/model*'):
        file.unlink()
    torch.save(tensors, tmp_path / 'hf' / 'pytorch_model.bin')
    convert_from(tmp_path / 'hf', tmp_path / 'out')
    same(read_model_state(tmp_path / 'out'), state)


def write_folder(folder, **options):
    """An InternLM2 in its own form, and its tensors."""
    sizes = GROUPED | options
    with torch.device('meta'):
        model = InternLM2(**sizes)
    state = full_state(sizes, False)
    export_hf(model, state, folder, format='internlm2', dtype='float32', verify=False)
    (folder / 'model.safetensors.index.json').unlink()
    return read_hf(folder)


def rewrite(folder, tensors):
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


def truncate(folder, tensors):
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-9])


def as_bin(folder, tensors):
    (folder / 'model.safetensors').unlink()
    torch.save(tensors, folder / 'pytorch_model.bin')


def damaged_bin(folder, tensors):
    as_bin(folder, tensors)
    path = folder / 'pytorch_model.bin'
    whole = bytearray(path.read_bytes())
    whole[whole.index(tensors['output.weight'].numpy().tobytes()) + 5] ^= 4
    path.write_bytes(whole)


def with_code(folder, tensors):
    as_bin(folder, tensors | {'output.weight': re.compile('x')})


def another_architecture(folder, tensors):
    config = json.loads((folder / 'config.json').read_text())
    config |= {'architectures': ['InternLM4ForCausalLM'], 'model_type': 'internlm4'}
    (folder / 'config.json').write_text(json.dumps(config))


def another_tokenizer(folder, tensors):
    train_tokenizer(folder)


@pytest.mark.parametrize(
    ('harm', 'message'),
    [
        (
            lambda f, t: rewrite(f, {n: x for n, x in t.items() if n != 'output.weight'}),
            r"'output\.weight' is missing, which InternLM2 has",
        ),
        (
            lambda f, t: rewrite(f, t | {'output.bias': torch.ones(96)}),
            r"'output\.bias' in model\.safetensors is left over",
        ),
        (
            lambda f, t: rewrite(f, t | {'output.weight': torch.ones(97, 32)}),
            r"'output\.weight' in .* has shape \[97, 32\]; expected \[96, 32\]",
        ),
        (
            lambda f, t: rewrite(f, t | {'output.weight': t['output.weight'] / 0}),
            r"'lm_head\.weight' holds values that are not finite",
        ),
        (truncate, r'model\.safetensors is truncated or damaged'),
        (damaged_bin, r'pytorch_model\.bin is damaged: Bad CRC'),
        (with_code, r'pytorch_model\.bin holds pickled code .*re\._compile'),
        (another_architecture, r"'internlm4'.*no model that is known here.*InternLM3ForCausalLM"),
        (another_tokenizer, r'and the model vocab_size=96: they do not belong together'),
    ],
)
def test_nothing_is_left_of_what_does_not_fit(tmp_path, harm, message):
    tensors = write_folder(tmp_path / 'hf')
    harm(tmp_path / 'hf', tensors)
    with pytest.raises(ValueError, match=message):
        convert_from(tmp_path / 'hf', tmp_path / 'out')
    assert names(tmp_path) == ['hf']


def test_a_folder_of_packed_pickles(tmp_path):
    tensors = write_folder(tmp_path / 'hf')
    as_bin(tmp_path / 'hf', tensors)
    convert_from(tmp_path / 'hf', tmp_path / 'out')
    same(read_model_state(tmp_path / 'out'), full_state(GROUPED, False))


def test_the_bar(tmp_path, shards, capsys):
    convert_from(shards, tmp_path / 'out', show_progress=True)
    assert 'converting' in capsys.readouterr().err
