"""Load for a service, in a process of its own: ``python load.py URL CLIENTS``.

Each client makes one transfer after the other on a connection that it keeps, and leaves when an answer
says "Connection: close", as a load balancer does. Prints what became of every transfer, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from uuid import uuid4

import httpx
import trio

BOUND = 30
"""Seconds after which clients that are not told to leave do so all the same."""


async def make_transfers(url: str, outcomes: dict[str, list[str]]) -> None:
    """Be one client."""
    async with httpx.AsyncClient(base_url=url, timeout=BOUND, verify=False) as http:
        while True:
            id = str(uuid4())
            order = {"payer": 1, "payee": 2, "amount": 1}
            try:
                response = await http.put(f"/transfers/{id}", json=order)
            except httpx.TransportError as error:
                outcomes[type(error).__name__].append(id)
                return
            outcomes[str(response.status_code)].append(id)
            if response.headers.get("connection") == "close":
                return


async def main(url: str, clients: int) -> None:
    outcomes: dict[str, list[str]] = defaultdict(list)
    with trio.move_on_after(BOUND) as bound:
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(make_transfers, url, outcomes)
    if bound.cancelled_caught:
        outcomes["not told to leave"] = []
    print(json.dumps(outcomes))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))
