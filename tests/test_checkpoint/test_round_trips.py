"""Every family and form: out and in again, and in and out again, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from internlm_mm.checkpoint.convert_from import convert_from
from internlm_mm.checkpoint.hf_import import fill_model, import_hf
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model
from internlm_mm.checkpoint.step_folders import read_config, read_model_state
from internlm_mm.checkpoint.streaming import hf_model, streamed
from internlm_mm.models import InternLM3
from tests import forms
from tests.forms import CASES, DYNAMIC, FAMILIES, LLAMA3, YARN, build, form_of, weights_of
from tests.large_checkpoint import write_checkpoint

IDS = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ROPE = {'rope_type': 'default', 'rope_theta': 1e6}
PUBLISHED = {
    'llama': LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {'rope_theta': 5e5}),
    'llama, biases': LlamaConfig(**SIZES, attention_bias=True),
    'llama, tied': LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16),
    'mistral': MistralConfig(**SIZES, sliding_window=None, rope_parameters=ROPE),
    'qwen2': Qwen2Config(**SIZES, rope_parameters=YARN | {'rope_theta': 1e6}),
    'qwen2, tied': Qwen2Config(**SIZES, tie_word_embeddings=True),
    'qwen3': Qwen3Config(**SIZES, head_dim=16, rope_parameters=ROPE),
    'qwen3, tied': Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def read_hf(folder):
    tensors = {}
    for file in folder.glob('*.safetensors'):
        tensors |= load_file(file)
    return tensors


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize(('name', 'form'), CASES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_framework_hf_framework(tmp_path, name, form, dtype):
    model = build(name)
    state = weights_of(model)
    difference = export_hf(
        model, state, tmp_path / 'hf', format=form, dtype=dtype, max_shard_bytes=20_000
    )
    assert difference < 1e-4
    done = convert_from(tmp_path / 'hf', tmp_path / 'out')
    assert done.dtype == dtype
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    again = read_model_state(tmp_path / 'out')
    same({name: again[name] for name in again}, rounded)
    built = load_model(tmp_path / 'out')
    own = form_of(name, form)
    configs = [own.config_of(one) for one in (model, built)]
    for config in configs:
        config.pop('initializer_range')  # a family's own, and not a setting
    assert configs[0] == configs[1]


@pytest.mark.parametrize('ranks', [1, 2, 4])
@pytest.mark.parametrize('name', FAMILIES)
def test_checkpoints_of_several_ranks(tmp_path, name, ranks):
    """However many ranks wrote a checkpoint, what is exported and imported again is its bits."""
    family, settings = FAMILIES[name]
    write_checkpoint(tmp_path / 'work' / 'iter_3', ranks, family, **forms.SIZES, **settings)
    assert len(list((tmp_path / 'work' / 'iter_3').glob('shard_*'))) == ranks
    assert convert_to_hf(tmp_path / 'work', tmp_path / 'hf', dtype='float32') < 1e-4
    convert_from(tmp_path / 'hf', tmp_path / 'back')
    before, after = (read_model_state(tmp_path / place) for place in ('work', 'back'))
    same({name: after[name] for name in after}, {name: before[name] for name in before})


@pytest.mark.parametrize('name', PUBLISHED)
def test_hf_framework_hf(tmp_path, name):
    """What transformers' own `save_pretrained` wrote comes out as it was."""
    config = PUBLISHED[name]
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / 'hf', max_shard_size='40KB')
    before = read_hf(tmp_path / 'hf')
    convert_from(tmp_path / 'hf', tmp_path / 'work')
    convert_to_hf(tmp_path / 'work', tmp_path / 'again', format=config.model_type)
    same(read_hf(tmp_path / 'again'), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / 'again')
    assert type(loaded) is type(theirs)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, theirs(IDS).logits)
        ours = load_model(tmp_path / 'hf').logits(IDS)
        difference = (ours - theirs(IDS).logits).abs().max()
    assert difference < 1e-5 * max(1.0, float(ours.abs().max()))
    written = [AutoConfig.from_pretrained(tmp_path / place) for place in ('hf', 'again')]
    for key in (*SIZES, 'rms_norm_eps', 'rope_parameters', 'tie_word_embeddings', 'head_dim'):
        assert getattr(written[0], key, None) == getattr(written[1], key, None)


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
@pytest.mark.parametrize('case', ['both', 'head only', 'different'])
def test_tied_heads_that_are_written_all_the_same(tmp_path, file, case):
    """As transformers decides: equal ones are one, and different ones are not tied."""
    folder = tmp_path / 'hf'
    model = build('Qwen2-tied')
    export_hf(model, weights_of(model), folder, dtype='float32', verify=False)
    tensors = read_hf(folder)
    assert 'lm_head.weight' not in tensors
    embedding = 'model.embed_tokens.weight'
    tensors['lm_head.weight'] = tensors[embedding]
    if case == 'different':
        tensors['lm_head.weight'] = tensors[embedding].roll(1, 0)
    if case == 'head only':
        del tensors[embedding]
    for path in folder.glob('model*'):
        path.unlink()
    if file.endswith('bin'):
        torch.save(tensors, folder / file)  # one storage under two names
    else:
        save_file({n: t.clone() for n, t in tensors.items()}, folder / file, {'format': 'pt'})
    loaded = load_model(folder)
    assert loaded.tie_word_embeddings is (case != 'different')
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    torch.testing.assert_close(loaded.logits(IDS), expected, rtol=0, atol=1e-4)
    convert_from(folder, tmp_path / 'work')
    assert ('lm_head.weight' in read_model_state(tmp_path / 'work')) is (case == 'different')


