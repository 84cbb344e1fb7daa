"""What an operator has a running pool do: replace every worker, or change its size."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._entry import Entry, Reason
from ._log import PoolLog
from ._roster import Roster

T = TypeVar("T")


class Operator(Generic[T]):
    """Carries out `Session.retire_all` and `Session.resize` for one pool.

    Args:
      evict: closes a worker for a reason.
      give_up_starts: gives up the starts that are beyond the bounds.
      replace: called when workers were marked that are to be replaced, or when there is room for more.
    """

    def __init__(
        self,
        roster: Roster[T],
        log: PoolLog,
        *,
        evict: Callable[[Entry[T], Reason], None],
        give_up_starts: Callable[[], None],
        replace: Callable[[], None],
    ) -> None:
        self._roster = roster
        self._log = log
        self._evict = evict
        self._give_up_starts = give_up_starts
        self._replace = replace

    def retire_all(self, over: float, nursery: trio.Nursery) -> None:
        """Have each worker that is open now replaced, in the course of `over` seconds."""
        entries = [entry for entry in self._roster.entries if entry.is_open]
        self._log.info("all_retired", workers=len(entries), over=over)
        if over and entries:
            nursery.start_soon(self._retire_one_by_one, entries, over / len(entries))
        else:
            self._retire(entries)

    @enable_ki_protection
    async def _retire_one_by_one(self, entries: list[Entry[T]], pause: float) -> None:
        random.shuffle(entries)
        for entry in entries:
            self._retire([entry])
            await trio.sleep(pause)

    def _retire(self, entries: list[Entry[T]]) -> None:
        """Mark workers, unless they leave anyway. They go as those do that are too old."""
        for entry in entries:
            if entry.is_open and entry.evict_reason is None:
                self._roster.mark(entry, "retire_all")
        self._replace()

    def resize(self, pool_size: int, max_overflow: int) -> None:
        """Change the bounds of the pool.

        Starts beyond them are given up, and idle workers that are surplus then leave at once. If there
        are still more than there may be, the next that come back leave, too (`Supervisor.admit`).
        """
        roster = self._roster
        fewer = roster.pool_size - pool_size
        roster.pool_size, roster.limit = pool_size, pool_size + max_overflow
        self._log.info("pool_resized", pool_size=pool_size, max_overflow=max_overflow)
        # Starts go before open workers, and those that are to be replaced before the others.
        self._give_up_starts()
        surplus = min(fewer, roster.lasting - pool_size)
        for entry in sorted(roster.idle, key=lambda entry: not entry.is_expiring):
            is_surplus = surplus > 0 and not entry.is_expiring
            if is_surplus or roster.too_many > 0:
                surplus -= is_surplus
                self._evict(entry, "overflow")
        self._replace()
