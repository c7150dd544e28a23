"""The template of a checkpoint and of Hugging Face folders."""

import json

import pytest

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.inference import stored_template, template_for
from tests.trained import trained_run

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp('base'))[0]


def test_a_run_that_names_its_template(chat_run):
    assert stored_template(chat_run) == stored_template(chat_run / 'iter_1') == 'internlm2'
    assert template_for(chat_run) == 'internlm2'


def test_a_base_model_has_none_and_its_family_decides(base):
    assert stored_template(base) is None
    assert template_for(base) == 'internlm'


def test_export_keeps_it(chat_run, tmp_path):
    convert_to_hf(chat_run, tmp_path / 'hf', dtype='float32')
    assert stored_template(tmp_path / 'hf') == template_for(tmp_path / 'hf') == 'internlm2'
    tokens = json.loads((tmp_path / 'hf' / 'tokenizer.json').read_text())['added_tokens']
    end = next(token['id'] for token in tokens if token['content'] == '<|im_end|>')
    generation = json.loads((tmp_path / 'hf' / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == [2, end]
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['eos_token_id'] == 2


def test_export_of_a_base_model(base, chat_run, tmp_path):
    convert_to_hf(base, tmp_path / 'hf', dtype='float32')
    assert stored_template(tmp_path / 'hf') is None
    assert template_for(tmp_path / 'hf') == 'chatml'  # a Llama now
    assert not (tmp_path / 'hf' / 'chat_template.jinja').exists()
    convert_to_hf(chat_run, tmp_path / 'plain', dtype='float32', chat_template='none')
    assert stored_template(tmp_path / 'plain') is None
    convert_to_hf(base, tmp_path / 'chosen', dtype='float32', chat_template='llama3')
    assert stored_template(tmp_path / 'chosen') == 'llama3'
    generation = json.loads((tmp_path / 'chosen' / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == 2  # no such token in the vocabulary


def test_template_of_somebody_else(base, tmp_path):
    convert_to_hf(base, tmp_path / 'hf', dtype='float32')
    (tmp_path / 'hf' / 'chat_template.jinja').write_text("{{ '<|start_header_id|>' }}")
    assert stored_template(tmp_path / 'hf') == template_for(tmp_path / 'hf') == 'llama3'


def test_no_model(tmp_path):
    for find in (stored_template, template_for):
        with pytest.raises(FileNotFoundError, match='none'):
            find(tmp_path / 'none')
