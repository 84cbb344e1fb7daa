"""Connected sockets, for tests of what happens to their descriptors."""

from __future__ import annotations

import os
import socket

Pair = tuple[socket.socket, socket.socket]
"""Our end of a connection, and the peer's."""

PATIENCE = 0.1
"""Seconds in which nothing may happen. The kernel would report it at once."""


def pair_at(number: int) -> Pair:
    """Connect, with this number for our descriptor; it must be free."""
    ours, peer = socket.socketpair()
    if peer.fileno() == number:
        return peer, ours
    if ours.fileno() != number:
        moved = socket.socket(fileno=os.dup2(ours.fileno(), number))
        ours.close()
        return moved, peer
    return ours, peer
