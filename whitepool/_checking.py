"""Probes for tasks that wait: before use (``check_interval=0``), and what happens if one is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._entry import Entry
from ._roster import Roster
from ._wait_queue import WaitQueue

T = TypeVar("T")

PROMPT_ANSWER = 0.1
"""Seconds. A task that a probed worker would serve gets another worker if the probe takes longer."""


class Checker(Generic[T]):
    """Has idle workers of one pool probed for the tasks that wait.

    Args:
      evict_if_dead: evicts a worker that has died, and says so.
      wake: has the supervisor look at what is missing.
    """

    def __init__(
        self,
        roster: Roster[T],
        queue: WaitQueue[Entry[T]],
        *,
        evict_if_dead: Callable[[Entry[T]], bool],
        wake: Callable[[], None],
    ) -> None:
        self._roster = roster
        self._queue = queue
        self._evict_if_dead = evict_if_dead
        self._wake = wake
        self._watches = False  # whether `_wake_for_slow_probes` runs
        self._now = trio.lowlevel.current_clock().current_time

    def probe_for_waiters(self, nursery: trio.Nursery) -> int:
        """Probe idle workers for tasks that wait, and return how many waiters a probe may serve soon.

        Tasks wait while workers are idle only if each has to be probed first. A probe that does not
        answer at once delays no task: it counts no more, and another worker is probed, or started.
        """
        roster, queue = self._roster, self._queue
        if not queue.waiting or not (roster.probes or roster.idle):
            return 0
        now = self._now()
        prompt = sum(began + PROMPT_ANSWER > now for began in roster.probes.values())
        while roster.idle and prompt < queue.waiting:
            entry = roster.next_idle()
            if self._evict_if_dead(entry):
                continue
            if entry.can_be_checked:
                roster.begin_probe(entry, now)
                entry.task.probe()
                prompt += 1
            else:
                queue.serve(roster.take_idle(now), now)
        if prompt and not self._watches:
            self._watches = True
            nursery.start_soon(self._wake_for_slow_probes)
        return prompt

    @enable_ki_protection
    async def _wake_for_slow_probes(self) -> None:
        """Have the supervisor look again at each probe that has not answered promptly."""
        while self._queue.waiting:
            now = self._now()
            late = [began + PROMPT_ANSWER for began in self._roster.probes.values()]
            due = min((time for time in late if time > now), default=None)
            if due is None:
                break
            await trio.sleep_until(due)
            self._wake()
        self._watches = False
