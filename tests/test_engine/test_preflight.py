from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from internlm_mm.engine.preflight import (
    build_data_part,
    check_run,
    check_writable,
    give_tokenizer,
    propose_fit,
)
from internlm_mm.models import InternLM
from internlm_mm.parallel.mesh import LayoutError, resolve_layout
from internlm_mm.registry import DATASETS, TOKENIZERS
from internlm_mm.tokenizers import build_template
from tests.conversations import byte_level


def model() -> InternLM:
    with torch.device('meta'):
        return InternLM(
            vocab_size=100, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
            max_seq_len=64,
        )  # fmt: skip


def loaders(**attributes) -> dict:
    return {'train_dataloader': SimpleNamespace(dataset=SimpleNamespace(**attributes))}


def tokenizer(size: int = 90, digest: str = 'a' * 64) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=size, hash=digest)


def test_what_fits() -> None:
    made_by = {'type': 'sentencepiece', 'hash': 'a' * 64}
    check_run(model(), loaders(seq_len=64, vocab_size=100, tokenizer=made_by), tokenizer(100))
    check_run(model(), loaders(seq_len=1), None)  # a dataset that says nothing
    check_run(torch.nn.Linear(1, 1), loaders(seq_len=10**6), tokenizer())  # nor does the model


@pytest.mark.parametrize(
    ('attributes', 'tokens', 'message'),
    [
        (
            {'seq_len': 65},
            None,
            r'train_dataloader\.dataset\.seq_len=65 is longer than model\.max_seq_len=64',
        ),
        ({'seq_len': 8, 'vocab_size': 101}, None, r'vocabulary of 101, but model\.vocab_size=100'),
        ({'seq_len': 8}, tokenizer(101), r'model\.vocab_size=100 is too small .* has 101 tokens'),
        (
            {'seq_len': 8, 'tokenizer': {'hash': 'b' * 64}},
            tokenizer(),
            r'another tokenizer \(b{12}\.\.\.\) than the config names \(a{12}\.\.\.\)',
        ),
    ],
)
def test_what_does_not_fit(attributes: dict, tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(model(), loaders(**attributes), tokens)


def test_one_chat_template_is_trained_and_evaluated() -> None:
    def check(trained, held_out) -> None:
        both = {'train_dataloader': trained, 'val_dataloader': held_out}
        check_run(
            model(),
            {
                key: SimpleNamespace(
                    dataset=SimpleNamespace(seq_len=8, template=one and build_template(one))
                )
                for key, one in both.items()
            },
        )

    for same in ('internlm', 'internlm2', 'chatml'):
        check(same, dict(type=same))
    check('internlm', None)  # pre-training data has none
    check(None, 'internlm')
    with pytest.raises(
        ValueError,
        match=r"val_dataloader\.dataset\.chat_template='internlm2', but "
        r"train_dataloader\.dataset\.chat_template='chatml': they must be the same; set both",
    ):
        check('chatml', 'internlm2')
    with pytest.raises(ValueError, match="'chatml': its options differ"):
        check('chatml', dict(type='chatml', default_system='Be brief.'))


def test_missing_files_come_with_the_commands_that_make_them() -> None:
    from internlm_mm.datasets import PretrainDataset
    from internlm_mm.tokenizers import SentencePieceTokenizer

    parts = [
        (DATASETS, dict(type=PretrainDataset, data_root='no/tokens', seq_len=8), 'train.dataset'),
        (TOKENIZERS, dict(type=SentencePieceTokenizer, path='no/tokenizer'), 'tokenizer'),
    ]
    for registry, config, key in parts:
        with pytest.raises(FileNotFoundError) as caught:
            build_data_part(registry, config, key)
        text = str(caught.value)
        assert text.startswith(f'{key}: ') and 'no/token' in text
        assert 'train_tokenizer.py' in text and 'preprocess_data.py' in text


def test_wrong_options_come_with_the_key_of_their_dataset(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    (tmp_path / 'a.jsonl').write_text('{"prompt": "q", "answer": "a"}\n')
    given = dict(
        type='ConversationDataset',
        path=str(tmp_path / 'a.jsonl'),
        seq_len=64,
        chat_template='internlm',
        tokenizer=byte_level(tmp_path),
    )
    for wrong, message in (
        (
            dict(chat_template='chatlm'),
            r"there is no chat template 'chatlm'\. Did you mean 'chatml",
        ),
        (dict(packing='bestfit'), r"packing='bestfit' is none of .* Did you mean 'best_fit'"),
        (dict(cache_dir=str(tmp_path / 'file')), "cache_dir='.*/file' is no folder"),
    ):
        with pytest.raises(ValueError, match=rf'^val_dataloader\.dataset: {message}'):
            build_data_part(DATASETS, given | wrong, 'val_dataloader.dataset')


def config(**changes: Any) -> dict:
    sizes = dict(
        vocab_size=48, hidden_size=24, intermediate_size=36, num_layers=6, num_heads=6,
        max_seq_len=64,
    )  # fmt: skip
    return {
        'model': dict(type='internlm_mm.models.InternLM', **sizes),
        'train_dataloader': dict(dataset=dict(seq_len=64)),
        'train_cfg': dict(global_batch_size=16, micro_batch_size=2),
        'strategy': {},
    } | changes


@pytest.mark.parametrize(
    ('parallel', 'changes', 'nearest'),
    [
        ({'tensor': 5}, {}, 'dict(data_shard=4, tensor=2)'),
        ({'tensor': 5}, {'model': model()}, 'dict(data_shard=4, tensor=2)'),  # built already
        (
            {'tensor': 5},
            {'train_dataloader': dict(dataset=dict(seq_len=61))},
            'dict(data_shard=8)',
        ),
        ({'pipeline': 7}, {}, 'dict(pipeline=4, data_shard=2)'),
        (
            {'pipeline': 7},
            {'strategy': dict(pipeline=dict(schedule='interleaved_1f1b'))},
            'dict(pipeline=2, data_shard=4)',  # two layers a rank, of six
        ),
        ({'data_shard': 3}, {'train_dataloader': None, 'train_cfg': None}, 'data_shard=2'),
    ],
    ids=str,
)
def test_a_wrong_number_of_ranks_gets_a_proposal_that_fits(parallel, changes, nearest) -> None:
    with pytest.raises(ValueError) as caught, propose_fit(config(**changes)):
        resolve_layout(parallel, 8, 8)
    assert not isinstance(caught.value, LayoutError)
    assert 'but there are 8. Nearest: parallel=' in str(caught.value)
    assert nearest in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match='only one axis may be -1'), propose_fit(config()):
        resolve_layout({'data_shard': -1, 'tensor': -1}, 8, 8)


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / 'deep' / 'run')
    assert list((tmp_path / 'deep' / 'run').iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(
        PermissionError, match=r"work_dir='.*/file/run' cannot be written: Not a dir"
    ):
        check_writable(tmp_path / 'file' / 'run')


def test_a_dataset_gets_the_tokenizer_of_the_run_where_it_takes_one() -> None:
    own = dict(type='ConversationDataset', path='x', tokenizer='mine')
    other = dict(type='RandomTokens', vocab_size=5, seq_len=4)
    assert give_tokenizer(own, 'run') == own
    assert give_tokenizer(other, 'run') == other
    given = give_tokenizer(dict(type='ConversationDataset', tokenizer=None), 'run')
    assert given['tokenizer'] == 'run'
    inside = dict(
        type='internlm_mm.verify.UnevenRows', dataset=dict(type='ConversationDataset'), seq_len=4
    )
    assert give_tokenizer(inside, 'run')['dataset']['tokenizer'] == 'run'
    assert 'tokenizer' not in give_tokenizer(inside, None)['dataset']
