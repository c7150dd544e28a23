"""What tests of every package share."""

import gc
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# What is imported inside functions is not waited for by the process that hands out the tests.
if TYPE_CHECKING:
    from tests.ranks import Ranks

# Processes that a test starts import this checkout too, its `tests` included.
os.environ['PYTHONPATH'] = str(Path(__file__).parents[1])

# No test is timed: how long an example takes says what else the machine is doing.
settings.register_profile('untimed', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('untimed')


def pytest_configure() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C; tests press it all the same."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported is not searched for garbage, which takes a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for every test, whatever ran before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a text file under the test's own folder, making the folders above it."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding='utf-8')
        return path

    return write_file


@pytest.fixture(scope='session')
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> 'Iterator[Ranks]':
    """Two processes of one gloo group; called with a function and arguments, both run it."""
    from tests.ranks import Ranks

    ranks = Ranks(tmp_path_factory.mktemp('ranks'))
    yield ranks
    ranks.close()


@pytest.fixture(scope='session')
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a tiny model that knows a few answers; 4 seconds for the first who asks."""
    from tests.chatting import learn_chat  # models and tokenizers, which few tests need

    return learn_chat(tmp_path_factory.mktemp('chat'))
