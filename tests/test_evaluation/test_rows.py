"""Files, splits and rows with their places."""

from pathlib import Path

import pytest

from internlm_mm.datasets import documents
from internlm_mm.evaluation.rows import find_files, read_rows, subject_of


def names(bundle) -> list[str]:
    return [file.relative_to(bundle.root).as_posix() for file in bundle.files]


def test_a_sub_folder_is_a_split(write, tmp_path: Path) -> None:
    for name in ('val/law_val.csv', 'val/deep/7.json', 'val/.hidden.csv', 'val/a.pdf', 'dev/x.csv'):
        write(name, '')
    bundle = find_files(tmp_path, 'val', 'path')
    assert names(bundle) == ['deep/7.json', 'law_val.csv']
    assert [subject_of(file, bundle) for file in bundle.files] == ['deep', 'law']


def test_an_end_of_names_is_a_split(write, tmp_path: Path) -> None:
    for name in ('law_val.csv', 'law_dev.csv', 'val.jsonl', 'interval.csv', 'val-0-of-1.parquet'):
        write(name, '')
    bundle = find_files(tmp_path, 'val', 'path')
    assert names(bundle) == ['law_val.csv', 'val-0-of-1.parquet', 'val.jsonl']
    assert [subject_of(file, bundle) for file in bundle.files] == ['law', '', '']
    assert len(find_files(tmp_path, None, 'path').files) == 5
    assert names(find_files(tmp_path / 'val.jsonl', None, 'path')) == ['val.jsonl']


def test_data_that_is_not_read_is_refused_where_it_is_asked_for(write, tmp_path: Path) -> None:
    for name in ('law_val.csv', 'art_dev.csv.zst', 'dev/7.xlsx', 'notes.md', 'plot.png'):
        write(name, '')
    assert names(find_files(tmp_path, 'val', 'path')) == ['law_val.csv']
    with pytest.raises(ValueError, match=r"art_dev.csv.zst: cannot read '.zst', only .csv, .txt"):
        find_files(tmp_path, None, 'path')
    with pytest.raises(ValueError, match=r"7.xlsx: cannot read '.xlsx'"):
        find_files(tmp_path, 'dev', 'path')


def test_what_is_no_data_is_counted(write, tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(documents, 'print_log', lambda text, **_: said.append(text))
    for name in ('test/1.csv', 'test/2.csv', 'test/README', 'test/a.pdf', 'test/.3.csv'):
        write(name, '')
    assert names(find_files(tmp_path, 'test', 'path')) == ['1.csv', '2.csv']
    assert said == [
        f'{tmp_path / "test"}: 3 files are no data and left out: 1 .pdf, '
        '1 README, LICENSE or .md, 1 hidden'
    ]


def test_what_is_missing_is_named(write, tmp_path: Path) -> None:
    write('valid/a.csv', '')
    write('test/a.csv', '')
    with pytest.raises(FileNotFoundError, match=r"path: no file of the split 'vali'.*'valid'"):
        find_files(tmp_path, 'vali', 'path')
    write('flat/train.jsonl', '')
    with pytest.raises(FileNotFoundError, match=r"the split 'tain'.*Did you mean 'train'"):
        find_files(tmp_path / 'flat', 'tain', 'path')
    with pytest.raises(
        FileNotFoundError, match=r'path: no file to read.*Sub-folders: flat, test, valid'
    ):
        find_files(tmp_path, None, 'path')
    with pytest.raises(FileNotFoundError, match=r'shots_from: no file or folder .*nowhere'):
        find_files(tmp_path / 'nowhere', 'val', 'shots_from')


def rows_of(path: Path, has_header: bool = True) -> list:
    bundle = find_files(path, None, 'path')
    return [
        (row.value, row.place.replace(f'{path}', 'F'), row.subject)
        for row in read_rows(bundle, has_header)
    ]


def test_lines_of_csv(write) -> None:
    path = write('law.csv', 'a,b\n1,"x\ny"\n\n2,"say ""hi"""\n')
    assert rows_of(path) == [
        ({'a': '1', 'b': 'x\ny'}, 'F:2', 'law'),
        ({'a': '2', 'b': 'say "hi"'}, 'F:5', 'law'),
    ]
    assert next(value for value, _, _ in rows_of(path, has_header=False)) == ['a', 'b']


def test_other_files(write) -> None:
    path = write('x.txt', '{"article": "a"}')
    assert rows_of(path) == [({'article': 'a'}, 'F', 'x')]
    path = write('dev.json', '{"label": "1"}\n\n{"label": "0"}\n')  # as CLUE's
    assert [row[:2] for row in rows_of(path)] == [({'label': '1'}, 'F:1'), ({'label': '0'}, 'F:3')]
    for text in ('{"a": 1}\n', '{\n"a": 1\n}', '[{"a": 1}]', '[\n{"a": 1}\n]'):
        assert rows_of(write('one.json', text)) == [({'a': 1}, 'F: record 1', 'one')]
    path = write('y.jsonl', '\n{"a": 1}\n')
    assert rows_of(path) == [({'a': 1}, 'F:2', 'y')]


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('a.csv', 'a,b\n1,2\n1,2,3\n', r'a\.csv:3: 3 fields, the header has 2'),
        ('a.csv', 'a,b\n1,"2\n', r'a\.csv:2: not csv: '),
        ('a.csv', 'a,b\n1,"2"x\n', r'a\.csv:2: not csv: '),
        ('a.txt', '{"a":\n', r'a\.txt:2: not JSON'),
        ('a.json', '{"a": 1}\n{"a" 1}\n', r'a\.json:2: not JSON'),
        ('a.json', '{"a": 1\n"b": 1}', r'a\.json:2: not JSON'),
        ('a.jsonl', '{"a": 1}\n{"a"}\n', r'a\.jsonl:2: not JSON'),
    ],
)
def test_damaged_files(name: str, text: str, message: str, write) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(write(name, text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / 'a.csv').write_bytes(b'a,b\n1,\xff\n')
    with pytest.raises(ValueError, match=r'a\.csv:2: not UTF-8'):
        rows_of(tmp_path / 'a.csv')
