"""The grid as text and JSON."""

import json
from pathlib import Path

from internlm_mm.verify.compare import MISSING, Cell
from internlm_mm.verify.grid import COLUMNS, as_json, render, render_rest, write_json

CELLS = [
    Cell('one process', 'initial', 0.0, True),
    Cell('one process', 'loss', 2e-16, True),
    Cell('tensor=2', 'gradients', 0.5, False, 'norm.weight', 0.25, 'norm.weight in step 0'),
    Cell('tensor=2', 'weights', MISSING, False, 'b', MISSING, 'b in step 1'),
    Cell('tensor=2', 'resume from one process', 1e-15, True),
    Cell('tensor=2', 'resume from context=2', 3e-15, True),
    Cell('context=2', 'loss', MISSING, False, None, MISSING, 'a process failed before it'),
]


def test_cells_stand_where_they_belong() -> None:
    lines = render('title', CELLS, {'context=2': 'rank 1'}).splitlines()
    assert lines[0] == 'title' and lines[1].split('  ')[-1].strip() == 'same resume'
    rows = {line[:11].strip(): line[11:] for line in lines[2:5]}
    cut = {
        name: [row[14 * i : 14 * i + 14].strip() for i in range(7)] for name, row in rows.items()
    }
    assert dict(zip(COLUMNS, cut['one process'], strict=True))['loss'] == '2.0e-16 ok'
    assert cut['one process'][0] == '0 ok'
    tensor = dict(zip(COLUMNS, cut['tensor=2'], strict=True))
    assert tensor['gradients'] == '5.0e-01 XX' and tensor['weights'] == 'missing XX'
    assert tensor['resume'] == '3.0e-15 ok' and tensor['same resume'] == '-'
    assert dict(zip(COLUMNS, cut['context=2'], strict=True))['loss'] == 'error'


def test_failures_are_told_in_words() -> None:
    text = render('title', CELLS, {'context=2': 'rank 1'})
    assert 'tensor=2: gradients: norm.weight in step 0 differs by 2.5e-01' in text
    assert 'tensor=2: weights: b in step 1 is missing, or not a number' in text
    assert 'context=2: ' not in text  # told once, with its log
    assert 'deviates' not in render('title', CELLS[:2], {})
    rest = render_rest({'tensor=3': 'heads'}, {'context=2': 'rank 1 ended'})
    assert 'context=2 did not run: rank 1 ended' in rest and '  tensor=3: heads' in rest
    assert render_rest({}, {}) == ''


def test_json(tmp_path: Path) -> None:
    report = as_json('c.py', 'float64', 'cpu', CELLS, {'tensor=3': 'heads'}, {'context=2': 'died'})
    write_json(tmp_path / 'one.json', [report])
    one = json.loads((tmp_path / 'one.json').read_text())
    assert (one['config'], one['precision'], one['passed']) == ('c.py', 'float64', False)
    assert one['skipped'] == [{'layout': 'tensor=3', 'reason': 'heads'}]
    assert one['errors'] == [{'layout': 'context=2', 'error': 'died'}]
    assert one['cells'][2] == {
        'layout': 'tensor=2', 'check': 'gradients', 'max_relative_difference': 0.5,
        'passed': False, 'parameter': 'norm.weight', 'difference': 0.25,
        'detail': 'norm.weight in step 0',
    }  # fmt: skip
    write_json(tmp_path / 'two.json', [report, report])
    assert len(json.loads((tmp_path / 'two.json').read_text())['reports']) == 2
