"""A tokenizer of each kind, as exported folders have them."""

import inspect
import textwrap
from pathlib import Path

import pytest
import sentencepiece as spm
from transformers import AutoTokenizer

from internlm_mm.checkpoint.huggingface import write_tokenizer
from internlm_mm.tokenizers import load_tokenizer

INTERNLM2_MARKS = [
    '<|plugin|>',
    '<|interpreter|>',
    '<|action_end|>',
    '<|action_start|>',
    '<|im_end|>',
    '<|im_start|>',
]


@pytest.fixture(scope='session')
def sentencepiece_model(tmp_path_factory) -> Path:
    """Trained with the settings of InternLM's, and its format's words as pieces."""
    prefix = tmp_path_factory.mktemp('sentencepiece') / 'sp'
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(textwrap).splitlines()),
        model_prefix=str(prefix),
        vocab_size=500,
        model_type='bpe',
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=['<eoh>', '<eoa>'],
        minloglevel=2,
    )
    return prefix.with_suffix('.model')


@pytest.fixture(scope='session')
def internlm_tokenizer(sentencepiece_model, tmp_path_factory):
    """As our export writes it."""
    folder = tmp_path_factory.mktemp('internlm_tokenizer')
    write_tokenizer(load_tokenizer(sentencepiece_model), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='session')
def internlm2_tokenizer(sentencepiece_model, tmp_path_factory):
    """With the words of InternLM2's format added as special tokens."""
    folder = tmp_path_factory.mktemp('internlm2_tokenizer')
    write_tokenizer(load_tokenizer(sentencepiece_model), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({'additional_special_tokens': INTERNLM2_MARKS})
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
