"""When one rank fails or is gone: who it was, told by all others, which end, too.

Ranks that wait inside a collective learn little: a connection is closed, or a time is out, and the
rank that they name is their neighbour rather than the one that is gone. So they ask each other,
through the store in which the job met.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from internlm_mm.utils.launch import host_name

SILENT_SECONDS = 120.0
"""A rank that has given no sign of life for so long is taken for gone."""

_CONSEQUENCES = (
    'connection closed by peer',
    'connection reset by peer',
    'broken pipe',
    'gloo',
    'nccl',
)


class LostRanks:
    """Watches over the ranks of a job, from one of them.

    A thread of each rank gives a sign of life now and then, looks for that of the next rank, and
    for word of a failure; also where the rank itself waits for a GPU that waits for a rank.

    Args:
        store: Where all ranks have met; rank 0 or the launcher keeps it.
        rank: This one.
        world_size: How many there are.
        step: Finished steps, for messages; None before there are any.
        tick: Seconds between signs of life. Ranks are given five to answer; one that hangs, or
            waits inside a collective, ends fifteen after another has failed.
        silent_seconds: See `SILENT_SECONDS`.
        end: Ends this process with an exit code.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        step: Callable[[], int | None],
        tick: float = 1.0,
        silent_seconds: float = SILENT_SECONDS,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._step, self._end = step, end
        self._tick, self._silent_seconds = tick, silent_seconds
        self._over = threading.Event()  # this rank has ended well, or tells of its end itself
        self._told: dict[int, dict] = {}
        # A connection of its own: torch's may be busy with a wait that goes on for minutes.
        # torch's stubs do not know all of a store's methods.
        self._store = cast(Any, dist.PrefixStore('lost_ranks', cast(Any, store).clone()))
        self._store.set_timeout(timedelta(seconds=max(1.0, 5 * tick)))
        # Lists that all ranks add to, so that reading takes one request and not one for each rank.
        self._store.append('hosts', f'{rank} {host_name()}\n')
        self._hosts: dict[int, str] = {}
        self._alive: set[int] = set()
        self._thread = threading.Thread(target=self._watch, name='lost_ranks', daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank has done its work: whatever happens to the others no longer matters to it."""
        self._over.set()
        self._thread.join(5 * self._tick)

    def tell(self, error: BaseException) -> str | None:
        """Tell the others of an error, and ask them what they know. Takes a few seconds.

        Returns:
            Which rank is the cause, in a sentence; None where this one is.
        """
        self._over.set()
        own = not is_consequence(error)
        text = (str(error).strip() or '(no message)').splitlines()[0]
        report = {'error': f'{type(error).__name__}: {text}', 'own': own, 'step': self._step()}
        try:
            self._store.append('errors', f'{self.rank} {json.dumps(report)}\n')
            self._store.append('alive', f'{self.rank} yes\n')
            self._store.set('failed', '')
            self._ask()
            reachable = True
        except RuntimeError:  # the store is gone, and with it whoever kept it
            reachable = False
        return None if own else self._explanation(reachable)

    # ------------------------------------------------------------------------------ questions

    def _watch(self) -> None:
        """See to it that this rank ends when another has failed, and knows why."""
        reachable = True
        try:
            if not self._wait_for_failure():
                return
            self._store.append('alive', f'{self.rank} yes\n')
        except RuntimeError:
            reachable = False
        # Most learn of it inside a collective, and then tell of it themselves.
        for _ in range(15):
            if self._over.wait(self._tick):
                return
            try:
                if reachable:
                    self._collect()
            except RuntimeError:
                reachable = False
        sys.stdout.flush()
        print(self._explanation(reachable), file=sys.stderr, flush=True)
        self._end(1)

    def _wait_for_failure(self) -> bool:
        """Whether one has failed; False where this rank's own end came first."""
        next_rank = (self.rank + 1) % self.world_size
        last, since = b'', time.monotonic()
        while not self._over.wait(self._tick):
            if self._store.check(['failed']):
                return True
            self._store.add(f'beat/{self.rank}', 1)
            key = f'beat/{next_rank}'
            beat = self._store.get(key) if self._store.check([key]) else b''
            if len(self._hosts) < self.world_size:
                self._hosts |= self._list('hosts')  # now, while there is a store to ask
            if beat != last:
                last, since = beat, time.monotonic()
            elif time.monotonic() - since > self._silent_seconds:
                self._store.set('failed', '')
        return False

    def _ask(self) -> None:
        """Learn who is there and who has failed, until all have said so or time is over."""
        deadline = time.monotonic() + 5 * self._tick
        while time.monotonic() < deadline:
            self._collect()
            if len(self._told) == self.world_size:
                break
            if self._causes() and len(self._alive) == self.world_size:
                break
            time.sleep(self._tick / 4)
        self._collect()
        if self.rank == 0:
            time.sleep(self._tick)  # it may keep the store, and others may still be reading

    def _collect(self) -> None:
        self._hosts |= self._list('hosts')
        self._told |= {rank: json.loads(text) for rank, text in self._list('errors').items()}
        self._alive |= set(self._list('alive'))

    def _list(self, key: str) -> dict[int, str]:
        """What ranks have added to a list."""
        if not self._store.check([key]):
            return {}
        lines = self._store.get(key).decode().splitlines()
        return {int(rank): text for rank, text in (line.split(' ', 1) for line in lines)}

    def _causes(self) -> list[int]:
        return [rank for rank, told in sorted(self._told.items()) if told['own']]

    # ---------------------------------------------------------------------------------- answers

    def _explanation(self, reachable: bool) -> str:
        """Who is to blame, as far as is known; less is where the store is out of reach."""
        if not reachable and not set(self._told) - {self.rank}:
            return (
                f'{self._name(0)}, where the ranks meet, ended without a word'
                f'{_after(self._step())}; the job cannot go on without it'
            )
        causes = self._causes()
        if causes:
            errors = [
                f'{self._name(rank)} failed{_after(self._told[rank]["step"])}: '
                f'{self._told[rank]["error"]}'
                for rank in causes
                if rank != self.rank
            ]
            return '; '.join(errors)
        silent = [rank for rank in range(self.world_size) if rank not in self._told]
        gone = [rank for rank in silent if rank not in self._alive]
        if gone:
            return (
                f'{self._names(gone)} ended without a word{_after(self._step())}, killed from '
                'outside or out of memory; the job cannot go on without it'
            )
        if silent == [self.rank]:
            return f'the others waited in vain for {self._name(self.rank)}, which is this one'
        if silent:
            return (
                f'{self._names(silent)} did not answer{_after(self._step())}: still there, but '
                'hanging, or slower than env_cfg.dist_cfg.timeout allows'
            )
        return 'the ranks lost their connections, but all of them are there: look at the network'

    def _names(self, ranks: Sequence[int]) -> str:
        return ', '.join(map(self._name, ranks))

    def _name(self, rank: int) -> str:
        host = self._hosts.get(rank)
        return f'rank {rank} (host {host})' if host else f'rank {rank}'


def watch_ranks(step: Callable[[], int | None], timeout: float = 1800.0) -> LostRanks | None:
    """Watch over the job of the default process group; None where that is one process.

    Args:
        step: Finished steps.
        timeout: Seconds that collectives wait. NCCL then ends the process without asking anyone,
            so who is lost has to be known before.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # torch has no public way to the store that a launcher has opened.
    store = dist.distributed_c10d._get_default_store()
    world_size = dist.get_world_size()
    # Of a thousand ranks each may be a little slower to answer: one store serves them all.
    tick = max(1.0, world_size / 256)
    silent = max(10 * tick, min(SILENT_SECONDS, timeout / 2))
    return LostRanks(store, dist.get_rank(), world_size, step, tick, silent)


def is_consequence(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a rank which lost another one."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(words in text for words in _CONSEQUENCES):
            return True
        error = error.__cause__
    return False


def _after(step: int | None) -> str:
    return '' if step is None else f' after step {step}'
