import json
import multiprocessing
import time
from pathlib import Path

import pytest

from internlm_mm.datasets.token_cache import (
    SOURCE_NAME,
    cached_folder,
    hash_contents,
    hash_in_order,
)


def make_slowly(folder: Path) -> None:
    with open(folder.parent / 'calls', 'a') as file:
        file.write('made\n')
    time.sleep(0.5)
    (folder / 'x').write_text('whole')


def ask(cache: Path) -> None:
    folder = cached_folder(cache, {'a': 1}, make_slowly)
    assert (folder / 'x').read_text() == 'whole'


def test_one_process_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=ask, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / 'calls').read_text() == 'made\n'


def test_another_source_is_another_folder(tmp_path: Path) -> None:
    first = cached_folder(tmp_path, {'a': 1}, lambda folder: None)
    assert cached_folder(tmp_path, {'a': 2}, lambda folder: None) != first
    assert json.loads((first / SOURCE_NAME).read_text()) == {'a': 1}


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / 'half').write_text('')
        raise ValueError('broken')

    with pytest.raises(ValueError, match='broken'):
        cached_folder(tmp_path / 'cache', {}, fail)
    assert [path.suffix for path in (tmp_path / 'cache').iterdir()] == ['.lock']
    assert cached_folder(tmp_path / 'cache', {}, lambda folder: None).is_dir()


def test_a_file_in_the_place_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    for cache in (tmp_path / 'file', tmp_path / 'file' / 'cache'):
        with pytest.raises(NotADirectoryError, match=r"cache_dir='.*file.*' is no folder and"):
            cached_folder(cache, {}, lambda folder: None)


def test_hashes_are_of_contents(tmp_path: Path) -> None:
    (tmp_path / 'a').write_text('x')
    before = hash_contents([tmp_path / 'a'])
    (tmp_path / 'a').write_text('y')
    assert list(before) == [str(tmp_path / 'a')] and hash_contents([tmp_path / 'a']) != before


def test_order_counts_and_not_where_files_are(tmp_path: Path, monkeypatch) -> None:
    for folder in 'here', 'there':
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'a').write_text('1')
        (tmp_path / folder / 'b').write_text('2')
    monkeypatch.chdir(tmp_path)
    names = ('a', 'b')
    wanted = hash_in_order(Path('here', name) for name in names)
    assert wanted == hash_in_order(tmp_path / 'there' / name for name in names)
    assert wanted != hash_in_order(tmp_path / 'here' / name for name in reversed(names))
    (tmp_path / 'here/b').write_text('3')
    assert wanted != hash_in_order(tmp_path / 'here' / name for name in names)
