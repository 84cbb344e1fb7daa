"""All workers of a pool, by state. This is the only place where a state changes.

The roster is plain data, changed between two awaits: Trio runs one task at a time, so it needs no lock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from operator import attrgetter
from typing import Generic, TypeVar

from ._entry import REASONS, TRANSITIONS, Entry, Reason, State
from ._options import Options
from ._statistics import Counters

T = TypeVar("T")

# The hot path uses these: to look up a member of an enum costs more than to compare with it.
IDLE, IN_USE = State.IDLE, State.IN_USE

_idle_since = attrgetter("idle_since")


class IllegalTransition(Exception):
    """A state was to follow that `TRANSITIONS` does not allow: a bug in the pool."""


class Roster(Generic[T]):
    """The entries of all workers, from the decision to open one until it has been closed.

    A worker that is being closed still counts: a connection that is being closed is a connection to
    the server, and takes one of its places.
    """

    def __init__(self, counters: Counters, options: Options) -> None:
        self.pool_size = options.pool_size
        self.limit = options.pool_size + options.max_overflow
        """Workers that the pool may have."""
        self.entries: dict[Entry[T], None] = {}
        """A set in order: the one that was started first comes first."""
        self.idle: deque[Entry[T]] = deque()
        """The idle ones, in the order of their `idle_since`. The right end was in use last."""
        self.probes: dict[Entry[T], float] = {}
        """Those that are SERVICING for a probe, and since when. The oldest probe comes first."""
        self.expiring: OrderedDict[Entry[T], None] = OrderedDict()
        """Those that are `Entry.is_expiring`, in the order in which they were marked."""
        self._counters = counters
        # Only for the states that the hot path does not touch. The rest follows from them.
        self._in_state = {State.OPENING: 0, State.SERVICING: 0, State.CLOSING: 0}
        self._is_lifo = options.strategy == "lifo"
        self._next_idle = self.idle.pop if self._is_lifo else self.idle.popleft

    # -- Counts --------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Workers that may be started."""
        return self.limit - len(self.entries)

    @property
    def too_many(self) -> int:
        """Workers that have to go, beyond those that are going, because the pool has been resized."""
        return len(self.entries) - self.closing - self.limit

    @property
    def opening(self) -> int:
        return self._in_state[State.OPENING]

    @property
    def servicing(self) -> int:
        return self._in_state[State.SERVICING]

    @property
    def closing(self) -> int:
        return self._in_state[State.CLOSING]

    @property
    def open(self) -> int:
        """Workers that have been opened, and are not being closed."""
        return len(self.entries) - self.opening - self.closing

    @property
    def in_use(self) -> int:
        return self.open - self.servicing - len(self.idle)

    @property
    def lasting(self) -> int:
        """Workers that are open, and not about to be replaced."""
        return self.open - len(self.expiring)

    # -- Changes -------------------------------------------------------------------------------------

    def add(self, entry: Entry[T]) -> None:
        """Add a worker that is about to be opened."""
        self.entries[entry] = None
        self._in_state[State.OPENING] += 1

    def next_idle(self) -> Entry[T]:
        """Return the worker that `take_idle` would take."""
        return self.idle[-1 if self._is_lifo else 0]

    def next_expiring(self) -> Entry[T] | None:
        """Return an idle worker that is to be replaced; None if there is none."""
        # Either may be long: all are idle, or all those that are to be replaced are in use.
        fewer: Collection[Entry[T]] = min(self.idle, self.expiring, key=len)
        for entry in fewer:
            if entry.state is IDLE and entry in self.expiring:
                return entry
        return None

    def take_idle(self, now: float) -> Entry[T]:
        """Make the next idle worker one in use. Raises `IndexError` if there is none.

        With `put_idle` this is what every checkout goes through, so the two do no more than they must:
        they are `move` without its questions.
        """
        entry = self._next_idle()
        entry.state = IN_USE
        entry.in_use_since = now
        return entry

    def put_idle(self, entry: Entry[T], now: float) -> None:
        """Make a worker that is IN_USE an idle one. `now` must not be before another's `idle_since`."""
        entry.state = IDLE
        entry.idle_since = now
        self.idle.append(entry)

    def begin_probe(self, entry: Entry[T], now: float) -> None:
        """Make an idle worker one that is SERVICING for a probe. Its `idle_since` stays as it is."""
        self.move(entry, State.SERVICING)
        self.probes[entry] = now

    def move(self, entry: Entry[T], state: State) -> None:
        """Change the state of a worker; raise `IllegalTransition` if `TRANSITIONS` forbids it.

        One that becomes idle takes the place that its `idle_since` gives it. One that is being closed
        needs an `evict_reason` first, unless it was never opened.
        """
        before = entry.state
        if state not in TRANSITIONS[before]:
            raise IllegalTransition(f"from {before.name} to {state.name}")
        if before is State.IDLE:
            first = bisect_left(self.idle, entry.idle_since, key=_idle_since)
            del self.idle[self.idle.index(entry, first)]
        elif before in self._in_state:
            self._in_state[before] -= 1
            self.probes.pop(entry, None)
        if before is State.OPENING and state is State.SERVICING:
            self._counters["started"] += 1
        if state is State.CLOSING and before is not State.OPENING:
            assert entry.evict_reason is not None
            self._counters[REASONS[entry.evict_reason].counter] += 1
            self.expiring.pop(entry, None)
        if state is State.IDLE:
            position = bisect_right(self.idle, entry.idle_since, key=_idle_since)
            self.idle.insert(position, entry)
        elif state in self._in_state:
            self._in_state[state] += 1
        entry.state = state

    def mark(self, entry: Entry[T], reason: Reason) -> None:
        """Note why a worker has to leave; evict nothing. When it may go follows from the reason."""
        self.expiring.pop(entry, None)
        entry.evict_reason = reason
        if entry.is_expiring:
            self.expiring[entry] = None

    def remove(self, entry: Entry[T]) -> None:
        """Remove a worker that has been closed. Its state must be CLOSING."""
        del self.entries[entry]
        self._in_state[entry.state] -= 1

    # -- The books -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError if the books contradict the entries. Tests call it at each step."""
        states = Counter(entry.state for entry in self.entries)
        for state, count in self._in_state.items():
            assert count == states[state], f"{count} entries were counted in {states}: {state}"
        assert self.in_use == states[State.IN_USE]
        assert len(self.idle) == len(set(self.idle)) == states[State.IDLE]
        assert all(entry.state is State.IDLE and entry in self.entries for entry in self.idle)
        assert all(entry.state is State.SERVICING for entry in self.probes)
        assert set(self.expiring) == {entry for entry in self.entries if entry.is_expiring}
        times = [entry.idle_since for entry in self.idle]
        assert times == sorted(times), f"not in the order of their last use: {times}"
        counters = self._counters
        departed = sum(counters[counter] for counter in {counter for counter, _ in REASONS.values()})
        assert counters["started"] == self.open + departed, counters
