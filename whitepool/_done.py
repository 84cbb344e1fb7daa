"""What a plain function returns that must be awaited: nothing, at once."""

from __future__ import annotations

from collections.abc import Generator


class Done:
    """An awaitable of nothing, for an ``__aexit__`` that has done its work when it was called.

    A coroutine would do its work when it is awaited, and a Ctrl-C may strike between the two.
    """

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


DONE = Done()
