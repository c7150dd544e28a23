"""Parts of checkpoints with adapters, and exports in which they are merged."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm_mm.api import generate
from internlm_mm.checkpoint.adapters import Merged, build_adapter, open_parts
from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model, load_tokenizer_of
from internlm_mm.inference import Generator
from internlm_mm.models import InternLM, InternLM2
from tests.trained import adapted_run, trained_run

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('family, form', [(InternLM, None), (InternLM2, 'internlm2')])
def test_an_export_has_them_merged(tmp_path: Path, family, form, dora: bool) -> None:
    hf, work_dir, model = adapted_run(tmp_path, family, hf=form, dora=dora)
    assert convert_to_hf(work_dir, tmp_path / 'out', dtype='float32') < 1e-4
    ids = torch.randint(300, (2, 30))
    wanted = model.logits(ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out')(ids).logits
    assert (theirs - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with_base = load_model(work_dir, base=hf).logits(ids)
    assert torch.equal(with_base, load_model(work_dir).logits(ids))


def test_a_checkpoint_may_hold_the_frozen_weights_itself(tmp_path: Path) -> None:
    _, work_dir, model = adapted_run(tmp_path)
    config = (work_dir / 'iter_3' / 'config.json').read_text()
    Checkpointer(async_save=False).save(
        tmp_path / 'whole' / 'iter_3',
        {f'model.{name}': p.detach() for name, p in model.named_parameters()},
        {'iter': 3},
        {'config.json': config},
    )
    ids = torch.randint(300, (2, 30))
    loaded = load_model(tmp_path / 'whole')
    assert torch.equal(loaded.logits(ids), load_model(work_dir).logits(ids))
    with pytest.raises(ValueError, match='holds all of its weights itself'):
        load_model(tmp_path / 'whole', base=tmp_path / 'hf')


def test_it_generates_what_the_model_in_training_does(tmp_path: Path) -> None:
    _, work_dir, model = adapted_run(tmp_path)
    prompts = ['def f7(x)', 'return']
    texts = generate(work_dir, prompts, max_new_tokens=20)  # the likeliest tokens
    training = Generator(model.double(), load_tokenizer_of(work_dir))
    assert texts == generate(training, prompts, max_new_tokens=20)
    assert texts != generate(tmp_path / 'hf', prompts, max_new_tokens=20)


def test_no_adapters_no_parts(tmp_path: Path) -> None:
    work_dir, _, _ = trained_run(tmp_path)
    assert open_parts(work_dir / 'iter_3') is None
    with pytest.raises(ValueError, match=r'base=x: .*iter_3 holds all of its weights itself'):
        open_parts(work_dir / 'iter_3', 'x')


def test_an_adapter_of_nothing_is_named() -> None:
    adapter = build_adapter({'rank': 2})
    tensors = {'layers.9.mlp.up_proj.lora_A.weight': torch.ones(2, 4)}
    with pytest.raises(
        ValueError, match=r"of 'layers\.9\.mlp\.up_proj\.weight', which is no weight"
    ):
        Merged({'norm.weight': torch.ones(4)}, tensors, adapter)