@pytest.mark.parametrize(
    ('name', 'form', 'gives'),
    [
        ('InternLM', 'llama', 'Llama'),
        ('InternLM3', 'internlm3', 'Llama'),
        ('Mistral', 'mistral', 'Mistral'),
        ('Qwen2', 'qwen2', 'Qwen2'),
        ('Qwen3', 'qwen3', 'Qwen3'),
    ],
)
def test_what_the_auto_classes_give(tmp_path, name, form, gives):
    """Formats without files of ours; of the others test_remote.py tells."""
    model = build(name)
    export_hf(model, weights_of(model), tmp_path / 'hf', format=form, verify=False)
    assert not list((tmp_path / 'hf').glob('*.py'))
    config = AutoConfig.from_pretrained(tmp_path / 'hf')
    assert type(config).__name__ == ('InternLM3' if name == 'InternLM3' else gives) + 'Config'
    for auto, ending in (
        (AutoModel, 'Model'),
        (AutoModelForCausalLM, 'ForCausalLM'),
    ):
        assert type(auto.from_pretrained(tmp_path / 'hf')).__name__ == gives + ending
    if name == 'InternLM3':
        with pytest.raises(ValueError, match='Unrecognized configuration class'):
            AutoModelForSequenceClassification.from_config(config)
    else:
        classifier = AutoModelForSequenceClassification.from_config(config)
        assert type(classifier).__name__ == f'{gives}ForSequenceClassification'


def test_the_family_that_a_config_is(tmp_path):
    """Llama's form of several families is read as the one that is meant by it."""
    for name, (family, _) in FAMILIES.items():
        model = build(name)
        for form in family.hf_forms:
            folder = tmp_path / name / form.name
            export_hf(model, weights_of(model), folder, format=form.name, verify=False)
            found = import_hf(folder)[0]['type'].__name__
            if form.name != 'llama':
                assert found == family.__name__
            else:
                assert found == ('InternLM' if name == 'InternLM' else 'Llama')


@pytest.mark.parametrize('form', ['llama', 'internlm2'])
def test_a_longer_max_seq_len_keeps_what_dynamic_means(tmp_path, form):
    """Rows are twice as long as those of training, and are stretched alike in both stacks."""
    scaling = DYNAMIC | {'original_max_position_embeddings': 20}
    model = build('InternLM2', rope_scaling=scaling)
    state = weights_of(model)
    export_hf(model, state, tmp_path / 'hf', format=form, dtype='float32')
    said = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert said['max_position_embeddings'] == 20
    assert said['rope_scaling'] == {'type' if form == 'internlm2' else 'rope_type': 'dynamic'} | {
        'factor': 2.0
    }
    fill_model(model, state, 'cpu', torch.float32)
    theirs, weights = hf_model(tmp_path / 'hf')
    with torch.inference_mode(), streamed(theirs, weights):
        expected = theirs(IDS, use_cache=False).logits
    torch.testing.assert_close(model.logits(IDS), expected, rtol=0, atol=1e-4)
    config = import_hf(tmp_path / 'hf')[0]
    assert config['rope_scaling'] == scaling and config['max_seq_len'] == 20
    plain = build('InternLM2', rope_scaling=None)
    fill_model(plain, state, 'cpu', torch.float32)
    assert (plain.logits(IDS) - expected).abs().max() > 0.01  # or nothing was stretched


def test_older_folders_of_internlm2(tmp_path):
    """They say `model_type: internlm`, and their class tells."""
    model = build('InternLM2')
    state = weights_of(model)
    export_hf(model, state, tmp_path / 'hf', format='internlm2', dtype='float32')
    file = tmp_path / 'hf' / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'model_type': 'internlm'}))
    config, weights = import_hf(tmp_path / 'hf')
    assert config['type'].__name__ == 'InternLM2'
    same({name: weights[name] for name in weights}, state)


def test_internlm3_as_published(tmp_path):
    """Keys as in the config.json on the hub, weights under Llama's names."""
    model = build('InternLM3', rope_theta=5e7)
    state = weights_of(model)
    export_hf(model, state, tmp_path / 'hf', format='internlm3', dtype='float32')
    file = tmp_path / 'hf' / 'config.json'
    said = json.loads(file.read_text())
    del said['rope_parameters']
    said |= {
        'auto_map': {'AutoConfig': 'configuration_internlm3.InternLM3Config'},
        'rope_scaling': {'factor': 2.0, 'rope_type': 'dynamic'},
    }
    file.write_text(json.dumps(said))
    config, _ = import_hf(tmp_path / 'hf')
    with torch.device('meta'):
        again = InternLM3(**{key: value for key, value in config.items() if key != 'type'})
    form = form_of('InternLM3', 'internlm3')
    assert form.config_of(again) == form.config_of(model)
    convert_from(tmp_path / 'hf', tmp_path / 'work')
    assert read_config(tmp_path / 'work')['model']['rope_scaling']['rope_type'] == 'dynamic'
