from pathlib import Path
from types import SimpleNamespace

import pytest

from internlm_mm.checkpoint.step_folders import verify
from internlm_mm.engine import benchmark_data
from internlm_mm.engine.benchmark_data import (
    TARGETS,
    check_room,
    judge,
    measure_data,
    measure_saving,
    render_data,
)


def report_of(**changes: float) -> dict:
    report = {
        'tokenisation': {'speed': 0.95},
        'opening': {
            'open_seconds': 1.5,
            'open_cpu_seconds': 0.7,
            'opened_bytes': 250_000_000,
            'read_bytes': 280_000_000,
            'imported_bytes': 230_000_000,
            'row_milliseconds': 0.5,
            'tokens': 10**12,
        },
        'loading': {'tokens_per_second': 3e7},
        'loading_sparse': {'tokens_per_second': 1e7},
        'saving': {'speed': 0.85, 'best_speed': 0.9, 'megabytes': 1000, 'other_seconds': 0.5},
    }
    for key, value in changes.items():
        part, _, name = key.partition('__')
        report[part][name] = value
    return report


def test_all_targets_met() -> None:
    assert [met for _, _, met in judge(report_of())] == [True] * len(TARGETS)
    lines = render_data(report_of()).splitlines()
    assert lines[0] == (
        'met     tokenisation, 95.0% of raw SentencePiece a core '
        '(target: at least 90.0% of raw SentencePiece a core)'
    )
    assert 'met     resident when open, 250 MB (target: at most 300 MB)' in lines
    assert 'met     first row of step 1,000,000, 0.50 ms (target: at most 10.00 ms)' in lines
    assert '        checkpoint save, the best of each: 90.0%; 2,000 MB/s raw' in lines


def test_a_part_alone() -> None:
    report = {'saving': report_of()['saving']}
    assert [target.part for target, _, _ in judge(report)] == ['saving']
    first, second = render_data(report).splitlines()
    assert first.startswith('met     checkpoint save, 85.0%') and '2,000 MB/s raw' in second
    assert 'tokens/s a core from rows' in render_data(
        {key: value for key, value in report_of().items() if key != 'saving'}
    )


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('tokenisation__speed', 0.89),
        ('opening__open_seconds', 2.1),
        ('opening__opened_bytes', 301e6),
        ('opening__row_milliseconds', 11),
        ('loading__tokens_per_second', 9e4),
        ('saving__speed', 0.79),
    ],
)
def test_a_target_missed(key: str, value: float) -> None:
    missed = [f'{t.part}__{t.key}' for t, _, met in judge(report_of(**{key: value})) if not met]
    assert missed == [key]
    assert render_data(report_of(**{key: value})).count('MISSED') == 1


def test_a_whole_checkpoint_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen, sizes = tmp_path / 'a', [], []

    def look(ours, other, turns, clock):
        for function in (other, ours, other):
            before = clock()
            function()
            seen.append(clock() - before)
            sizes.append({p.name: p.stat().st_size for p in folder.rglob('*') if p.is_file()})
            if function is ours:
                assert verify(folder / 'iter_1') == []
        return {'speed': 1.0}

    monkeypatch.setattr(benchmark_data, 'in_turns', look)
    assert measure_saving(folder, 2, 3) == {'speed': 1.0, 'megabytes': 2}
    assert all(0 < seconds < 60 for seconds in seen)
    raw, whole, again = sizes
    assert raw == again == {'raw': 2_000_000}
    assert 2_000_000 < whole['shard_0.safetensors'] < 2_010_000 and 'raw' not in whole
    assert not folder.exists()


def test_what_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data, 'available_memory', lambda: 5_500_000)
    check_room(tmp_path, 5)
    with pytest.raises(ValueError, match=r'^--megabytes 6: more than memory has left, 5$'):
        check_room(tmp_path, 6)
    monkeypatch.setattr(benchmark_data, 'available_memory', lambda: None)  # nobody says
    check_room(tmp_path, 6)
    usage = SimpleNamespace(free=4_000_000)
    monkeypatch.setattr(benchmark_data.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(ValueError, match=f'5: more than the disk of {tmp_path} has left, 4$'):
        check_room(tmp_path, 5)


def test_the_first_save_of_each_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(
        benchmark_data,
        'in_turns',
        lambda *_: found.extend(path.name for path in (tmp_path / 'a').iterdir()) or {},
    )
    measure_saving(tmp_path / 'a', 1, 1)
    assert found == ['iter_1']  # of the turn before the first; raw bytes were written before it


def test_the_whole_of_it_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    for name in ('tokenisation', 'loading'):
        monkeypatch.setattr(
            benchmark_data,
            f'measure_{name}',
            lambda *args, name=name: asked.setdefault(name, []).append(args) or {'name': name},
        )
    report = measure_data(
        ['texts'], Path('t'), tmp_path, turns=2, files=5, tokens_per_file=5000, megabytes=1,
        seconds=0.1,
    )  # fmt: skip
    assert report['opening']['tokens'] == 25_000
    assert len(report['saving']['speeds']) == 2
    assert asked['tokenisation'] == [(['texts'], Path('t'), tmp_path, 2)]
    assert [root.name for root, _, _ in asked['loading']] == ['train', 'sparse']
    assert not (tmp_path / 'sparse' / 'all').exists()
