"""Settings of PEFT that change what adapters compute, against peft itself."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm_mm.checkpoint.peft_config import read_peft_config
from internlm_mm.checkpoint.pretrained import load_model
from tests.trained import adapted_run

pytestmark = [
    pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning'),
    pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning'),
]
IDS = torch.arange(60).reshape(2, 30)


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
    """A Hugging Face folder."""
    return adapted_run(tmp_path_factory.mktemp('run'))[0]


def saved(base: Path, folder: Path, **options) -> torch.Tensor:
    """What adapters compute that peft has saved at `folder`."""
    config = peft.LoraConfig(r=2, target_modules=['q_proj', 'o_proj'], **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'init_lora_weights': False},
        {'init_lora_weights': 'gaussian', 'exclude_modules': ['v_proj'], 'task_type': 'CAUSAL_LM'},
        {'init_lora_weights': 'orthogonal', 'lora_dropout': 0.1, 'revision': 'main'},
    ],
)
def test_what_is_let_in_computes_what_peft_does(base: Path, tmp_path: Path, options) -> None:
    wanted = saved(base, tmp_path / 'theirs', **options)
    found = load_model(tmp_path / 'theirs').logits(IDS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('kind', ['pissa', 'pissa_niter_2', 'olora'])
def test_kinds_that_change_the_base_are_refused(base: Path, tmp_path: Path, kind: str) -> None:
    saved(base, tmp_path / 'theirs', init_lora_weights=kind)
    with pytest.raises(ValueError, match=rf"='{kind}' is not.*changes the frozen .*merge_and_unl"):
        load_model(tmp_path / 'theirs')


def test_merged_by_peft_they_are_read(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights='pissa')
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    wanted = model(IDS).logits
    model.merge_and_unload().save_pretrained(tmp_path / 'merged')
    found = load_model(tmp_path / 'merged').logits(IDS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    'change, message',
    [
        ({'alora_invocation_tokens': [3, 4]}, r'alora_invocation_tokens=\[3, 4\] is not known'),
        ({'init_lora_weights': 'corda'}, "'corda' is not known .*changes the frozen weights"),
        ({'init_lora_weights': 'loftq'}, "'loftq' is not known .*changes the frozen weights"),
        ({'init_lora_weights': 'eva'}, r'only true or false or null or "gaussian" or "orthogonal"'),
        ({'loftq_config': {'loftq_bits': 4}}, 'loftq_config='),
        ({'use_bdlora': {'nblocks': 2}}, 'use_bdlora='),
        ({'kasa_config': {'beta': 1.0}}, 'kasa_config='),
        ({'arrow_config': {'top_k': 3}}, 'arrow_config='),
        ({'megatron_config': {'x': 1}}, 'megatron_config='),
        ({'a_later_one': 'on'}, r"a_later_one='on' is not known here, only null or false or \{\}"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused(tmp_path: Path, change, message) -> None:
    said = peft.LoraConfig(r=2, target_modules=['q_proj'])
    said.save_pretrained(tmp_path)
    file = tmp_path / 'adapter_config.json'
    content = json.loads(file.read_text()) | {'a_later_one': None}
    file.write_text(json.dumps(content))
    assert read_peft_config(tmp_path) == content  # all that peft writes by itself
    file.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        read_peft_config(tmp_path)
