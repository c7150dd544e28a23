"""Texts for requests of several kinds, in their order."""

import numpy as np
import pytest

from internlm_mm.evaluation import Generate, TextWriter
from internlm_mm.inference import Generator, Sampling
from tests.trained import trained_run


@pytest.fixture(scope='module')
def generator(tmp_path_factory) -> Generator:
    _, model, tokenizer = trained_run(tmp_path_factory.mktemp('run'))
    return Generator(model.eval(), tokenizer)


def requests(generator: Generator) -> list[Generate]:
    tokenizer = generator.tokenizer
    texts = ['def f1(x):', 'return', 'x + 2 def', 'f', '(x)', 'def f22(x): return x + 22']
    kinds = [Sampling(max_new_tokens=9), Sampling(max_new_tokens=5, stop=('e',))]
    return [
        Generate(np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32), kinds[index % 2])
        for index, text in enumerate(texts)
    ]


@pytest.mark.parametrize('batch_size', [1, 2, 8])
def test_each_is_what_it_is_alone(generator: Generator, batch_size: int) -> None:
    asked = requests(generator)
    expected = [''.join(generator.stream_ids(one.prompt.tolist(), one.sampling)) for one in asked]
    assert len(set(expected)) > 3 and not any('e' in text for text in expected[1::2])
    assert TextWriter(generator, batch_size=batch_size)(asked) == expected
    assert TextWriter(generator, batch_size=batch_size)([]) == []


class Counting:
    """In the place of a generator: says what it was given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def continue_ids(self, prompts, sampling) -> list[str]:
        self.seen += prompts
        return [str(prompt) for prompt in prompts]


def written_by(rank: int, lengths: list[int]) -> tuple[list[str], int]:
    counting = Counting()
    asked = [Generate(np.arange(length, dtype=np.int32), Sampling()) for length in lengths]
    writer = TextWriter(counting, batch_size=2, rank=rank, world_size=2)
    return writer(asked), len(counting.seen)


def rank_writes(lengths: list[int]) -> tuple[list[str], int]:
    import torch.distributed as dist

    return written_by(dist.get_rank(), lengths)


def test_ranks_share_them_out(two_ranks) -> None:
    lengths = [3, 9, 1, 4, 4, 2, 7]
    (first, ours), (second, theirs) = two_ranks(rank_writes, lengths)
    assert first == second == [str(list(range(length))) for length in lengths]
    assert ours + theirs == len(lengths) and min(ours, theirs) >= 3


def test_a_batch_of_nothing() -> None:
    with pytest.raises(ValueError, match='task_batch_size=0 must be at least 1'):
        TextWriter(Counting(), batch_size=0)
