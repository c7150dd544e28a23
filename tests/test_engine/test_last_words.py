"""What ranks print that end with an error: each is a thread here, on a store as ranks have it."""

import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from internlm_mm.engine import last_words
from internlm_mm.utils.launch import Launch, free_port
from tests.runs import start_ranks

TINY = Path(__file__).parents[1] / 'configs' / 'tiny.py'


def told(monkeypatch, messages, seconds=1.0):
    """What each rank prints, and after how long it goes on; None for a rank without an error."""
    keeper = dist.TCPStore(
        '127.0.0.1', 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False
    )
    me = threading.local()
    client = {'is_master': False, 'wait_for_workers': False}
    ranks = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: len(messages),
        get_rank=lambda: me.rank,
        PrefixStore=dist.PrefixStore,
        distributed_c10d=SimpleNamespace(
            _get_default_store=lambda: dist.TCPStore('127.0.0.1', keeper.port, **client)
        ),
    )
    monkeypatch.setattr(last_words, 'dist', ranks)
    printed, took = {}, {}
    monkeypatch.setattr(
        last_words, 'print', lambda text, **_: printed.update({me.rank: text}), raising=False
    )

    def end(rank, message):
        me.rank, start = rank, time.monotonic()
        last_words.tell_once(message, seconds)
        took[rank] = time.monotonic() - start

    threads = [
        threading.Thread(target=end, args=(rank, message))
        for rank, message in enumerate(messages)
        if message is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return printed, took


def test_the_same_error_is_told_once(monkeypatch):
    printed, took = told(monkeypatch, ['ValueError: no'] * 5, seconds=20)
    assert printed == {0: 'ValueError: no'}
    assert max(took.values()) < 15  # all have heard, and none waits longer


def test_another_error_is_told_too(monkeypatch):
    printed, _ = told(monkeypatch, ['ValueError: rank 2: no', 'ValueError: rank 2: no', 'no'])
    assert printed == {0: 'ValueError: rank 2: no', 2: 'no'}


def test_the_only_error_is_told(monkeypatch):
    printed, took = told(monkeypatch, [None, 'no', 'no'])
    assert printed == {1: 'no', 2: 'no'} and max(took.values()) < 15
    printed, took = told(monkeypatch, ['no', None])
    assert printed == {0: 'no'} and took[0] < 15


def test_a_store_that_is_gone(monkeypatch, capsys):
    def gone():
        raise dist.DistNetworkError('no connection')

    for name, value in (('is_initialized', True), ('get_world_size', 2), ('get_rank', 1)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist.distributed_c10d, '_get_default_store', gone)
    last_words.tell_once('no')
    assert capsys.readouterr().err == 'no\n'


def test_one_process_tells_its_own(capsys):
    last_words.tell_once('no')
    assert capsys.readouterr().err == 'no\n'


def told_without_a_group(monkeypatch, messages, has_store=False, seconds=0.4):
    """As `told`, by ranks that know nothing but what their launcher says."""
    me, port = threading.local(), free_port()
    monkeypatch.setattr(last_words, 'ignore_stop_signals', lambda: None)  # for main threads alone
    monkeypatch.setattr(
        last_words,
        'guess_launch',
        lambda: (Launch(me.rank, len(messages), me.rank, '127.0.0.1', port), has_store),
    )
    printed = {}
    monkeypatch.setattr(
        last_words, 'print', lambda text, **_: printed.update({me.rank: text}), raising=False
    )
    keeper = None
    if has_store:
        keeper = dist.TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False)

    def end(rank, message):
        me.rank = rank
        last_words.tell_once(message, seconds)

    threads = [
        threading.Thread(target=end, args=(rank, message))
        for rank, message in reversed(list(enumerate(messages)))  # the first comes last
        if message is not None
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    del keeper
    return printed


@pytest.mark.parametrize('has_store', [True, False], ids=['torchrun', 'others'])
def test_before_there_is_a_group(monkeypatch, has_store):
    printed = told_without_a_group(monkeypatch, ['no'] * 4, has_store, seconds=20)
    assert printed == {0: 'no'}


def test_the_only_error_before_there_is_a_group(monkeypatch):
    assert told_without_a_group(monkeypatch, [None, 'no'], has_store=True) == {1: 'no'}
    assert told_without_a_group(monkeypatch, [None, 'no']) == {1: 'no'}
    assert told_without_a_group(monkeypatch, ['no', None]) == {0: 'no'}
    assert told_without_a_group(monkeypatch, ['no', 'rank 1: no']) == {0: 'no', 1: 'rank 1: no'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--cfg-options', 'strategy.parallel.data_shard=3'], 'needs exactly 3 processes'),
        (['--cfg-options', 'strategy.recompute=2'], 'strategy.recompute=2'),  # with the model
        (['--cfg-options', 'model.hiden_size=3'], 'model.hiden_size'),  # before there is a group
        (['--load-from', '/nowhere'], '/nowhere'),
        (['--dry-run=3'], 'train.py: error: argument --dry-run'),
    ],
)
def test_a_mistake_is_one_line_of_a_job(tmp_path, arguments, message):
    argv = [TINY, '--work-dir', tmp_path / 'work', *arguments]
    ranks = start_ranks(argv, tmp_path / 'log')
    assert [rank.wait() for rank in ranks] == [2, 2]
    lines = [line for rank in ranks for line in rank.text.splitlines() if 'rror: ' in line]
    assert len(lines) == 1 and message in lines[0], lines
