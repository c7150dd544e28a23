import gzip
import json
import sys
from pathlib import Path

import pytest

from internlm_mm.datasets import documents
from internlm_mm.datasets.documents import (
    find_domains,
    find_files,
    fraction_of,
    read_documents,
    sample_texts,
)

TEXTS = ['one\n\ttwo  ', 'Fluß 日本\U0001f600', '{"not": "parsed"}']
RECORDS = [{'text': text, 'id': index} for index, text in enumerate(TEXTS)]
LINES = ''.join(json.dumps(record) + '\n' for record in RECORDS)


def texts_of(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / 'a.jsonl'
    path.write_text('\ufeff' + LINES.replace('\n', '\r\n\n') + '"bare text"', encoding='utf-8')
    documents = list(read_documents(path))
    assert [document.text for document in documents] == [*TEXTS, 'bare text']
    assert [document.line for document in documents] == [1, 3, 5, 7]
    assert documents[1].place == f'{path}:3'
    sizes = [document.bytes_read for document in documents]
    assert sizes == sorted(sizes)
    assert sizes[-1] == path.stat().st_size


def test_jsonl_gz(tmp_path: Path) -> None:
    path = tmp_path / 'a.jsonl.gz'
    path.write_bytes(gzip.compress(LINES.encode()))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize('content', [RECORDS, TEXTS])
def test_json_list(tmp_path: Path, content: list) -> None:
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(content, indent=1))
    assert texts_of(path) == TEXTS


def test_json_gz(tmp_path: Path) -> None:
    path = tmp_path / 'a.json.gz'
    path.write_bytes(gzip.compress(json.dumps([{'text': 'one'}, 'two']).encode()))
    assert texts_of(path) == ['one', 'two']
    assert list(find_domains(tmp_path)) == ['a']
    assert list(read_documents(path))[-1].bytes_read == path.stat().st_size
    path.write_bytes(b'[]')
    with pytest.raises(ValueError, match=r'a\.json\.gz: damaged gzip file'):
        texts_of(path)


def test_json_record(tmp_path: Path) -> None:
    path = tmp_path / 'a.json'
    path.write_text(json.dumps({'content': 'x'}))
    assert texts_of(path, text_key='content') == ['x']


