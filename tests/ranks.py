"""Real processes that talk to each other, kept for many tests.

A set of processes is started once and sent work: starting them costs seconds, most of it importing
torch. They meet in a file, not at a port. Work that fails shows the error of the process that
failed; work that hangs runs into a time limit; in both cases the processes are replaced.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60.0  # of one piece of work
PRELOADED = ["swavkit", "torch.distributed.fsdp", "torch._dynamo", "pytest", "hypothesis"]


class RankError(Exception):
    """A process failed; the text is its traceback."""


class Ranks:
    """``size`` processes with an initialised default group (gloo), with a timeout in seconds."""

    def __init__(self, size: int, seconds: float = SECONDS) -> None:
        self.size = size
        self._meeting = tempfile.TemporaryDirectory()
        # Forked from a server that has imported what most of the work imports and has never
        # computed anything.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._connections: list[multiprocessing.connection.Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            meeting = str(Path(self._meeting.name) / "meeting")
            process = context.Process(
                target=_serve, args=(rank, size, meeting, seconds, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self.alive = True

    def run(
        self,
        work: Callable[..., Any],
        arguments: Sequence[Any] | None = None,
        *,
        lost: Collection[int] = (),
    ) -> list[Any]:
        """Call ``work(rank, argument)`` in every process and return the results in their order.

        Args:
            work: A function at the top of a module.
            arguments: One for each rank; ``work(rank)`` is called without.
            lost: The ranks that must die of it, and whose result is ``None``.

        Raises:
            RankError: If a process raised, died or took too long.
        """
        for rank, connection in enumerate(self._connections):
            connection.send((work, () if arguments is None else (arguments[rank],)))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        while waiting and not errors:
            ready = multiprocessing.connection.wait(list(waiting), timeout=SECONDS)
            if not ready:
                errors = dict.fromkeys(waiting.values(), f"no answer in {SECONDS:.0f} s")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    done, value = connection.recv()  # type: ignore[union-attr]
                    if rank in lost:
                        done, value = False, f"the process should have died, got {value!r}"
                except (EOFError, ConnectionResetError):
                    done, value = (True, None) if rank in lost else (False, "the process died")
                if done:
                    results[rank] = value
                else:
                    errors[rank] = value
        if errors:
            self.close()  # others may still wait for the one that failed
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        if lost:
            self.close()
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        self.alive = False
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._meeting.cleanup()


def _serve(
    rank: int,
    size: int,
    meeting: str,
    seconds: float,
    connection: multiprocessing.connection.Connection,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    while True:
        try:
            work, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            torch.manual_seed(0)
            connection.send((True, work(rank, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def refusal(work: Callable[[], Any]) -> str | None:
    """Return the text of the ValueError that some work raises, if it does."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return None
