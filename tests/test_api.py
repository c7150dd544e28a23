"""The Python API: training that is stopped, and a finished run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

import internlm_mm
from internlm_mm.api import from_pretrained, generate, train
from internlm_mm.utils.config import load_config
from tests.trained import trained_run

FAULTY = Path(__file__).parent / 'configs' / 'faulty.py'

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture
def run(tmp_path):
    return trained_run(tmp_path)


def test_generate_from_a_path_or_a_model(run):
    work_dir, model, tokenizer = run
    generator = from_pretrained(work_dir, device='cpu')
    (text,) = generate(generator, 'def f7', max_new_tokens=5)
    ids = [tokenizer.bos_id, *tokenizer.encode('def f7')]
    for _ in range(5):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert text == tokenizer.decode(ids[-5:])
    texts = generate(generator, ['def f7', 'return'], max_new_tokens=5)
    assert texts[0] == text and len(texts) == 2


def test_generate_with_a_stop_string_and_a_penalty(run):
    generator = from_pretrained(run[0], device='cpu')
    (free,) = generate(generator, 'def f7', max_new_tokens=20)
    stop = free[5:8]
    assert generate(generator, 'def f7', max_new_tokens=20, stop=stop) == [free.split(stop)[0]]
    assert generate(generator, 'def f7', max_new_tokens=20, stop=['\0', stop]) == [
        free.split(stop)[0]
    ]
    (other,) = generate(generator, 'def f7', max_new_tokens=20, repetition_penalty=5.0)
    assert len(set(generator.tokenizer.encode(other))) > len(set(generator.tokenizer.encode(free)))


def test_dtype_and_device(run):
    assert from_pretrained(run[0], device='cpu').model.norm.weight.dtype == torch.float32
    half = from_pretrained(run[0], device='cpu', dtype=torch.bfloat16)
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert len(generate(half, 'x', max_new_tokens=3, temperature=1.0, seed=0)) == 1


def test_top_level_names():
    assert internlm_mm.from_pretrained is from_pretrained
    assert internlm_mm.generate is generate


def test_training_that_a_signal_stops_does_not_pass_for_trained(tmp_path: Path) -> None:
    def run(name: str, **fault: Any) -> Config:
        config = load_config(FAULTY, {'experiment_name': name, 'train_cfg.max_iters': 4})
        for hook in config.custom_hooks:
            if hook['type'] == 'FaultHook':
                hook.update(fault)
        return config

    with pytest.raises(KeyboardInterrupt, match=r'after step 2 of 4; .* from ') as stopped:
        train(run('api_stops', kind='signal', step=1), work_dir=tmp_path / 'run')
    assert str(stopped.value).endswith(str(tmp_path / 'run' / 'iter_2'))
    assert train(run('api_goes_on'), work_dir=tmp_path / 'run', resume=True).name == 'iter_4'
