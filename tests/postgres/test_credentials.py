"""Credentials that expire: a `conninfo` that is called before each connection is opened."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import psycopg
import pytest
import trio
from connections import Connection, ask, backend
from onlooker import Onlooker
from psycopg.conninfo import make_conninfo
from strict import StrictPostgres, set_password
from timing import until

import whitepool
from whitepool.postgres import PostgresManager, open_pool

FIRST = "the first password"
STALE = "hunter2hunter2"


class Secret:
    """What a secrets service says: how to connect, with the password that it knows at the moment."""

    def __init__(self, address: str, password: str) -> None:
        self._address = address
        self.password = password
        self.asked = 0

    def plain(self) -> str:
        self.asked += 1
        return make_conninfo(self._address, password=self.password)

    async def slow(self) -> str:
        await trio.lowlevel.checkpoint()
        return self.plain()


@pytest.fixture
def secret(strict: StrictPostgres, superuser: Onlooker) -> Secret:
    """What lets you in as `keeper`."""
    set_password(superuser, FIRST)
    return Secret(f"host=127.0.0.1 port={strict.port} user=keeper dbname=postgres", FIRST)


# -- Asking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "slow"])
async def test_it_is_asked_before_each_connection(secret: Secret, kind: str) -> None:
    """Each connection is opened with a fresh answer, plain or async; a checkout needs none."""
    pool = open_pool(getattr(secret, kind), pool_size=2, max_overflow=0)
    assert secret.asked == 0
    async with pool as session:
        assert secret.asked == 2
        for _ in range(5):
            async with session.connection() as connection:
                assert await ask(connection, "SELECT current_user") == "keeper"
        assert secret.asked == 2
        session.destroyed(session.checkout_nowait())
        await until(lambda: session.statistics().idle == 2)
        assert secret.asked == 3


async def test_it_is_asked_once_for_all_hosts(
    secret: Secret, strict: StrictPostgres, refusing_port: int
) -> None:
    """One answer names the hosts, and serves for the attempts at all of them."""
    ports = f"{refusing_port},{strict.port}"
    async with open_pool(secret.plain, host="127.0.0.1,127.0.0.1", port=ports, pool_size=1):
        assert secret.asked == 1


async def test_keywords_have_precedence(secret: Secret, superuser: Onlooker) -> None:
    """A keyword wins over the answer, as it does over a connection string."""
    set_password(superuser, "another")
    async with (
        open_pool(secret.plain, pool_size=1, password="another") as session,
        session.connection() as connection,
    ):
        assert await ask(connection, "SELECT current_user") == "keeper"


async def test_configure_and_reset_work_as_ever(secret: Secret) -> None:
    """A connection that was opened with an answer is configured, and reset after each client."""

    async def configure(connection: Connection) -> None:
        await connection.execute("SET work_mem = '5MB'")

    async with open_pool(
        secret.slow, configure=configure, reset="session", autocommit=True, pool_size=1, max_overflow=0
    ) as session:
        seen = set()
        for _ in range(2):
            async with session.worker() as connection:
                seen.add(backend(connection))
                assert await ask(connection, "SHOW work_mem") == "5MB"
                await connection.execute("SET work_mem = '6MB'")
        assert len(seen) == 1


# -- Answers that are of no use -------------------------------------------------------------------


def test_what_is_wrong_with_the_callable_is_said_at_once() -> None:
    """A callable that wants arguments is a TypeError, and the keywords are checked with it, too."""
    wants_one: Any = lambda worker: "dbname=shop"  # noqa: E731
    with pytest.raises(TypeError, match="conninfo is called without arguments: missing"):
        PostgresManager(wants_one)
    with pytest.raises(ValueError, match="did you mean password"):
        open_pool(lambda: "dbname=shop", pasword="x")  # type: ignore[call-overload]


async def _none() -> None: ...


@pytest.mark.parametrize(
    ("answer", "kind"), [(lambda: b"dbname=shop", "bytes"), (lambda: 1, "int"), (_none, "NoneType")]
)
async def test_an_answer_that_is_no_text(answer: Any, kind: str) -> None:
    """It is a mistake in the program, and ends opening at once."""
    with (
        trio.fail_after(5),
        pytest.raises(whitepool.PoolStartError, match=f"conninfo must return a str, not {kind}"),
    ):
        async with open_pool(answer):
            pytest.fail("the pool was opened")


@pytest.mark.parametrize(
    "answer",
    [
        f"user=keeper password={STALE} with blanks",
        f"postgresql://keeper:{STALE}%zz@127.0.0.1/postgres",
        f"user=keeper passwort={STALE}",
        f"postgresql://keeper:1@{STALE}@127.0.0.1/postgres",
    ],
)
async def test_an_answer_that_makes_no_sense(answer: str) -> None:
    """It ends opening at once, and the error quotes nothing of it: it may be the password."""
    with trio.fail_after(5), pytest.raises(whitepool.PoolStartError, match="conninfo is not") as caught:
        async with open_pool(lambda: answer):
            pytest.fail("the pool was opened")
    assert isinstance(caught.value.__cause__, ValueError)
    assert STALE not in "".join(traceback.format_exception(caught.value))


async def test_a_callable_that_fails_for_a_while(
    secret: Secret, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is a failed start, which the log names; the next attempt asks again."""

    async def conninfo() -> str:
        answer = secret.plain()
        if secret.asked == 1:
            raise LookupError("the secrets service is down")
        return answer

    async with open_pool(conninfo, pool_size=1) as session:
        now = session.statistics()
        assert (secret.asked, now.started, now.start_failures) == (2, 1, 1)
    assert "LookupError: the secrets service is down" in caplog.text
    assert FIRST not in caplog.text


