import gzip
import json
from pathlib import Path

import pytest

from internlm_mm.datasets.documents import read_documents
from internlm_mm.datasets.records import decode_text, read_records, suffix_of

VALUES = [{'a': 1, 'b': [{'c': 'é'}]}, {'a': 2, 'b': []}, {'a': 3, 'b': [{'c': ''}]}]


def write(path: Path) -> Path:
    lines = '\n\n'.join(json.dumps(value, ensure_ascii=False) for value in VALUES).encode()
    if path.name.endswith('.gz'):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == '.jsonl':
        path.write_bytes(lines)
    elif path.suffix == '.json':
        path.write_text(json.dumps(VALUES, indent=1))
    else:
        arrow = pytest.importorskip('pyarrow')
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(VALUES), path)
    return path


@pytest.mark.parametrize(
    ('name', 'places'),
    [
        ('r.json', ['r.json: record 1', 'r.json: record 2', 'r.json: record 3']),
        ('r.jsonl', ['r.jsonl:1', 'r.jsonl:3', 'r.jsonl:5']),
        ('r.jsonl.gz', ['r.jsonl.gz:1', 'r.jsonl.gz:3', 'r.jsonl.gz:5']),
        ('r.parquet', ['r.parquet:1', 'r.parquet:2', 'r.parquet:3']),
    ],
)
def test_every_ending_gives_the_same_records(name: str, places: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / name)
    records = list(read_records(path))
    assert [record.value for record in records] == VALUES
    assert [record.place for record in records] == [f'{tmp_path}/{place}' for place in places]
    assert records[-1].bytes_read == path.stat().st_size


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / 'r.parquet')
    assert [record.value for record in read_records(path, ['a', 'z'])] == [
        {'a': value['a']} for value in VALUES
    ]
    assert [record.value for record in read_records(path, ['z'])] == VALUES  # for a message


def test_damage_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / 'r.jsonl'
    path.write_bytes(b'{}\n\n{"a": }\n')
    with pytest.raises(ValueError, match=r'r\.jsonl:3: not JSON: .* \(column 7\)'):
        list(read_records(path))
    path.write_bytes(b'{}\n"\xff"\n')
    with pytest.raises(ValueError, match=r'r\.jsonl:2: not UTF-8'):
        list(read_records(path))
    with pytest.raises(ValueError, match=r'x\.txt:7: not UTF-8'):
        decode_text(b'a\nb\n\xe4', Path('x.txt'), 5)
    with pytest.raises(FileNotFoundError, match='no file'):
        read_records(tmp_path / 'none.json')


def test_a_file_that_is_not_there_has_no_wrong_ending(tmp_path: Path) -> None:
    for read in (read_records, read_documents):
        for name in ('none', 'none.xyz', 'none.jsonl'):
            with pytest.raises(FileNotFoundError, match=f'no file {tmp_path}/{name}$'):
                next(iter(read(tmp_path / name)))
        (tmp_path / 'there').touch()
        with pytest.raises(ValueError, match='cannot read files without an ending, only'):
            next(iter(read(tmp_path / 'there')))
        (tmp_path / 'there').unlink()
    (tmp_path / 'folder.jsonl').mkdir()
    with pytest.raises(FileNotFoundError, match='no file'):
        next(iter(read_documents(tmp_path / 'folder.jsonl')))


def test_unknown_endings() -> None:
    assert suffix_of(Path('A.JSONL.GZ'), ['.json', '.jsonl.gz']) == '.jsonl.gz'
    with pytest.raises(ValueError, match=r"'\.txt', only \.json, \.jsonl"):
        suffix_of(Path('a.txt'), ['.json', '.jsonl'])


FLAWS = [
    (b'{"a": NaN}', 'not JSON: NaN is no JSON; null is'),
    (b'{"a": [-Infinity]}', 'not JSON: -Infinity is no JSON'),
    (b'{"a": {"b": 1, "c": 2, "b": 1}}', "not JSON: key 'b' comes twice in one object"),
    (b'{"a": ' + b'9' * 5000 + b'}', 'not JSON: a number of 5,000 digits'),
    (b'[' * 100_000, 'not JSON: lists or objects are nested too deep'),
    (b'{"a": "x\0y"}', 'Invalid control character at (column 9); it has NUL bytes'),
    (b'\0' * 4096, 'it has NUL bytes, as files have whose writing was cut off'),
    (b'{"a": "cut of', 'not JSON: Unterminated string'),
    (b'{"a": 1} {"a": 2}', 'not JSON: Extra data (column 10)'),
    ('{"a": "é"}'.encode('latin-1'), 'not UTF-8'),
]


@pytest.mark.parametrize(('line', 'message'), FLAWS)
def test_flaws_that_python_would_take_or_trip_over(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / 'r.jsonl'
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError) as raised:
        list(read_records(path))
    assert str(raised.value).startswith(f'{path}:3: ') and message in str(raised.value)
    # One who wants all flaws gets each, and what stands around them.
    errors: list[ValueError] = []
    records = list(read_records(path, on_damage=errors.append))
    assert [(record.value, record.number) for record in records] == [({'a': 1}, 1), ({'a': 2}, 4)]
    assert [str(error) for error in errors] == [str(raised.value)]


@pytest.mark.parametrize(('line', 'message'), FLAWS[:5])
def test_a_flaw_in_a_list_names_the_line_where_its_record_begins(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / 'r.json'
    path.write_bytes(b'\n[{"a": 1},\n {"a":\n 1},\n' + line + b'\n]')
    with pytest.raises(ValueError, match=r'r\.json:5: ') as raised:
        list(read_records(path))
    assert message in str(raised.value)
    path.write_bytes(b'\n' + line)
    with pytest.raises(ValueError, match=r'r\.json:2: '):
        list(read_records(path))


def test_byte_order_marks_and_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / 'r.jsonl'
    line = '\ufeff{"a": "é\\r\\n"}\r\n'.encode()
    path.write_bytes(line + b'\r\n' + line)  # two files that were joined
    assert [(r.value, r.number) for r in read_records(path)] == [
        ({'a': 'é\r\n'}, 1),
        ({'a': 'é\r\n'}, 3),
    ]
    (tmp_path / 'r.json').write_bytes('\ufeff[{"a":\r\n 1}]'.encode())
    assert [record.value for record in read_records(tmp_path / 'r.json')] == [{'a': 1}]
    path.write_bytes('{"a": 1}'.encode('utf-16'))
    with pytest.raises(ValueError, match=r'r\.jsonl:1: not UTF-8: .*; it begins as UTF-16 does'):
        list(read_records(path))


def test_a_huge_line(tmp_path: Path) -> None:
    path = tmp_path / 'r.jsonl'
    text = 'x' * 20_000_000
    path.write_text(json.dumps({'a': text}) + '\n{"a": ')
    errors: list[ValueError] = []
    [record] = read_records(path, on_damage=errors.append)
    assert record.value == {'a': text}
    assert len(errors) == 1 and len(str(errors[0])) < 300
