"""Pictures of records."""

import json
from pathlib import Path

import pytest

from internlm_mm.engine.benchmark_plots import draw_records, read_record, read_records
from internlm_mm.engine.breakdown import KINDS

RECORDS = Path(__file__).parents[2] / 'docs' / 'en' / 'assets' / 'records'
RECORD = {
    'name': 'internlm_7b_speed',
    'tgs': 1000.0,
    'tokens_per_second': 2000.0,
    'devices': 2,
    'device': 'NVIDIA H200',
    'framework': {'median': 4.0},
    'mfu_full': 0.5,
    'peak_memory_bytes': 3 * 2**30,
    'reserved_memory_bytes': 4 * 2**30,
    'breakdown': {'parts_ms': {'matmul': 3000.0, 'idle': 1000.0, 'data wait': 0.0}},
}


def write(path: Path, record: object) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_a_record_by_hand(tmp_path: Path) -> None:
    found = read_record(write(tmp_path / 'a.json', RECORD))
    assert (found.label, found.device) == ('internlm_7b_speed', '2 x NVIDIA H200')
    assert (found.speed, found.utilisation, found.held, found.taken) == (1000, 0.5, 3, 4)
    # A device has 4,000 tokens of a step of 4 s: a millisecond each.
    assert found.parts == pytest.approx({'matmul': 750, 'idle': 250})


def test_what_a_record_may_lack(tmp_path: Path) -> None:
    optional = ('name', 'mfu_full', 'reserved_memory_bytes', 'breakdown')
    record = {key: value for key, value in RECORD.items() if key not in optional}
    found = read_record(write(tmp_path / 'run.json', record))
    assert (found.label, found.utilisation, found.taken, found.parts) == ('run', None, None, {})


def test_what_is_no_record(tmp_path: Path) -> None:
    path = write(tmp_path / 'a.json', {'tgs': 1.0})
    with pytest.raises(ValueError, match=r"a\.json is no record .*KeyError: 'devices'"):
        read_record(path)
    path.write_text('{"tgs": ')
    with pytest.raises(ValueError, match=r'is no record of tools/benchmark.py: JSONDecodeError'):
        read_record(path)
    path.write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match=r'is no record of tools/benchmark.py: UnicodeDecodeError'):
        read_record(path)
    with pytest.raises(FileNotFoundError, match=r'^there is no record .*/b\.json'):
        read_record(tmp_path / 'b.json')
    with pytest.raises(IsADirectoryError, match=rf'^record {tmp_path} cannot be read: Is a dir'):
        read_record(tmp_path)
    with pytest.raises(ValueError, match='--labels has 1 names for 2 records'):
        read_records([path, path], ['a'])


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    found = [read_record(write(tmp_path / 'a.json', RECORD))]
    with pytest.raises(IsADirectoryError, match=rf'^--out {tmp_path} cannot be written: Is a dir'):
        draw_records(found, tmp_path)
    inside = tmp_path / 'a.json' / 'b' / 'c.png'
    with pytest.raises(NotADirectoryError, match=rf'^--out {inside} cannot be written: Not a dir'):
        draw_records(found, inside)


def test_records_of_the_documentation_are_drawn(tmp_path: Path) -> None:
    paths = sorted(RECORDS.glob('*.json'))
    assert paths
    found = read_records(paths)
    assert {kind for one in found for kind in one.parts} <= set(KINDS)
    for one in found:
        # The profiled step and the timed one agree.
        assert not one.parts or sum(one.parts.values()) == pytest.approx(1e6 / one.speed, rel=0.1)
    out = draw_records(found, tmp_path / 'pictures' / 'all.png')
    assert out.read_bytes().startswith(b'\x89PNG')
    without = [one for one in found if not one.parts]
    assert draw_records(without, tmp_path / 'few.png').stat().st_size > 5_000