async def test_a_callable_that_fails_and_knows_that_it_always_will() -> None:
    """It may raise PoolStartError, as `create` may: opening fails at once."""

    def conninfo() -> str:
        raise whitepool.PoolStartError("no such secret")

    with trio.fail_after(5), pytest.raises(whitepool.PoolStartError, match="no such secret"):
        async with open_pool(conninfo):
            pytest.fail("the pool was opened")


async def test_a_callable_that_takes_too_long(autojump_clock: trio.abc.Clock) -> None:
    """It is cancelled after `start_timeout`."""
    cancelled = 0

    async def conninfo() -> str:
        nonlocal cancelled
        try:
            await trio.sleep(1000)
        finally:
            cancelled += 1
        raise AssertionError

    begun = trio.current_time()
    with pytest.raises(whitepool.PoolStartError, match="0 of 1 workers started within 3 s"):
        async with open_pool(conninfo, pool_size=1, start_timeout=3):
            pytest.fail("the pool was opened")
    assert trio.current_time() == begun + 3
    assert cancelled == 1


async def test_a_callable_does_not_hold_up_the_end_of_the_pool(
    autojump_clock: trio.abc.Clock,
) -> None:
    """When the pool is closed, a callable that has not answered yet is cancelled."""

    async def conninfo() -> str:
        await trio.sleep(1000)
        raise AssertionError

    async with open_pool(conninfo, lazy=True, pool_size=1) as session:
        with pytest.raises(whitepool.CheckoutTimeout):
            await session.block_checkout(timeout=1)
        assert session.statistics().starting == 1
        begun = trio.current_time()
    assert trio.current_time() == begun


# -- Passwords that change ------------------------------------------------------------------------


async def test_a_refused_password_ends_opening(secret: Secret, strict: StrictPostgres) -> None:
    """An answer that the server refuses ends opening at the first attempt."""
    secret.password = STALE
    knocked = strict.knocks
    with (
        trio.fail_after(5),
        pytest.raises(whitepool.PoolStartError, match="password authentication failed") as caught,
    ):
        async with open_pool(secret.slow, pool_size=1):
            pytest.fail("the pool was opened")
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    assert secret.asked == 1
    assert strict.knocks == knocked + 1


