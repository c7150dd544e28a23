"""Adapters to peft and back."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from internlm_mm.checkpoint.base import describe_base
from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.peft_files import adapter_of_peft, check_peft, export_peft, read_peft
from internlm_mm.checkpoint.pretrained import load_model, load_tokenizer_of
from internlm_mm.inference.template_choice import stored_template
from internlm_mm.models import InternLM, InternLM2, Qwen3
from internlm_mm.registry import MODELS
from tests.trained import SIZES, adapted_run, trained_run

pytestmark = [
    pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning'),
    pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning'),
]


@pytest.mark.parametrize(
    'family, adapter',
    [
        (InternLM, {}),
        (InternLM, {'dora': True, 'targets': ['o_proj', 'up_proj']}),
        (Qwen3, {'rslora': True, 'targets': ['layers.1.*.[qv]_proj', 'layers.0.mlp.down_proj']}),
        (InternLM, {'targets': ['layers.0.*.[qv]_proj']}),
    ],
    ids=['lora', 'dora', 'rslora on some layers', 'a full set on the first layer'],
)
def test_peft_gives_the_same_logits(tmp_path: Path, family, adapter) -> None:
    hf, work_dir, model = adapted_run(tmp_path, family, **adapter)
    size = export_peft(work_dir, tmp_path / 'peft')
    assert size == (tmp_path / 'peft' / 'adapter_model.safetensors').stat().st_size < 200_000
    ids = torch.randint(300, (2, 30))
    wanted = model.logits(ids)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(hf), tmp_path / 'peft'
    )
    scale = wanted.abs().max()
    assert (theirs(ids).logits - wanted).abs().max() <= 1e-5 * scale
    unloaded = theirs.merge_and_unload()(ids).logits
    ours = load_model(work_dir)  # merged
    assert not any('lora' in name for name, _ in ours.named_parameters())
    assert (ours.logits(ids) - unloaded).abs().max() <= 1e-5 * scale
    assert (load_model(tmp_path / 'peft').logits(ids) - wanted).abs().max() <= 1e-5 * scale


def test_what_peft_has_trained_is_read(tmp_path: Path) -> None:
    """Their own folder: saved by them, with their defaults."""
    hf, _, _ = adapted_run(tmp_path)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules='all-linear', use_dora=True)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(hf), config)
    for name, parameter in theirs.named_parameters():
        if 'lora_' in name:
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    theirs.save_pretrained(tmp_path / 'theirs')
    ids = torch.randint(300, (2, 30))
    wanted = theirs(ids).logits
    found = load_model(tmp_path / 'theirs').logits(ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    said = adapter_of_peft(tmp_path / 'theirs', num_layers=2)
    assert said['targets'] == [f'{x}_proj' for x in ('down', 'gate', 'k', 'o', 'q', 'up', 'v')]
    assert (said['rank'], said['alpha'], said['dora'], said['rslora']) == (3, 5.0, True, False)
    with pytest.raises(FileNotFoundError, match="'nowhere', which is no folder: say with base"):
        load_model(tmp_path / 'theirs', base='nowhere')
    said = json.loads((tmp_path / 'theirs' / 'adapter_config.json').read_text())
    (tmp_path / 'theirs' / 'adapter_config.json').write_text(
        json.dumps(said | {'base_model_name_or_path': None})
    )
    with pytest.raises(FileNotFoundError, match='does not say of which weights: say with base'):
        load_model(tmp_path / 'theirs')
    moved = shutil.move(hf, tmp_path / 'moved')
    found = load_model(tmp_path / 'theirs', base=moved).logits(ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('layers', [[0], [1]])
def test_what_peft_has_trained_on_some_layers_is_read(tmp_path: Path, layers) -> None:
    hf, _, _ = adapted_run(tmp_path)
    config = peft.LoraConfig(r=3, target_modules=['q_proj', 'v_proj'], layers_to_transform=layers)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(hf), config)
    for name, parameter in theirs.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    theirs.save_pretrained(tmp_path / 'theirs')
    names = [f'layers.{layers[0]}.self_attn.{name}_proj' for name in 'qv']
    for num_layers in (None, 2):
        assert adapter_of_peft(tmp_path / 'theirs', num_layers)['targets'] == names
    ids = torch.randint(300, (2, 30))
    wanted = theirs(ids).logits
    found = load_model(tmp_path / 'theirs').logits(ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    if layers == [1]:
        trained_run(tmp_path / 'shallow', num_layers=1)
        with pytest.raises(ValueError, match=r"theirs does not fit .*'layers\.1\.self_attn\.q_pr"):
            load_model(tmp_path / 'theirs', base=tmp_path / 'shallow' / 'work')


def test_settings_targets_and_tokenizer_are_written(tmp_path: Path) -> None:
    hf, work_dir, _ = adapted_run(tmp_path, targets=['layers.0.self_attn.q_proj'], dropout=0.1)
    export_peft(work_dir / 'iter_3', tmp_path / 'peft')
    said = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert said['target_modules'] == ['model.layers.0.self_attn.q_proj']
    assert said['base_model_name_or_path'] == str(hf)
    assert (said['r'], said['lora_alpha'], said['lora_dropout']) == (4, 6.0, 0.1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'peft')
    assert '<eoh>' in tokenizer.chat_template
    assert stored_template(tmp_path / 'peft') == 'internlm'
    text = 'def f7(x): return'
    assert load_tokenizer_of(tmp_path / 'peft').encode(text) == tokenizer.encode(text)[1:]
    with pytest.raises(FileExistsError):
        export_peft(work_dir, tmp_path / 'peft')
    export_peft(work_dir, tmp_path / 'peft', overwrite=True)
    with pytest.raises(ValueError, match='iter_3 has no adapters'):
        export_peft(tmp_path / 'work', tmp_path / 'other')


def test_a_packed_base_is_not_named(tmp_path: Path, caplog) -> None:
    _, work_dir, model = adapted_run(tmp_path, InternLM2, hf='internlm2')
    export_peft(work_dir, tmp_path / 'peft')
    said = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert said['base_model_name_or_path'] is None
    assert 'export it with tools/convert2hf.py --format llama' in caplog.text
    ids = torch.randint(300, (2, 30))
    ours = load_model(tmp_path / 'peft', base=tmp_path / 'hf').logits(ids)
    assert (ours - model.logits(ids)).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize('family', [InternLM, Qwen3])
def test_peft_gives_the_same_scores(tmp_path: Path, family) -> None:
    hf, work_dir, adapted = adapted_run(tmp_path, family)
    file = work_dir / 'iter_3' / 'config.json'
    said = json.loads(file.read_text())
    said['model']['objective'] = {'type': 'PairwiseReward'}
    model = MODELS.build(dict(said['model']))
    model.load_state_dict(adapted.state_dict(), strict=False)
    torch.nn.init.normal_(model.objective.score.weight)
    state = dict(model.named_parameters())
    learnt = {name: p.detach() for name, p in state.items() if p.requires_grad}
    assert 'objective.score.weight' in learnt
    Checkpointer(async_save=False).save(
        tmp_path / 'reward' / 'iter_3',
        {f'model.{name}': value for name, value in learnt.items()},
        {'iter': 3, 'base': describe_base(hf).as_json()},
        {'config.json': json.dumps(said)},
    )
    export_peft(tmp_path / 'reward', tmp_path / 'peft')
    said = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert (said['task_type'], said['modules_to_save']) == ('SEQ_CLS', ['score'])
    plain = AutoModelForSequenceClassification.from_pretrained(hf, num_labels=1)
    plain.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / 'peft').eval()
    assert type(theirs).__name__ == 'PeftModelForSequenceClassification'
    ids = torch.randint(1, 300, (3, 20))
    with torch.no_grad():
        wanted = theirs(ids).logits.squeeze(1)
        hidden = model.eval().hidden_states(ids, torch.arange(20).expand(3, -1))
        found = model.objective.score(hidden[:, -1]).squeeze(1)
        merged = theirs.merge_and_unload()(ids).logits.squeeze(1)
    assert found.unique().numel() == 3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters of InternLM in peft's format."""
    _, work_dir, _ = adapted_run(tmp_path, targets=['q_proj'])
    export_peft(work_dir, tmp_path / 'peft')
    return tmp_path / 'peft'