def test_txt_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / 'a.txt'
    path.write_bytes(b'  a\r\n\n b ')
    assert texts_of(path) == ['  a\r\n\n b ']


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    path = tmp_path / 'a.parquet'
    parquet.write_table(arrow.table({'text': TEXTS, 'id': [1, 2, 3]}), path)
    assert texts_of(path) == TEXTS
    with pytest.raises(ValueError, match=r"has no text_key='txt'\. Did you mean 'text'\?"):
        texts_of(path, text_key='txt')
    parquet.write_table(arrow.table({'text': ['a', None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet:2: 'text' is no text but null or missing"):
        texts_of(path)
    path.write_bytes(b'PAR1 broken')
    with pytest.raises(ValueError, match='damaged parquet'):
        texts_of(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'a.parquet').touch()
    with pytest.raises(ModuleNotFoundError, match='pip install pyarrow'):
        texts_of(tmp_path / 'a.parquet')


def test_empty_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / 'a.jsonl'
    path.write_text('{"text": ""}\n"x"\n')
    assert texts_of(path) == ['x']
    (tmp_path / 'a.txt').touch()
    assert texts_of(tmp_path / 'a.txt') == []


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.jsonl', b'{"text": "x"}\n{"text": \n', r'a\.jsonl:2: not JSON'),
        ('a.jsonl', b'"x"\n{"txt": "x"}\n', r"a\.jsonl:2: .* Did you mean 'txt'"),
        ('a.jsonl', b'"x"\n{"text": 3}\n', r"a\.jsonl:2: 'text' is no text but int"),
        ('a.jsonl', b'"x"\n[1]\n', r'a\.jsonl:2: expected an object .* found list'),
        ('a.jsonl', b'"x"\n"\xff"\n', r'a\.jsonl:2: not UTF-8'),
        ('a.jsonl', b'"\\ud800"\n', r'a\.jsonl:1: .* lone surrogate'),
        ('a.json', b'[\n"x",\n}', r'a\.json:3: not JSON'),
        ('a.json', b'["x", 3]', r'a\.json: record 2: expected an object'),
        ('a.txt', b'fine\nline\n\xe4\n', r'a\.txt:3: not UTF-8'),
        ('a.jsonl.gz', b'not gzip', r'a\.jsonl\.gz: damaged gzip'),
        ('a.jsonl.gz', gzip.compress(LINES.encode())[:-9], r'a\.jsonl\.gz: damaged gzip'),
    ],
)
def test_damage_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / name)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no file'):
        texts_of(tmp_path / 'a.txt')
    (tmp_path / 'a.pdf').touch()
    with pytest.raises(ValueError, match=r"'\.pdf', only \.txt, \.json"):
        texts_of(tmp_path / 'a.pdf')
    with pytest.raises(FileNotFoundError, match='no file or folder'):
        find_files(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='has no file that ends in'):
        find_files(tmp_path)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_what_is_no_data_is_left_out_and_counted(tmp_path: Path, monkeypatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(documents, 'print_log', lambda message, **_: logged.append(message))
    names = ('a.jsonl', 'README', 'LICENSE.txt', 'x/notes.md', '.git/a.json', 'make.py', 'b.R')
    fill(tmp_path, *names)
    assert find_files(tmp_path, texts=False) == [tmp_path / 'a.jsonl']
    assert logged == [
        f'{tmp_path}: 6 files are no data and left out: 1 .R, 1 .py, 3 README, LICENSE or .md, '
        '1 hidden'
    ]
    assert [file.name for file in find_files(tmp_path)] == ['LICENSE.txt', 'a.jsonl']
    assert len(logged) == 2  # the text is a document
    find_files(tmp_path / 'x/..' / 'a.jsonl')
    assert len(logged) == 2


def test_linked_folders_are_read(tmp_path: Path) -> None:
    fill(tmp_path / 'elsewhere', 'b.jsonl', 'deep/c.jsonl')
    fill(tmp_path / 'data', 'a.jsonl')
    (tmp_path / 'data' / 'linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'data' / 'd.jsonl').symlink_to(tmp_path / 'elsewhere' / 'b.jsonl')
    (tmp_path / 'data' / '.hidden').symlink_to(tmp_path)
    found = find_domains(tmp_path / 'data')
    assert {name: [file.name for file in files] for name, files in found.items()} == {
        'a': ['a.jsonl'],
        'd': ['d.jsonl'],
        'linked': ['b.jsonl', 'c.jsonl'],
    }


@pytest.mark.parametrize('target', ['.', '..', '../..', '../other'])
def test_links_back_are_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path / 'data', 'x/a.jsonl')
    (tmp_path / 'data' / 'other').mkdir()
    (tmp_path / 'data' / 'other' / 'back').symlink_to('../x')
    (tmp_path / 'data' / 'x' / 'link').symlink_to(target)
    with pytest.raises(ValueError, match=r'(link|back) is a link back to .*, which it is in'):
        find_files(tmp_path / 'data')


def test_what_cannot_be_reached_is_not_passed_over(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path, 'a.jsonl', '.git/x')
    (tmp_path / '.git' / 'gone.jsonl').symlink_to('nowhere')
    (tmp_path / 'README').symlink_to('nowhere')
    assert find_files(tmp_path) == [tmp_path / 'a.jsonl']
    (tmp_path / 'b.jsonl').symlink_to('nowhere')
    with pytest.raises(ValueError, match=r'b\.jsonl is a link to nowhere, which is not there'):
        find_files(tmp_path)

    def refuse(folder):
        raise PermissionError(13, 'Permission denied', str(folder))

    monkeypatch.setattr(documents.os, 'scandir', refuse)  # whoever runs the tests may read all
    with pytest.raises(PermissionError):
        find_files(tmp_path)


@pytest.mark.parametrize('name', ['b.jsonl.zst', 'x/b.jsonl.bz2', 'b.CSV', 'b.csv.gz', 'b.arrow'])
def test_data_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path, 'a.jsonl', name)
    with pytest.raises(
        ValueError, match=rf'{name}: cannot read .*, only \.txt, \.json, \.json\.gz'
    ):
        find_files(tmp_path)
    with pytest.raises(ValueError, match=rf'{name}: cannot read .*, only \.json, \.json\.gz'):
        find_domains(tmp_path, texts=False)


def test_texts_are_no_records(tmp_path: Path) -> None:
    fill(tmp_path, 'a.jsonl', 'b.txt')
    assert len(find_files(tmp_path)) == 2
    for path in (tmp_path, tmp_path / 'b.txt'):
        with pytest.raises(ValueError, match=r"b\.txt: cannot read '\.txt', only \.json, "):
            find_files(path, texts=False)


def test_domains_are_sub_folders_and_files(tmp_path: Path) -> None:
    names = ['web/b.jsonl', 'web/deep/a.txt', 'code.jsonl.gz', 'notes.txt', '.hidden/a.txt', 'x.md']
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_domains(tmp_path)
    names_by_domain = {
        domain: [file.relative_to(tmp_path).as_posix() for file in files]
        for domain, files in found.items()
    }
    assert names_by_domain == {
        'code': ['code.jsonl.gz'],
        'notes': ['notes.txt'],
        'web': ['web/b.jsonl', 'web/deep/a.txt'],
    }
    assert list(find_domains(tmp_path / 'notes.txt')) == ['notes']


def test_sample_is_even_and_repeatable(tmp_path: Path) -> None:
    for name in 'ab':
        lines = [json.dumps(f'{name} document {index}') for index in range(2000)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    texts = list(sample_texts([tmp_path], max_bytes=size // 4))
    for name in 'ab':
        share = sum(text.startswith(name) for text in texts)
        assert 400 < share < 600  # 500 with a deviation of 19
    assert texts == list(sample_texts([tmp_path], max_bytes=size // 4))
    assert len(list(sample_texts([tmp_path]))) == 4000


def test_fractions_are_uniform() -> None:
    values = [fraction_of(str(index), 'test') for index in range(2000)]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(sum(values) / 2000 - 0.5) < 0.03
    assert fraction_of('x', 'a') != fraction_of('x', 'b')
