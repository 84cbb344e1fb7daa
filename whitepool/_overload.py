"""When to send waiting tasks away early, so that those who are served have time left.

First come, first served collapses under overload: everybody waits until their time is nearly up, and
what they are given comes too late to be of use. Controlled delay (CoDel: Nichols and Jacobson,
"Controlling Queue Delay", 2012; Elixir's DBConnection queues by it) tells a line that stands from a
burst that passes, by looking at how long those have waited who are served, not at how many there are.
"""

from __future__ import annotations

import math


class StandingLine:
    """Looks at a line from time to time, and says whether it stands.

    It stands when, for a whole period, nobody was served quickly, somebody was served, and no fewer
    tasks joined than were served. Then it is long because too much is asked, and will be as long
    when everybody now in it has gone. A line that drains does not stand, and neither does one where
    nobody is served at all: sending somebody away would help nobody. After a stall it takes one more
    period to tell: the first may have been stalled for most of it, and be draining now.

    Quickly means within half of the share of its timeout that a waiter is made to wait at the most.
    The period is as long. So the callers' timeouts are the only setting.
    """

    def __init__(self, patience: float) -> None:
        self.stands = False
        self._half_share = patience / 2
        self._began = -math.inf
        self._joined = 0
        self._served = 0
        self._flowed = False  # whether somebody was served in the period before

    def look(self, now: float, since: float, timeout: float, joined: int, served: int) -> float:
        """Take note of the longest-waiting task, and of how many have joined and been served ever.

        Returns the time of the next look.
        """
        period = self._half_share * timeout
        if now < since + period:  # served quickly, if it is served now
            self.stands = False
            self._flowed = True
            self._begin(now, joined, served)
            return since + period
        if self._began == -math.inf:
            self._begin(now, joined, served)
        elif now >= self._began + period:
            count = served - self._served
            self.stands = self._flowed and joined - self._joined >= count > 0
            self._flowed = count > 0
            self._begin(now, joined, served)
        return self._began + period

    def is_gone(self) -> None:
        """Take note that nobody waits whose patience is limited."""
        self.stands = self._flowed = False
        self._began = -math.inf

    def _begin(self, now: float, joined: int, served: int) -> None:
        self._began = now
        self._joined = joined
        self._served = served
