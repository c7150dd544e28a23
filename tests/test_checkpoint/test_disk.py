"""What is written is there, and its checksum is zlib's, whatever computes it."""

import builtins
import importlib.util
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.checkpoint import disk
from internlm_mm.checkpoint.disk import (
    SummedFile,
    copy_folder,
    file_crc32,
    files_crc32,
    write_file,
)


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 64))
def test_content_size_and_checksum(tmp_path_factory, parts, block):
    path = tmp_path_factory.mktemp('x') / 'x'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, '_BLOCK', block)
        with SummedFile(path) as file:
            for part in parts:
                file.write(part)
    content = b''.join(parts)
    assert path.read_bytes() == content
    assert (file.size, file.crc32) == (len(content), zlib.crc32(content))
    assert file_crc32(path) == zlib.crc32(content)


def test_a_disk_that_takes_less_than_it_is_given(tmp_path):
    """A raw file may write a part only, as it does where the disk is nearly full."""
    content = os.urandom(1000)
    with SummedFile(tmp_path / 'x') as file:
        whole = file._file

        class Slow:
            fileno = whole.fileno
            write = staticmethod(lambda data: whole.write(data[:7]))

            def __enter__(self):
                return self

            def __exit__(self, *error):
                whole.close()

        file._file = Slow()
        file.write(content)
    assert (tmp_path / 'x').read_bytes() == content
    assert (file.size, file.crc32) == (1000, zlib.crc32(content))


def test_blocks_are_sent_on_their_way_once_each(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(disk, '_BLOCK', 100)
    monkeypatch.setattr(os, 'posix_fadvise', lambda fd, at, size, what: sent.append((at, size)))
    with SummedFile(tmp_path / 'x') as file:
        for size in (40, 40, 40, 250):
            file.write(bytes(size))
    assert sent == [(0, 120), (120, 100), (220, 100)]  # the rest goes when the file is closed


def test_a_file_system_that_takes_no_advice(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(disk, '_BLOCK', 10)
    monkeypatch.setattr(os, 'posix_fadvise', refuse)
    assert write_file(tmp_path / 'a', bytes(35)) == (35, zlib.crc32(bytes(35)))
    monkeypatch.delattr(os, 'posix_fadvise')  # as on macOS
    assert write_file(tmp_path / 'b', bytes(35)) == (35, zlib.crc32(bytes(35)))
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes() == bytes(35)


def test_what_is_on_the_disk_is_waited_for_and_an_error_is_not(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.fstat(fd).st_size))
    write_file(tmp_path / 'a', b'1234')
    assert synced == [4]
    with pytest.raises(ValueError, match='stop'), SummedFile(tmp_path / 'b') as file:
        file.write(b'12')
        raise ValueError('stop')
    assert synced == [4] and file._file.closed


def test_checksums_of_several_files(tmp_path):
    write_file(tmp_path / 'a', b'some text')
    write_file(tmp_path / 'b', b'')
    large = os.urandom((1 << 20) + 17)
    write_file(tmp_path / 'c', large)
    paths = [tmp_path / name for name in 'abc']
    assert files_crc32(paths) == [zlib.crc32(b'some text'), 0, zlib.crc32(large)]


def test_a_folder_is_copied_with_what_is_in_it(tmp_path):
    source = tmp_path / 'source'
    (source / 'deep' / 'deeper').mkdir(parents=True)
    content = {'a': b'1', 'deep/b': b'22', 'deep/deeper/c': b''}
    for name, data in content.items():
        (source / name).write_bytes(data)
    written = copy_folder(source, tmp_path / 'target')
    assert written == {name: (len(data), zlib.crc32(data)) for name, data in content.items()}
    for name, data in content.items():
        assert (tmp_path / 'target' / name).read_bytes() == data
    with pytest.raises(FileNotFoundError, match='absent'):
        copy_folder(tmp_path / 'absent', tmp_path / 'elsewhere')


def test_checksums_are_zlib_s_where_zlib_ng_is_not_installed(monkeypatch):
    plain = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith('zlib_ng'):
            raise ImportError(name)
        return plain(name, *arguments, **options)

    assert disk.crc32 is not zlib.crc32  # it is a requirement
    spec = importlib.util.find_spec('internlm_mm.checkpoint.disk')
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(builtins, '__import__', without)
    spec.loader.exec_module(fresh)
    assert fresh.crc32 is zlib.crc32
