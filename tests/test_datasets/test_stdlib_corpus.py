import json
from pathlib import Path

import pytest

from internlm_mm.datasets.stdlib_corpus import write_stdlib_corpus

SPLITS = ('train', 'validation')


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library."""
    root = tmp_path / 'python3'
    names = [f'module_{index}.py' for index in range(40)]
    names += ['asyncio/tasks.py', 'queue.py', 'http/client.py', 'json/tests/test_x.py']
    names += ['test/test_queue.py', 'site-packages/mine.py', '__pycache__/x.py', 'notes.txt']
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'# {name}\r\n' + 'x = 1\n' * 100)
    (root / 'latin.py').write_bytes(b'# -*- coding: latin-1 -*-\n# \xe4\n')
    (root / 'bad.py').write_bytes(b'\xff\xfe broken')
    (root / 'empty.py').touch()
    return root


def names_in(folder: Path) -> dict[str, dict[str, str]]:
    """Text by file name, by split and domain."""
    found = {}
    for path in sorted(folder.rglob('*.jsonl')):
        records = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        key = f'{path.parent.name}/{path.stem}'
        found[key] = {record['file']: record['text'] for record in records}
    return found


def test_files_by_domain(library: Path, tmp_path: Path) -> None:
    counts = write_stdlib_corpus(tmp_path / 'out', source=library)
    found = names_in(tmp_path / 'out')
    by_domain: dict[str, set[str]] = {}
    for key, texts in found.items():
        split, domain = key.split('/')
        assert counts[split][domain] == len(texts)
        assert not by_domain.get(domain, set()) & texts.keys()
        by_domain.setdefault(domain, set()).update(texts)
    assert by_domain['concurrency'] == {'asyncio/tasks.py', 'queue.py'}
    assert by_domain['network'] == {'http/client.py'}
    assert by_domain['tests'] == {'json/tests/test_x.py', 'test/test_queue.py'}
    assert by_domain['library'] == {*(f'module_{i}.py' for i in range(40)), 'latin.py'}
    assert counts['validation']['library'] >= 1
    texts = found['train/library'] | found['validation/library']
    assert texts['latin.py'].endswith('# ä\n')
    assert '\r' not in texts['module_0.py']


def test_is_the_same_every_time_and_replaces_itself(library: Path, tmp_path: Path) -> None:
    for _ in range(2):
        write_stdlib_corpus(tmp_path / 'a', source=library)
    write_stdlib_corpus(tmp_path / 'b', source=library)
    assert names_in(tmp_path / 'a') == names_in(tmp_path / 'b')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b', 'python3']


def test_size_is_kept_and_shared(library: Path, tmp_path: Path) -> None:
    write_stdlib_corpus(tmp_path / 'out', source=library, max_megabytes=0.01)
    sizes: dict[str, int] = {}
    for key, texts in names_in(tmp_path / 'out').items():
        domain = key.split('/')[1]
        sizes[domain] = sizes.get(domain, 0) + sum(map(len, texts.values()))
    assert sizes.keys() == {'concurrency', 'library', 'network', 'tests'}
    assert 8000 < sum(sizes.values()) <= 10_000
    assert sizes['library'] > sizes['network']


def test_other_folders_are_not_replaced(library: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match='holds other files'):
        write_stdlib_corpus(tmp_path, source=library)


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no source files'):
        write_stdlib_corpus(tmp_path / 'out', source=tmp_path)


def test_this_pythons_own(tmp_path: Path) -> None:
    counts = write_stdlib_corpus(tmp_path / 'out', max_megabytes=1)
    assert counts['train']['library'] > 5
    assert all(sum(counts[split].values()) for split in SPLITS)