async def test_a_password_that_is_refused_later(
    secret: Secret, superuser: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool tries again, each time with a fresh answer, and shows no password to anyone."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    manager = PostgresManager(secret.plain)
    async with whitepool.open_pool(manager, pool_size=1, max_overflow=0) as session:
        set_password(superuser, STALE)
        session.destroyed(session.checkout_nowait())
        with pytest.raises(whitepool.CheckoutTimeout) as caught:
            await session.block_checkout(timeout=0.3)
        assert "password authentication failed" in str(caught.value.__cause__)
        said += traceback.format_exception(caught.value)
        asked = secret.asked
        await until(lambda: secret.asked > asked)
        secret.password = STALE
        async with session.worker() as connection:
            assert await ask(connection, "SELECT current_user") == "keeper"
        said += [repr(manager), repr(session), repr(session.statistics())]
    said += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert "start_failed" in caplog.text
    assert [words for words in said if FIRST in words or STALE in words] == []


CLIENTS = 20
POOL_SIZE = 5
MAX_STARTING = 4
ROTATIONS = 3
MAX_LIFETIME = 0.2


class Requests:
    """Many clients of one pool. Each makes one request after the other, with the default timeout."""

    def __init__(self, session: whitepool.postgres.PostgresSession[Any]) -> None:
        self.served = 0
        self.lost = 0
        """Requests whose connection ended in the middle; a new connection can't know their answer."""
        self._session = session

    async def client(self) -> None:
        # If there is no connection to be had, that is an error of the test.
        while True:
            async with self._session.worker() as connection:
                try:
                    await connection.execute("SELECT pg_sleep(0.002)")
                except psycopg.OperationalError:
                    self.lost += 1
                else:
                    self.served += 1

    async def until_refused(self) -> None:
        """Return when one more connection could not be opened."""
        failures = self._session.statistics().start_failures
        await until(lambda: self._session.statistics().start_failures > failures)

    async def serve_more(self) -> None:
        """Return when each client may have had its turn several times."""
        enough = self.served + 5 * CLIENTS
        await until(lambda: self.served > enough)


@pytest.fixture(params=["at once", "late"])
def is_late(request: pytest.FixtureRequest) -> bool:
    """Whether the secrets service learns of a new password only after the server has it."""
    return bool(request.param == "late")


async def _under_load(
    secret: Secret,
    rotate: Callable[[Requests, str], Awaitable[None]],
    **options: Any,
) -> tuple[Requests, whitepool.PoolStatistics]:
    """Change the password several times under load; each time the pool needs new connections.

    Before the next change, more of them have been opened than can have got in with the old password.
    """

    def has_started(connections: int) -> bool:
        return bool(session.statistics().started >= connections)

    async with open_pool(
        secret.slow,
        pool_size=POOL_SIZE,
        max_overflow=5,
        max_starting=MAX_STARTING,
        autocommit=True,
        **options,
    ) as session:
        requests = Requests(session)
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(requests.client)
            await requests.serve_more()
            for number in range(ROTATIONS):
                before = session.statistics().started
                await rotate(requests, f"{number} is new")
                await until(partial(has_started, before + POOL_SIZE + MAX_STARTING))
                await requests.serve_more()
            nursery.cancel_scope.cancel()
        return requests, session.statistics()


async def test_a_password_that_changes_while_connections_expire(
    secret: Secret, superuser: Onlooker, is_late: bool
) -> None:
    """No request fails; while an old answer is refused, the old connections serve on."""

    async def rotate(requests: Requests, password: str) -> None:
        set_password(superuser, password)
        if is_late:
            await requests.until_refused()
            await trio.sleep(2 * MAX_LIFETIME)  # all of them have expired by now
            await requests.serve_more()
        secret.password = password

    requests, now = await _under_load(secret, rotate, max_lifetime=MAX_LIFETIME)
    assert requests.lost == 0
    assert (now.timeouts, now.overloads, now.lost) == (0, 0, 0)


async def test_a_password_that_changes_as_connections_are_lost(
    secret: Secret, superuser: Onlooker, is_late: bool
) -> None:
    """Each connection that the server ends costs its own request at most; all others are served."""
    ended = 0

    async def rotate(requests: Requests, password: str) -> None:
        nonlocal ended
        set_password(superuser, password)
        ended += superuser.ask(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'keeper'"
        )
        if is_late:
            await requests.until_refused()
        secret.password = password

    requests, now = await _under_load(secret, rotate)
    assert ended >= ROTATIONS
    # It may be none: the pool can notice that a connection has ended before a client gets it.
    assert requests.lost <= ended
    assert (now.timeouts, now.overloads) == (0, 0)
