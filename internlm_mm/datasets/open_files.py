"""How many token files are mapped at a time: every map holds a file descriptor until it goes."""

from __future__ import annotations

import resource
from collections import OrderedDict

from internlm_mm.datasets.token_file import TokenFile

MAPS = 3  # descriptors of one token file: tokens, offsets, loss mask
_MOST = 128  # files; touched pages of maps count as resident, and mapping anew takes little


class OpenFiles:
    """Unmaps the token file that has not been read for longest when too many are mapped.

    Python keeps the descriptor of a mapped file, and a process may have 1,024 of them where nobody
    raised that: fewer than the files of a large corpus.

    Args:
        limit: Files mapped at once; by default as many as half of the process's descriptors carry.

    Raises:
        ValueError: If `limit` is less than 1.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            allowed = _MOST if soft == resource.RLIM_INFINITY else soft // (2 * MAPS)
            limit = max(1, min(allowed, _MOST))
        if limit < 1:
            raise ValueError(f'limit must be at least 1, got {limit}')
        self.limit = limit
        self._files: OrderedDict[int, TokenFile] = OrderedDict()  # by identity, oldest use first

    def __len__(self) -> int:
        return len(self._files)

    def use(self, file: TokenFile) -> TokenFile:
        """The same file, which is going to be read now."""
        key = id(file)
        if key in self._files:
            self._files.move_to_end(key)
            return file
        self._files[key] = file
        if len(self._files) > self.limit:
            _, oldest = self._files.popitem(last=False)
            oldest.unmap()
        return file

    def __getstate__(self) -> dict[str, object]:
        """Nothing is mapped yet in the process that this is sent to."""
        return {'limit': self.limit, '_files': OrderedDict()}
