"""Ids of the data are compared with what they meant when the weights were trained."""

from types import SimpleNamespace

import pytest

from internlm_mm.checkpoint.vocabulary import compare_vocabularies, find_tokenizer
from internlm_mm.tokenizers.convert import write_hf_tokenizer
from tests.trained import train_tokenizer


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """A tokenizer."""
    return train_tokenizer(tmp_path_factory.mktemp('words'))


def data(tokenizer, size=400):
    return {'train_dataloader': SimpleNamespace(tokenizer=tokenizer, vocab_size=size)}


def test_what_a_folder_holds(tmp_path, words):
    assert find_tokenizer(tmp_path) is None
    words.save(tmp_path)
    assert find_tokenizer(tmp_path).hash == words.hash
    (tmp_path / 'tokenizer.model').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='tokenizer'):
        find_tokenizer(tmp_path)


def test_the_same_one_is_silent(tmp_path, words):
    assert compare_vocabularies(words, data(None), words, tmp_path) == []
    mark = {'type': 'SentencePieceTokenizer', 'hash': words.hash}
    assert compare_vocabularies(None, data(mark), words, tmp_path) == []
    assert compare_vocabularies(None, data(None), words, tmp_path) == []  # random tokens


def test_a_copy_in_another_form_is_silent(tmp_path, words):
    """Written for transformers by another program: other files, the same ids."""
    words.save(tmp_path)
    write_hf_tokenizer(tmp_path / 'tokenizer.model', tmp_path)
    (tmp_path / 'tokenizer.model').unlink()
    other = find_tokenizer(tmp_path)
    assert other.hash != words.hash
    assert compare_vocabularies(words, data(None), other, tmp_path) == []


def test_tokens_that_were_added_are_told(tmp_path, words):
    more = train_tokenizer(tmp_path, vocab_size=402, user_defined_symbols=['[call]', '[end]'])
    size = more.vocab_size
    more.encode = words.encode  # the same ids, and a few more
    (told,) = compare_vocabularies(more, data(None), words, 'x')
    assert told == (
        f"the config's tokenizer and the one in x have {size} and {words.vocab_size} tokens"
    )


def test_a_few_other_ids_are_told(tmp_path, words):
    other = train_tokenizer(tmp_path, add_dummy_prefix=True)
    other.hash, other.encode = 'other', lambda text: [259, *words.encode(text)]
    (told,) = compare_vocabularies(other, data(None), words, 'x')
    assert "'The quick brown fox' begins with ids [259, " in told and 'and the one in x' in told


def test_another_language_is_refused(tmp_path, words):
    other = train_tokenizer(tmp_path, byte_fallback=False, vocab_size=40, character_coverage=1.0)
    with pytest.raises(ValueError, match=r'are different .*--tokenizer x, and name that in the'):
        compare_vocabularies(other, data(None), words, 'x')


def test_data_of_an_unnamed_tokenizer(words):
    mark = {'type': 'SentencePieceTokenizer', 'hash': 'other'}
    (told,) = compare_vocabularies(None, data(mark, 77), words, 'x')
    assert told.startswith('train_dataloader.dataset was tokenised by another tokenizer (77 tokens')
    assert f'x ({words.vocab_size} tokens); name it in the config' in told
