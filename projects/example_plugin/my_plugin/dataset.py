"""Text without a tokenizer: the bytes of files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from internlm_mm.datasets.packing import Row, pack_row
from internlm_mm.datasets.permutation import Permutation
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX

END = 0
"""The byte behind a file; text has none."""


@DATASETS.register_module()
class FolderBytes:
    """Files below a folder, end to end and cut into rows; a token is a byte, a document a file.

    Args:
        data_root: The folder. Sub-folders whose names begin with a dot are left out.
        seq_len: Length of a row, in bytes.
        suffixes: Only files that end so.
        seed: Another seed, another order.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    vocab_size = 256
    domains: tuple[str, ...] = ()

    def __init__(
        self,
        data_root: str,
        *,
        seq_len: int,
        suffixes: Sequence[str] = ('.txt', '.md', '.py'),
        seed: int = 0,
    ) -> None:
        root = Path(data_root)
        self.files = [
            path
            for path in sorted(root.rglob('*'))
            if path.suffix in suffixes and not _is_hidden(path, root) and path.is_file()
        ]
        if not self.files:
            raise FileNotFoundError(
                f'data_root {root} holds no file that ends in {", ".join(suffixes)}'
            )
        self.seq_len = seq_len
        self.seed = seed
        sizes = np.array([path.stat().st_size for path in self.files]) + 1  # with END
        self.starts = np.concatenate(([0], np.cumsum(sizes)))  # in the bytes of all files
        self.max_docs = min(seq_len, 3 + seq_len // int(sizes.min()))  # the last may be padding

    def __len__(self) -> int:
        """Rows an epoch."""
        return -(-int(self.starts[-1]) // self.seq_len)

    def __getitem__(self, index: int) -> Row:
        """Row `index` of the endless sequence: a function of the seed and the index alone."""
        epoch, place = divmod(index, len(self))
        start = Permutation(len(self), self.seed, epoch)(place) * self.seq_len
        stop = min(start + self.seq_len, int(self.starts[-1]))
        tokens, labels = [], []
        first = int(np.searchsorted(self.starts, start, 'right')) - 1
        while first < len(self.files) and self.starts[first] < stop:
            begin, end = (int(self.starts[first + side]) for side in (0, 1))
            # One byte more than wanted, so that the last one knows what follows.
            piece = self._read(first, max(start, begin) - begin, min(stop + 1, end) - begin)
            wanted = min(stop, end) - max(start, begin)
            tokens.append(piece[:wanted])
            following = np.append(piece[1:], IGNORE_INDEX)
            labels.append(following[:wanted])
            first += 1
        return pack_row(
            np.concatenate(tokens),
            np.concatenate(labels),
            np.array([len(piece) for piece in tokens]),
            seq_len=self.seq_len,
            max_docs=self.max_docs,
        )

    def _read(self, file: int, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a file, counted as if END stood behind it."""
        size = int(self.starts[file + 1] - self.starts[file])
        count = min(stop, size - 1) - start
        content = np.fromfile(self.files[file], np.uint8, count, offset=start).astype(np.int64)
        return np.append(content, END) if stop == size else content


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith('.') for part in path.relative_to(root).parts)
