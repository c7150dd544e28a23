"""Which template a folder, a config or a vocabulary speaks for."""

import json

import pytest

from internlm_mm.tokenizers import load_tokenizer
from internlm_mm.tokenizers.chat_choice import (
    recorded_template,
    suitable_template,
    template_of_jinja,
)
from internlm_mm.tokenizers.chat_export import JINJA_NAME
from tests.conversations import NAMES
from tests.trained import train_tokenizer


@pytest.mark.parametrize('name', NAMES)
def test_what_an_export_wrote(name, exported):
    assert recorded_template(exported[name]) == name
    same = 'internlm2' if name == 'internlm3' else name  # the strings are
    assert template_of_jinja(exported[name], '') == same


@pytest.mark.parametrize(
    'config',
    [
        {'chat_template': 'chatml'},
        {'train_dataloader': {'datasets': [{'path': 'x'}, {'chat_template': 'chatml'}]}},
        {'data': {'chat_template': {'type': 'internlm_mm.tokenizers.chat_templates.chatml'}}},
        {'a': {'chat_template': 'unheard_of'}, 'b': {'chat_template': 'chatml'}},
    ],
)
def test_what_a_config_says(config, tmp_path):
    assert recorded_template(tmp_path, config) == 'chatml'


def test_a_template_that_is_not_registered_here(tmp_path):
    (tmp_path / 'tokenizer_config.json').write_text('{"chat_template_name": "mine"}')
    with pytest.raises(ValueError, match="chat template 'mine', which is not registered here"):
        recorded_template(tmp_path, {'chat_template': 'chatml'})


def test_nothing_that_a_folder_names_is_imported(tmp_path, monkeypatch):
    ran = tmp_path / 'ran'
    (tmp_path / 'stray_module.py').write_text(
        f"open({str(ran)!r}, 'w').close()\n\n\ndef function():\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ('stray_module', 'stray_module.function'):
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template_name': name}))
        with pytest.raises(ValueError, match='not registered here'):
            recorded_template(tmp_path)
        assert recorded_template(tmp_path / 'nowhere', {'chat_template': name}) is None
    assert not ran.exists()


def test_nothing_is_recorded(tmp_path):
    assert recorded_template(tmp_path, {'model': {'type': 'x'}, 'chat_template': None}) is None
    assert template_of_jinja(tmp_path, 'internlm') is None


@pytest.mark.parametrize(
    ('source', 'family', 'name'),
    [
        ("{{ '<|im_start|>' + m.role }}", 'qwen2', 'chatml'),
        ("{{ '<|im_start|>' + m.role }}", 'internlm2', 'internlm2'),
        ("{{ '<|im_start|>' + m.role }}", 'internlm3', 'internlm3'),
        ("{{ '<|im_start|>' }}{{ '<|plugin|>' }}", 'llama', 'internlm2'),
        ("{{ '<|start_header_id|>' }}", 'llama', 'llama3'),
        ("{{ '<|User|>:' }}", 'llama', 'internlm'),
        ("{{ '<|System|>:' }}{{ '<TOKENS_UNUSED_2>' }}{{ '<eoh>' }}", 'x', 'internlm_v1_1'),
        ("{{ '[INST]' }}", 'mistral', 'chatml'),
    ],
)
def test_templates_of_others(source, family, name, tmp_path):
    (tmp_path / JINJA_NAME).write_text(source)
    assert template_of_jinja(tmp_path, family) == name
    (tmp_path / JINJA_NAME).unlink()
    config = tmp_path / 'tokenizer_config.json'
    for stored in (
        source,
        [{'name': 'rag', 'template': 'x'}, {'name': 'default', 'template': source}],
    ):
        config.write_text(json.dumps({'chat_template': stored}))
        assert template_of_jinja(tmp_path, family) == name


def test_tokens_speak(exported, internlm_vocabulary, tmp_path):
    assert suitable_template(load_tokenizer(exported['llama3']), 'llama') == 'llama3'
    assert suitable_template(internlm_vocabulary, 'internlm') == 'internlm2'
    first = train_tokenizer(tmp_path / 'v1', user_defined_symbols=['<eoh>', '<TOKENS_UNUSED_2>'])
    assert suitable_template(first, 'llama') == 'internlm'
    only = train_tokenizer(tmp_path / 'chatml', user_defined_symbols=['<|im_start|>'])
    assert suitable_template(only, 'internlm') == 'chatml'


@pytest.mark.parametrize(
    ('family', 'name'),
    [
        ('internlm', 'internlm'),
        ("internlm2 ['internlm2forcausallm']", 'internlm2'),
        ('internlm3', 'internlm3'),
        ('qwen2', 'chatml'),
        ('mistral', 'chatml'),
    ],
)
def test_families_speak_where_tokens_do_not(family, name, tmp_path):
    assert suitable_template(None, family) == name
    assert suitable_template(train_tokenizer(tmp_path), family) == name
