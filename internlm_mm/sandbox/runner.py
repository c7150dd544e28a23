"""A worker that runs: its processes, what they use, and the proof that they are confined."""

import json
import logging
import time
from pathlib import Path

from internlm_mm.sandbox.cgroup import ControlGroup
from internlm_mm.sandbox.exchange import Exchange, frame
from internlm_mm.sandbox.limits import MIB, Limits
from internlm_mm.sandbox.process import Command, Processes, StartError, is_readable
from internlm_mm.sandbox.proof import Traps
from internlm_mm.sandbox.reply import ProtocolError, read_outcome
from internlm_mm.sandbox.usage import (
    cpu_seconds,
    file_system,
    folder_tree,
    lock_count,
    memory_bytes,
    over_limit,
    remove_tree,
    socket_bytes,
)

LOG = logging.getLogger(__name__)

_START_SECONDS = 20.0


class LiveWorker:
    """A confined interpreter that has proved itself and stands still until it gets a cell.

    Args:
        command: How it is started.
        limits: Of the session.
        groups: Folder in which control groups can be made, if there is one.
        traps: What it must not reach; None where nothing is confined.

    Raises:
        StartError: If it does not come up, or reaches a trap.
    """

    def __init__(
        self, command: Command, limits: Limits, groups: Path | None, traps: Traps | None
    ) -> None:
        self.limits = limits
        self._scratch = None if command.scratch is None else Path(command.scratch)
        self._group: ControlGroup | None = None
        self._cpu = 0.0
        began = time.monotonic()
        try:
            self.processes = Processes(command, _START_SECONDS)
        except StartError:
            self._remove_scratch()
            raise
        try:
            # To join a group takes milliseconds, in which the worker comes up.
            early = None if groups is None else self._join(groups, self.processes.early())
            self._await_ready()
            self.processes.settle()
            if groups is not None and early != self.processes.worker:
                self._join(groups, self.processes.worker)
            if traps is not None:
                self._prove(traps, command)
            self.processes.stop()
        except (StartError, ProtocolError, OSError) as error:
            words = self.processes.last_words() if self.processes.worker < 0 else ''
            self.end()
            raise StartError(f'{error}: {words}' if words else str(error)) from None
        self.start_seconds = time.monotonic() - began

    @property
    def alive(self) -> bool:
        """Whether the interpreter is still there."""
        return not is_readable(self.processes.death, 0)

    def exchange(self) -> Exchange:
        """The traffic of the next cell."""
        processes = self.processes
        return Exchange(processes.control, processes.outputs, processes.death, self.limits)

    def begin_cell(self) -> None:
        """Count processor time from here."""
        self._cpu = cpu_seconds(self.processes.members())

    def look(self) -> str | None:
        """The limit that the session is over just now, by name."""
        limits, members = self.limits, self.processes.members()
        if cpu_seconds(members) - self._cpu > limits.cpu_seconds:
            return 'cpu_seconds'
        disk = self.over_limit(members)
        if disk is not None:
            return disk
        if lock_count(members) > limits.files:
            return 'files'
        if self._group is not None:
            return 'memory_mb' if self._group.ran_out() else None
        alone = self._scratch is None
        most = limits.memory_mb * MIB
        most -= file_system(self.processes.folder).size if alone else 0
        most -= socket_bytes(members, self.processes.worker if alone else None)
        return 'memory_mb' if memory_bytes(members, most) > most else None

    def over_limit(self, members: list[int] | None = None) -> str | None:
        """The limit that the session's files are over."""
        if self._scratch is None:
            disk = file_system(self.processes.folder)
        else:
            members = self.processes.members() if members is None else members
            disk = folder_tree(self.processes.folder, members, self.limits)
        return over_limit(disk, self.limits)

    def ran_out(self) -> str | None:
        """'memory_mb' if the kernel has killed a process for want of it."""
        return 'memory_mb' if self._group is not None and self._group.ran_out() else None

    def end_processes(self) -> None:
        """Kill them all; what they wrote can still be read."""
        self.processes.kill()

    def end(self) -> None:
        """Kill all processes and remove all files; may be called again."""
        self.processes.end()
        if self._group is not None:
            self._group.remove()
            self._group = None
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch is not None and self._scratch.exists():
            try:
                remove_tree(self._scratch)
            except OSError as error:
                LOG.warning('sandbox: %s could not be removed: %s', self._scratch, error)

    def _join(self, groups: Path, process: int | None) -> int | None:
        """Put a process in the session's control group; the process."""
        try:
            if self._group is None:
                limits = self.limits
                self._group = ControlGroup(groups, limits.memory_mb * MIB, limits.processes + 4)
            if process is not None:
                self._group.add([process])
        except ProcessLookupError:
            return None  # it has ended: whoever waits for it is told
        except OSError as error:
            raise StartError(f'the control group of a session: {error}') from None
        return process

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        processes = self.processes
        exchange = Exchange(processes.control, processes.outputs, -1, self.limits)
        while exchange.answer is None and not exchange.dead:
            if time.monotonic() > deadline:
                raise StartError(f'the interpreter did not start in {_START_SECONDS:g} s')
            exchange.wait(0.5)
        if exchange.answer is None:
            exchange.finish()
            raise StartError(exchange.err.text.strip() or 'the interpreter ended at its start')
        ready = json.loads(exchange.answer)
        assert set(ready) == {'ready'}

    def _prove(self, traps: Traps, command: Command) -> None:
        exchange = self.exchange()
        code = traps.cell(alone=self._scratch is None)
        exchange.begin()
        exchange.send(frame(b'P' + code.encode()) + frame(b'canary'), 5.0)
        deadline = time.monotonic() + _START_SECONDS
        while exchange.answer is None and not exchange.dead and time.monotonic() < deadline:
            exchange.wait(0.5)
        if exchange.answer is None:
            raise StartError('the canary gave no answer')
        outcome = read_outcome(exchange.answer, 'canary', self.limits)
        exchange.finish()
        if outcome.status != 'ok':
            raise StartError(f'the canary failed: {outcome.error}')
        found = traps.judge(exchange.out.text, command.variables)
        if found is not None:
            raise StartError(f'the confinement does not hold ({found})')
