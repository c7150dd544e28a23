"""What is asked of a model."""

import numpy as np

from internlm_mm.evaluation import LogProb


def test_the_last_token_is_only_predicted() -> None:
    request = LogProb(np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32))
    assert request.num_tokens == 4