@pytest.mark.parametrize(
    'change, message',
    [
        ({'bias': 'all'}, 'bias=\'all\' is not known here, only "none"'),
        ({'modules_to_save': ['lm_head']}, r"modules_to_save=\['lm_head'\] is not known"),
        ({'rank_pattern': {'q_proj': 2}}, 'rank_pattern='),
        ({'peft_type': 'LOHA'}, 'peft_type=\'LOHA\' is not known here, only "LORA"'),
        ({'r': '4'}, "r='4' and lora_alpha=6.0 must be numbers"),
    ],
)
def test_what_is_not_known_is_refused(folder: Path, change: dict, message: str) -> None:
    file = folder / 'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        adapter_of_peft(folder)


def test_damaged_folders_are_named(folder: Path, tmp_path: Path) -> None:
    file = folder / 'adapter_model.safetensors'
    tensors = load_file(file)
    save_file({'transformer.h.0.lora_A.weight': torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.lora_A\.weight' is no adapter of a"):
        read_peft(folder)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r'adapter_model\.safetensors is truncated or damaged'):
        read_peft(folder)
    (folder / 'adapter_config.json').write_text('{"r": 4')
    with pytest.raises(ValueError, match=r'adapter_config\.json is truncated or damaged'):
        adapter_of_peft(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='adapters in pickled files are not read'):
        read_peft(folder)
    with pytest.raises(FileNotFoundError, match=r'adapter_config\.json is missing'):
        adapter_of_peft(tmp_path)


@pytest.mark.parametrize(
    'sizes, adapter, message',
    [
        ({}, None, r'the model has none: set model.adapter=.*rank'),
        ({}, {'rank': 8, 'alpha': 6.0}, 'model.adapter.rank=8, but .* has adapters of rank=4'),
        (
            {},
            {'rank': 4, 'alpha': 8.0},
            'alpha=8.0, but .* has adapters of alpha=6.0',
        ),
        (
            {'hidden_size': 64},
            {'rank': 4, 'alpha': 6.0},
            r'shape \[4, 32\] there and \[4, 64\]',
        ),
        ({'num_layers': 3}, {'rank': 4, 'alpha': 6.0}, r'layers.2.* has shape None there'),
    ],
)
def test_adapters_of_another_model_are_refused(folder: Path, sizes, adapter, message) -> None:
    adapter = adapter and adapter | {'targets': ['q_proj']}
    with torch.device('meta'):
        model = MODELS.build(dict(type=InternLM, vocab_size=400, **SIZES | sizes, adapter=adapter))
    with pytest.raises(ValueError, match=message):
        check_peft(folder, model, adapter)
