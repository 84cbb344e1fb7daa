"""When to send a waiting task away early, so that those who are served have time left.

First come, first served collapses under overload: everybody waits until their time is nearly up, and
what they are given comes too late to be of use. Controlled delay (CoDel: Nichols and Jacobson,
"Controlling Queue Delay", 2012; Elixir's DBConnection queues by it) tells a line that stands from a
burst that passes, by looking at how long those have waited who are served, not at how many there are.

Here everybody in line is looked at by the measure of their own timeout: `patience` is the share of it
that they may have to wait, half of that is a period, and they are looked at after each. Who has waited
for two periods knows that nobody was served quickly in the second: the line is first come, first
served. What is left to ask is whether it `stands`. So the callers' timeouts are the only measure.
"""

from __future__ import annotations


def stands(flowed: bool, joined: int, served: int) -> bool:
    """Say whether a line stands that so many joined in a period in which so many were served.

    Then it is long because too much is asked, and will be longer when everybody now in it has gone.
    A line that drains does not stand, and neither does one where nobody is served at all: sending
    somebody away would help nobody. After a stall it takes one more period to tell, as the first may
    have been stalled for most of it: in that before, it must have `flowed`.
    """
    return flowed and joined > served > 0
