from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.datasets import TokenFileWriter

WriteTokens = Callable[..., Path]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Write documents as a token file below the test's own folder."""

    def write(
        name: str,
        documents: Sequence[Sequence[int]],
        vocab_size: int = 1000,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> Path:
        path = tmp_path / name
        with TokenFileWriter(path, vocab_size=vocab_size, has_loss_mask=bool(masks)) as writer:
            for index, document in enumerate(documents):
                mask = None if masks is None else np.array(masks[index])
                writer.add(np.array(document), mask)
        return path

    return write
