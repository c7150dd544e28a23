"""`internlm_mm/utils/internlm_data.py`: what a run reads and writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm_mm.datasets.internlm_bin import BinSample, write_bin
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.utils.config import check_config, load_config, to_plain
from internlm_mm.utils.config_draft import Row
from internlm_mm.utils.internlm_config import convert_text
from internlm_mm.utils.internlm_reader import read_internlm_config
from tests.internlm_configs import SFT_2023
from tests.trained import train_tokenizer

Convert = Callable[..., tuple[dict[str, Any], dict[str, Row]]]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """The settings of `sft_2023.py` with other values, and the rows by key."""

    def run(
        ckpt: dict[str, Any] | None = None, only: bool = False, **data: Any
    ) -> tuple[dict[str, Any], dict[str, Row]]:
        config = read_internlm_config(SFT_2023)
        options = {key: data.pop(key) for key in ('source', 'tokenizer') if key in data}
        config.values['data'] |= data
        if ckpt is not None:
            config.values['ckpt'] = {} if only else dict(config.values['ckpt'])
            config.values['ckpt'] |= ckpt
        text, rows = convert_text(
            config, 'out.py', data=options.get('source'), tokenizer=options.get('tokenizer')
        )
        out = tmp_path / 'out.py'
        out.write_text(text)
        loaded = load_config(out)
        check_config(loaded)
        return to_plain(loaded._cfg_dict), {row.key: row for row in rows}

    return run


def test_no_data_is_random_tokens(convert: Convert) -> None:
    found, rows = convert(train_folder=None)
    dataset = found['train_dataloader']['dataset']
    assert dataset['type'] == 'internlm_mm.datasets.RandomTokens'
    assert (dataset['vocab_size'], dataset['seq_len']) == (103_168, 2048)
    assert 'val_dataloader' not in found and 'tokenizer' not in found
    assert rows['data.train_folder'].status == 'changed'
    assert rows['data.valid_every'].status == 'changed'  # there was a dummy set


def test_no_word_of_data_is_said_too() -> None:
    config = read_internlm_config(SFT_2023)
    del config.values['data']['train_folder']
    config.values['TRAIN_FOLDER'] = '/path/to/dataset'  # and nothing that uses it
    text, rows = convert_text(config, 'out.py')
    became = {row.key: row for row in rows}
    assert became['data.train_folder'].became.startswith('random tokens, which teach nothing')
    assert became['TRAIN_FOLDER'].became == 'nothing uses it'
    assert 'data.train_folder' in text.partition('read_base')[0]  # among its comments


def test_bin_files_are_read_where_they_lie(convert: Convert) -> None:
    found, rows = convert()
    wanted = dict(
        type='internlm_mm.datasets.InternLMBinDataset',
        data_root='/data/train',
        seq_len=2048,
        vocab_size=103_168,
        min_length=50,
    )
    assert found['train_dataloader']['dataset'] == wanted  # and no option of the base's dataset
    held_out = {**wanted, 'data_root': '/data/valid', 'shuffle': False}
    assert found['val_dataloader']['dataset'] == held_out
    assert found['tokenizer'] is None  # the files do not say what made them
    for key in ('data.train_folder', 'data.valid_folder'):
        assert rows[key].status == 'mapped' and 'read as they are' in rows[key].became
    found, _ = convert(train_folder='local:a/b', min_length=0)
    assert found['train_dataloader']['dataset']['data_root'] == 'a/b'
    assert found['train_dataloader']['dataset']['min_length'] == 1


def test_bin_files_that_are_named(convert: Convert, tmp_path: Path) -> None:
    """As InternLM's own tool lays them out; the rows are those of the dataset's own tests."""
    sample = BinSample(np.array([1, 5, 6, 2]), np.array([1, 0, 1, 1]))
    for part in ('train', 'valid'):
        write_bin(tmp_path / 'alpaca' / part / 'en' / 'dataset.bin', [sample] * 9)
    train_tokenizer(tmp_path / 'tokenizer')
    tokenizer = tmp_path / 'tokenizer' / 'tokenizer.model'
    found, _ = convert(source=tmp_path / 'alpaca', tokenizer=tokenizer, min_length=0)
    for loader, part in (('train_dataloader', 'train'), ('val_dataloader', 'valid')):
        dataset = found[loader]['dataset'] | dict(cache_dir=str(tmp_path / 'cache'))
        assert dataset['data_root'] == str(tmp_path / 'alpaca' / part)
        rows = DATASETS.build(dataset)
        assert rows.domains == ['en'] and rows.num_tokens == 36
        assert rows[0].labels[:4].tolist() == [IGNORE_INDEX, 6, 2, IGNORE_INDEX]
    assert found['tokenizer']['path'] == str(tokenizer)


def test_data_of_ours(convert: Convert, tmp_path: Path) -> None:
    tokens = tmp_path / 'tokens'
    (tokens / 'train').mkdir(parents=True)
    found, rows = convert(source=tokens)
    assert found['train_dataloader']['dataset']['data_root'] == str(tokens / 'train')
    assert found['val_dataloader'] is None  # the folder has no held-out part
    assert rows['data.valid_every'].became == 'no held-out data'
    assert found['tokenizer'] is None

    (tokens / 'validation').mkdir()
    found, _ = convert(source=tokens)
    assert found['val_dataloader']['dataset']['data_root'] == str(tokens / 'validation')

    found, _ = convert(source=tokens / 'train')
    assert found['train_dataloader']['dataset']['data_root'] == str(tokens / 'train')

    with pytest.raises(FileNotFoundError, match=r'--data .*nothing: no such folder'):
        convert(source=tmp_path / 'nothing')


def test_the_tokenizer_is_the_one_that_made_the_data(convert: Convert, tmp_path: Path) -> None:
    for name in ('pieces', 'fast'):
        (tmp_path / name).mkdir()
    (tmp_path / 'fast' / 'tokenizer.json').touch()
    summary = tmp_path / 'preprocessing.json'
    summary.write_text(json.dumps({'tokenizer': {'path': str(tmp_path / 'pieces')}}))
    found, _ = convert(source=tmp_path)
    assert found['tokenizer'] == {
        'type': 'internlm_mm.tokenizers.SentencePieceTokenizer',
        'path': str(tmp_path / 'pieces'),
    }
    found, _ = convert(source=tmp_path, tokenizer=tmp_path / 'fast')
    assert found['tokenizer'] == {
        'type': 'internlm_mm.tokenizers.HFTokenizer',
        'path': str(tmp_path / 'fast'),
    }


def test_workers_and_lengths(convert: Convert, tmp_path: Path) -> None:
    found, _ = convert(source=tmp_path, num_worker=2, min_length=0)
    assert found['train_dataloader']['num_workers'] == 2
    assert found['train_dataloader']['dataset']['min_document_length'] == 1


def test_a_run_that_never_evaluates(convert: Convert) -> None:
    for options in (dict(valid_every=0), dict(valid_folder=None)):
        found, _ = convert(**options)
        assert found['val_dataloader'] is None and 'val_cfg' not in found
        assert 'evaluation' not in found['default_hooks']


def test_a_run_that_saves_nothing(convert: Convert) -> None:
    found, rows = convert(dict(enable_save_ckpt=False))
    assert found['default_hooks']['checkpoint'] is None
    assert 'as you said' in rows['ckpt.enable_save_ckpt'].became


@pytest.mark.parametrize(
    ('ckpt', 'load_from', 'resume', 'status'),
    [
        # to begin from weights, which the original does only with auto_resume=False
        (dict(load_ckpt_info=dict(path='a/b'), auto_resume=False), 'a/b', False, 'mapped'),
        (dict(load_ckpt_info=dict(path='local:a')), 'a', True, 'changed'),
        (dict(load_ckpt_info=dict(path=None)), None, True, None),
        (dict(load_ckpt_info=None, load_model_only_folder='local:a'), 'a', True, None),
        (dict(load_ckpt_info=None, load_ckpt_folder='a'), 'a', True, None),
        (dict(load_ckpt_info=dict(path='boto3:s3://b.10.0.0.1/c')), None, True, 'changed'),
    ],
)
def test_where_a_run_begins(
    convert: Convert, ckpt: dict, load_from: str | None, resume: bool, status: str | None
) -> None:
    found, rows = convert({'enable_save_ckpt': False, **ckpt}, only=True)
    assert found['load_from'] == load_from and found['resume'] is resume
    if status:
        assert rows['ckpt.load_ckpt_info.path'].status == status


@pytest.mark.parametrize(
    ('info', 'changed'),
    [
        (dict(content=('model',), ckpt_type='internevo'), set()),
        (dict(content='model', ckpt_type='hf'), set()),
        (dict(content=('model', 'optimizer')), {'content'}),
        (dict(content=['all'], ckpt_type='llama'), {'content', 'ckpt_type'}),
    ],
)
def test_what_a_run_takes(convert: Convert, info: dict[str, Any], changed: set[str]) -> None:
    ckpt = dict(load_ckpt_info=dict(path='a', **info), auto_resume=False)
    _, rows = convert({'enable_save_ckpt': False, **ckpt}, only=True)
    found = {key.rpartition('.')[2] for key, row in rows.items() if row.status == 'changed'}
    assert {'content', 'ckpt_type'} & found == changed
