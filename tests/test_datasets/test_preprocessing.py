import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.datasets import PretrainDataset, TokenFile
from internlm_mm.datasets import preprocessing as module
from internlm_mm.datasets.preprocessing import preprocess
from internlm_mm.tokenizers import SentencePieceTokenizer
from internlm_mm.tokenizers.training import train_tokenizer

TEXTS = [f'document {index}: ' + 'words ' * (index % 7) for index in range(120)]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp('tokenizer'), vocab_size=300)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two domains: `code`, a folder of two files, and `web`, a file."""
    folder = tmp_path / 'texts'
    (folder / 'code').mkdir(parents=True)
    for name, part in (
        ('code/a.jsonl', TEXTS[:30]),
        ('code/b.jsonl', TEXTS[30:60]),
        ('web.jsonl', TEXTS[60:]),
    ):
        (folder / name).write_text(''.join(json.dumps({'text': t}) + '\n' for t in part))
    return folder


def documents_of(path: Path, tokenizer: SentencePieceTokenizer) -> list[str]:
    """The texts of a token file, each of which must end with the end token."""
    file = TokenFile(path)
    file.verify()
    found = []
    for index in range(len(file)):
        ids = file.document(index).tolist()
        assert ids[-1] == tokenizer.eos_id
        found.append(tokenizer.decode(ids[:-1]))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*.*')}


def test_texts_come_back_by_domain(texts: Path, tmp_path: Path, tokenizer) -> None:
    out = tmp_path / 'out'
    counts = preprocess([texts], out, tokenizer=tokenizer.path, num_workers=0, show_progress=False)
    assert documents_of(out / 'train' / 'code', tokenizer) == TEXTS[:60]
    assert documents_of(out / 'train' / 'web', tokenizer) == TEXTS[60:]
    file = TokenFile(out / 'train' / 'web')
    assert file.tokenizer == dict(type='SentencePieceTokenizer', hash=tokenizer.hash)
    assert file.vocab_size == 300
    assert counts['train']['web'].documents == 60
    assert counts['train']['web'].tokens == file.num_tokens
    assert not (out / 'validation').exists()
    assert PretrainDataset(out / 'train', seq_len=16).domains == ['code', 'web']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'texts']


@pytest.mark.parametrize('num_workers', [1, 3])
def test_number_of_processes_changes_no_byte(
    texts: Path, tmp_path: Path, tokenizer, monkeypatch, num_workers: int
) -> None:
    monkeypatch.setattr(module, '_BATCH_CHARACTERS', 100)
    options = dict(tokenizer=tokenizer.path, validation_fraction=0.2, show_progress=False)
    preprocess([texts], tmp_path / 'one', num_workers=0, **options)
    preprocess([texts], tmp_path / 'many', num_workers=num_workers, **options)
    assert files_of(tmp_path / 'one') == files_of(tmp_path / 'many')
    monkeypatch.setattr(module, '_BATCH_CHARACTERS', 10**6)
    preprocess([texts], tmp_path / 'large', num_workers=0, **options)
    assert files_of(tmp_path / 'one') == files_of(tmp_path / 'large')


def test_documents_held_out_by_hash(texts: Path, tmp_path: Path, tokenizer) -> None:
    (texts / 'web.jsonl').write_text((texts / 'web.jsonl').read_text() * 2)  # every text twice
    out = tmp_path / 'out'
    preprocess(
        [texts], out, tokenizer=tokenizer.path, validation_fraction=0.3, num_workers=0,
        show_progress=False,
    )  # fmt: skip
    train, held_out = (
        [t for domain in ('code', 'web') for t in documents_of(out / split / domain, tokenizer)]
        for split in ('train', 'validation')
    )
    assert sorted(train + held_out) == sorted(TEXTS + TEXTS[60:])
    assert not set(train) & set(held_out)
    assert 0.15 < len(held_out) / 180 < 0.45


def test_validation_inputs(texts: Path, tmp_path: Path, tokenizer) -> None:
    out = tmp_path / 'out'
    preprocess(
        [texts / 'code'], out, tokenizer=tokenizer.path, validation_inputs=[texts / 'web.jsonl'],
        num_workers=0, show_progress=False,
    )  # fmt: skip
    assert documents_of(out / 'train' / 'a', tokenizer) == TEXTS[:30]
    assert documents_of(out / 'validation' / 'web', tokenizer) == TEXTS[60:]


def test_domains_by_name(texts: Path, tmp_path: Path, tokenizer) -> None:
    out = tmp_path / 'out'
    inputs = [f'all={texts / "web.jsonl"}', f'all={texts / "code"}']
    preprocess(inputs, out, tokenizer=tokenizer.path, num_workers=0, show_progress=False)
    assert documents_of(out / 'train' / 'all', tokenizer) == TEXTS[60:] + TEXTS[:60]


def test_begin_token_and_short_documents(texts: Path, tmp_path: Path, tokenizer) -> None:
    lengths = [len(tokenizer.encode(text)) + 2 for text in TEXTS[60:]]
    limit = sorted(lengths)[30]
    counts = preprocess(
        [texts / 'web.jsonl'], tmp_path / 'out', tokenizer=tokenizer.path, add_bos=True,
        min_document_length=limit, num_workers=0, show_progress=False,
    )['train']['web']  # fmt: skip
    file = TokenFile(tmp_path / 'out' / 'train' / 'web')
    assert np.diff(file.offsets).tolist() == [length for length in lengths if length >= limit]
    assert all(file.document(index)[0] == tokenizer.bos_id for index in range(len(file)))
    assert counts.dropped == sum(length < limit for length in lengths)


def test_failure_keeps_the_older_output(texts: Path, tmp_path: Path, tokenizer) -> None:
    out = tmp_path / 'out'
    options = dict(tokenizer=tokenizer.path, show_progress=False)
    preprocess([texts], out, num_workers=0, **options)
    before = files_of(out)
    with pytest.raises(FileExistsError, match='overwrite'):
        preprocess([texts], out, **options)
    with open(texts / 'web.jsonl', 'a') as file:
        file.write('{"text": 1}\n')
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=r"web\.jsonl:61: 'text' is no text"):
            preprocess([texts], out, overwrite=True, num_workers=num_workers, **options)
    assert files_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'texts']
    (texts / 'web.jsonl').unlink()
    preprocess([texts], out, overwrite=True, num_workers=0, **options)
    assert not (out / 'train' / 'web').exists()


def test_only_own_outputs_are_overwritten(texts: Path, tmp_path: Path, tokenizer) -> None:
    with pytest.raises(FileExistsError, match='was not made by preprocessing'):
        preprocess([texts], texts, tokenizer=tokenizer.path, overwrite=True)
    (tmp_path / 'empty').mkdir()
    preprocess(
        [texts], tmp_path / 'empty', tokenizer=tokenizer.path, num_workers=0, show_progress=False
    )


def test_killed_process(texts: Path, tmp_path: Path, tokenizer, monkeypatch) -> None:
    def die(self, tokenizer, text):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module._Encoder, '_encode', die)
    with pytest.raises(RuntimeError, match='fewer num_workers'):
        preprocess(
            [texts], tmp_path / 'out', tokenizer=tokenizer.path, num_workers=2, show_progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ['texts']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(validation_fraction=1), r'in \[0, 1\), got 1'),
        (dict(validation_fraction=0.1, validation_inputs=['texts']), 'not both'),
        (dict(min_document_length=1000), 'none is long enough'),
        (dict(inputs=['../x=texts']), 'cannot be the name of a folder'),
        (dict(inputs=['texts', 'texts']), 'given twice'),
    ],
)
def test_options_that_are_wrong(
    texts: Path, tmp_path: Path, tokenizer, monkeypatch, options: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = dict(inputs=['texts'], tokenizer=tokenizer.path, num_workers=0) | options
    with pytest.raises(ValueError, match=message):
        preprocess(output='out', show_progress=False, **options)
    assert not (tmp_path / 'out').exists()


def test_missing_inputs(texts: Path, tmp_path: Path, tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match='no file or folder'):
        preprocess([tmp_path / 'none'], tmp_path / 'out', tokenizer=tokenizer.path)
    with pytest.raises(FileNotFoundError, match='no tokenizer at'):
        preprocess([texts], tmp_path / 'out', tokenizer=tmp_path / 'none')


def test_progress_is_shown(texts: Path, tmp_path: Path, tokenizer, capsys) -> None:
    preprocess([texts], tmp_path / 'out', tokenizer=tokenizer.path, num_workers=0)
    assert '100%' in capsys.readouterr().err
