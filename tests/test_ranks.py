import os
from pathlib import Path

import pytest

from tests.ranks import Ranks


def die() -> None:
    os._exit(7)


def one_more(number: int) -> int:
    return number + 1


def test_ranks_that_died_are_told_of_and_replaced(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    assert ranks(one_more, 1) == [2, 2]
    with pytest.raises(RuntimeError, match='rank 0 ended with exit code 7'):
        ranks(die)
    assert ranks(one_more, 2) == [3, 3]
    with pytest.raises(RuntimeError, match=r'(?s)rank 0:.*rank 1:.*TypeError'):
        ranks(one_more, 'text')
    assert ranks(one_more, 3) == [4, 4]
    ranks.close()
