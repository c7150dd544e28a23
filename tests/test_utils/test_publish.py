"""A folder of a name is the old one or the new one, whole, whenever somebody looks."""

import os
import shutil

import pytest

from internlm_mm.utils.publish import publish, set_aside


@pytest.fixture
def folders(tmp_path):
    for name in ('old', 'new'):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    return tmp_path / 'new', tmp_path / 'old'


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*'))


def test_a_new_name(tmp_path, folders):
    publish(folders[0], tmp_path / 'other')
    assert everything(tmp_path) == ['old', 'old/old', 'other', 'other/new']


def test_another_folder_is_replaced(tmp_path, folders):
    publish(*folders)
    assert everything(tmp_path) == ['old', 'old/new']


@pytest.mark.parametrize('aside', ['.{}.replaced', '{}.removed'])
def test_what_a_kill_leaves(tmp_path, folders, monkeypatch, aside):
    """Between the two renames, and before the old one is gone."""
    hidden = aside.format('old')
    rename, steps = os.replace, []

    def step(source, target):
        steps.append(everything(tmp_path))
        rename(source, target)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', step)
    monkeypatch.setattr(shutil, 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt):
        publish(*folders, aside)
    before, between = steps
    assert before == ['new', 'new/new', 'old', 'old/old']
    assert between == sorted([hidden, f'{hidden}/old', 'new', 'new/new'])
    assert everything(tmp_path) == sorted([hidden, f'{hidden}/old', 'old', 'old/new'])


def test_names_aside_are_numbered(tmp_path):
    names = []
    for _ in range(3):
        (tmp_path / 'a').mkdir()
        names.append(set_aside(tmp_path / 'a', '{}.abandoned').name)
    assert names == ['a.abandoned', 'a.abandoned1', 'a.abandoned2']
    assert everything(tmp_path) == sorted(names)


def test_names_are_on_the_disk(folders, monkeypatch):
    synced = []
    plain = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.fstat(fd).st_ino) or plain(fd))
    inodes = [folders[0].stat().st_ino, folders[0].parent.stat().st_ino]
    publish(*folders)
    assert synced == inodes  # the folder before it has its name, the one around it after
