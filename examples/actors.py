"""A pool of actors: each has a mailbox, a task that reads it, and a process that does the work.

The process is a Python that evaluates expressions. Here one of them dies in the middle of a request:
its client gets an error, not silence, and the pool replaces the actor.

python examples/actors.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

import whitepool

PROGRAM = "while True: print(eval(input()), flush=True)"

Reply = trio.MemorySendChannel[str]


class Calculator:
    """An actor. Other tasks talk to it through its mailbox only."""

    def __init__(self, process: trio.Process) -> None:
        self.mailbox, self._requests = trio.open_memory_channel[tuple[str, Reply]](10)
        self._process = process

    async def run(self) -> None:
        """Answer one request after the other. Crashes when the process dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async for question, reply in self._requests:
            await self._process.stdin.send_all(f"{question}\n".encode())
            answer = b""
            while not answer.endswith(b"\n"):
                chunk = await self._process.stdout.receive_some()
                if not chunk:
                    raise ConnectionError(f"the process died of {question}")
                answer += chunk
            await reply.send(answer.decode().strip())


@asynccontextmanager
async def open_calculator() -> AsyncIterator[Calculator]:
    """The factory: it owns a nursery, so a crash of the actor's task is noticed by the pool."""
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        )
        calculator = Calculator(process)
        nursery.start_soon(calculator.run)
        yield calculator
        nursery.cancel_scope.cancel()  # this kills the process, too


async def ask(resource: whitepool.Resource[Calculator], question: str) -> str:
    """Wait for the answer, or for the end of the actor, whichever comes first."""
    calculator = resource.get()
    reply, answers = trio.open_memory_channel[str](1)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def give_up() -> None:
            await resource.lost.wait()
            nursery.cancel_scope.cancel()

        await calculator.mailbox.send((question, reply))
        answer = await answers.receive()
        nursery.cancel_scope.cancel()
        return answer
    resource.get()  # raises WorkerLost after a crash
    raise whitepool.PoolClosed("the pool was shut down before the answer came")


async def client(session: whitepool.Session[Calculator], question: str) -> None:
    resource = await session.block_checkout()
    try:
        print(f"{question} = {await ask(resource, question)}")
    except whitepool.WorkerLost as error:
        print(f"{question}: {type(error).__name__}")
    finally:
        session.checkin(resource)


async def main() -> None:
    async with whitepool.open_pool(open_calculator, pool_size=2, max_overflow=0) as session:
        for question in ("6 * 7", "exit()", "2 ** 10"):
            await client(session, question)
        print(f"{session.statistics().lost} actor was lost")


if __name__ == "__main__":
    trio.run(main)
