import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from internlm_mm.registry import TOKENIZERS
from internlm_mm.tokenizers import HFTokenizer, SentencePieceTokenizer
from internlm_mm.tokenizers.convert import write_hf_tokenizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as Hugging Face saves one, with special tokens."""
    path = tmp_path_factory.mktemp('hf')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<|begin|>', '<|end|>', '<|pad|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['the quick brown fox , the lazy dog'] * 9, trainer)
    tokenizer.save(str(path / 'tokenizer.json'))
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': '<|begin|>',
        'eos_token': '<|end|>',
        'clean_up_tokenization_spaces': True,
    }
    (path / 'tokenizer_config.json').write_text(json.dumps(config))
    return path


@pytest.fixture(scope='module')
def tokenizer(folder: Path) -> HFTokenizer:
    return HFTokenizer(folder)


@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_decode_gives_back_the_text(tokenizer: HFTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_transformers_own(tokenizer: HFTokenizer, folder: Path) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode('the fox , jumps') == reference.encode('the fox , jumps')
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.pad_id == reference.pad_token_id
    assert tokenizer.vocab_size == len(reference)


def test_text_cannot_spell_a_special_token(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode('the<|end|>fox')
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == 'the<|end|>fox'


def test_saved_tokenizer_is_the_same(tokenizer: HFTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    copy = HFTokenizer(tmp_path / 'tokenizer.json')
    assert copy.hash == tokenizer.hash
    assert copy.eos_id == tokenizer.eos_id


def test_works_without_a_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'tokenizer.json').write_bytes((folder / 'tokenizer.json').read_bytes())
    bare = HFTokenizer(tmp_path)
    assert bare.decode(bare.encode('the fox')) == 'the fox'
    assert bare.eos_id is None


def test_is_registered(tokenizer: HFTokenizer, folder: Path) -> None:
    assert TOKENIZERS.build(dict(type='HFTokenizer', path=str(folder))).hash == tokenizer.hash


@pytest.mark.parametrize('with_config', [True, False])
@pytest.mark.parametrize('content', ['{"version": "1.0", "mod', '{}', '[]', ''])
def test_a_damaged_tokenizer_is_named(
    folder: Path, tmp_path: Path, content: str, with_config: bool
) -> None:
    (tmp_path / 'tokenizer.json').write_text(content)
    if with_config:
        config = (folder / 'tokenizer_config.json').read_text()
        (tmp_path / 'tokenizer_config.json').write_text(config)
    with pytest.raises(ValueError, match=rf'{tmp_path}: tokenizer\.json or .* is damaged: \S'):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize('content', ['{"eos_token": "<|e', '[]', '{"bos_token": 5}'])
def test_a_damaged_config_is_named(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / 'tokenizer.json').write_text((folder / 'tokenizer.json').read_text())
    (tmp_path / 'tokenizer_config.json').write_text(content)
    with pytest.raises(ValueError, match=r'tokenizer_config\.json is .*damaged: \S'):
        HFTokenizer(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'tokenizer\.json is missing'):
        HFTokenizer(tmp_path)


def test_a_converted_model_is_the_same_tokenizer(
    trained: SentencePieceTokenizer, tmp_path: Path
) -> None:
    trained.save(tmp_path)
    write_hf_tokenizer(tmp_path / 'tokenizer.model', tmp_path)
    assert HFTokenizer(tmp_path).hash == trained.hash
    (tmp_path / 'tokenizer.model').write_bytes(b'another')
    assert HFTokenizer(tmp_path).hash != trained.hash


@pytest.mark.parametrize('file', ['config.json', 'tokenizer_config.json'])
def test_code_in_the_folder_is_neither_run_nor_asked_about(
    tmp_path: Path, folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('builtins.input', lambda *_: pytest.fail('asked'))
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / 'code.py').write_text('raise SystemExit("run")')
    said = json.loads((folder / file).read_text()) if file == 'tokenizer_config.json' else {}
    said['auto_map'] = {'AutoConfig': 'code.Config', 'AutoTokenizer': ['code.T', 'code.T']}
    (tmp_path / file).write_text(json.dumps({'model_type': 'internlm2'} | said))
    assert HFTokenizer(tmp_path).encode('the fox') == HFTokenizer(folder).encode('the fox')
