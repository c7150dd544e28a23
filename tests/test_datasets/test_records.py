import gzip
import json
from pathlib import Path

import pytest

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


def test_unknown_endings() -> None:
    assert suffix_of(Path('A.JSONL.GZ'), ['.json', '.jsonl.gz']) == '.jsonl.gz'
    with pytest.raises(ValueError, match=r"'\.txt', only \.json, \.jsonl"):
        suffix_of(Path('a.txt'), ['.json', '.jsonl'])
