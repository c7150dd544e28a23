import hashlib
from pathlib import Path

import pytest

from internlm_mm.tokenizers.base import Tokenizer, hash_files


def test_hash_is_sha256_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(b'one')
    (tmp_path / 'b').write_bytes(b'')
    expected = hashlib.sha256(b'a\x003\x00oneb\x000\x00').hexdigest()
    assert hash_files([tmp_path / 'a', tmp_path / 'b']) == expected


def test_hash_sees_where_a_file_ends(tmp_path: Path) -> None:
    first, second = tmp_path / 'first', tmp_path / 'second'
    hashes = set()
    for texts in (('xy', 'z'), ('x', 'yz')):
        first.write_text(texts[0])
        second.write_text(texts[1])
        hashes.add(hash_files([first, second]))
    assert len(hashes) == 2


def test_interface_cannot_be_built() -> None:
    with pytest.raises(TypeError, match='abstract'):
        Tokenizer()  # type: ignore[abstract]
