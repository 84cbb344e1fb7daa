"""Servers that ask for a password: right ones, wrong ones, and that none is ever shown."""

from __future__ import annotations

import logging
import socket
import traceback
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from onlooker import Onlooker
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from strict import StrictPostgres, set_password
from timing import until

import whitepool
from whitepool.postgres import PostgresManager, TrioConnection, connect, open_pool

RIGHT = "correct horse'battery\\staple"
"""A password in need of quoting wherever it goes."""

WRONG = "tr0ub4dor and 3"

START_TIMEOUT = 4.0
"""Seconds that a refusal which is final must not wait for."""


class CountingManager(PostgresManager):
    """Knows how often it was asked for a connection."""

    attempts = 0

    async def create(self) -> TrioConnection[Any]:
        self.attempts += 1
        return await super().create()


@pytest.fixture(scope="module")
def places(superuser: Onlooker) -> None:
    """Roles and databases with other rules."""
    superuser.do("CREATE ROLE trusted LOGIN")
    superuser.do("CREATE ROLE mute NOLOGIN")
    superuser.do("CREATE DATABASE closed")
    superuser.do("CREATE DATABASE private")
    superuser.do("REVOKE CONNECT ON DATABASE private FROM public")


@pytest.fixture
def address(strict: StrictPostgres, superuser: Onlooker, places: None) -> str:
    """How to connect as a user with a password; without the password."""
    superuser.do("ALTER ROLE keeper LOGIN")
    set_password(superuser, RIGHT)
    return f"host=127.0.0.1 port={strict.port} user=keeper dbname=postgres"


async def who_am_i(connection: TrioConnection[Any]) -> str:
    cursor = await connection.execute("SELECT current_user")
    row = await cursor.fetchone()
    assert row is not None
    return str(row[0])


async def check_right(conninfo: str = "", **keywords: Any) -> None:
    """A connection and a pool are let in."""
    async with await connect(conninfo, **keywords) as connection:
        assert await who_am_i(connection) == "keeper"
        assert connection.pgconn.used_password
    async with open_pool(conninfo, pool_size=2, **keywords) as pool, pool.worker() as worker:
        assert await who_am_i(worker) == "keeper"


async def test_a_right_password_as_a_keyword(address: str) -> None:
    """A password may be given as a keyword, whatever it consists of."""
    await check_right(address, password=RIGHT)


async def test_a_right_password_in_the_connection_string(address: str) -> None:
    """A password may be part of the connection string."""
    await check_right(make_conninfo(address, password=RIGHT))


async def test_a_right_password_in_the_environment(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password may come from PGPASSWORD."""
    monkeypatch.setenv("PGPASSWORD", RIGHT)
    await check_right(address)


async def test_a_right_password_in_a_file(address: str, strict: StrictPostgres, tmp_path: Path) -> None:
    """A password may come from a file that no other user can read."""
    escaped = RIGHT.replace("\\", "\\\\").replace(":", "\\:")
    file = tmp_path / "passwords"
    file.touch(mode=0o600)
    file.write_text(f"127.0.0.1:{strict.port}:*:keeper:{escaped}\n")
    await check_right(address, passfile=str(file))


async def expect_final_refusal(
    server: StrictPostgres, conninfo: str, what: str, **keywords: Any
) -> None:
    """Opening a pool fails at once, with the server's words, after a single attempt."""
    manager = CountingManager(conninfo, **keywords)
    knocked = server.knocks
    with pytest.raises(whitepool.PoolStartError) as caught, trio.fail_after(START_TIMEOUT / 2):
        async with whitepool.open_pool(manager, pool_size=1, start_timeout=START_TIMEOUT):
            pytest.fail("the pool was opened")
    assert what in str(caught.value)
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    assert manager.attempts == 1
    assert server.knocks == knocked + 1, server.log[-20:]


async def test_a_wrong_password_is_tried_once(address: str, strict: StrictPostgres) -> None:
    """A wrong password ends the opening of a pool at the first attempt."""
    refusal = 'password authentication failed for user "keeper"'
    await expect_final_refusal(strict, address, refusal, password=WRONG)


async def test_a_wrong_password_is_tried_by_one_wave_of_starts(
    address: str, strict: StrictPostgres
) -> None:
    """Workers that are started at the same time find out together; none is started after them."""
    manager = CountingManager(address, password=WRONG)
    knocked = strict.knocks
    with trio.fail_after(5), pytest.raises(whitepool.PoolStartError):
        async with whitepool.open_pool(manager, pool_size=10, max_starting=3):
            pytest.fail("the pool was opened")
    assert manager.attempts == 3
    await until(lambda: strict.knocks == knocked + 3)  # some may be heard late: they were given up


async def test_a_missing_password_is_tried_once(
    address: str, strict: StrictPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Having no password where one is wanted ends the opening of a pool at the first attempt."""
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    monkeypatch.delenv("PGPASSWORD", raising=False)
    await expect_final_refusal(strict, address, "no password supplied")


@pytest.mark.parametrize(
    ("who", "what", "words"),
    [
        ("ghost", "postgres", 'role "ghost" does not exist'),
        ("trusted", "atlantis", 'database "atlantis" does not exist'),
        ("trusted", "closed", "pg_hba.conf rejects connection"),
        ("trusted", "private", 'permission denied for database "private"'),
    ],
)
async def test_what_will_not_come_is_tried_once(
    address: str, strict: StrictPostgres, who: str, what: str, words: str
) -> None:
    """An unknown role or database, or one that is out of bounds, ends the opening at once."""
    await expect_final_refusal(strict, make_conninfo(address, user=who, dbname=what), words)


async def test_an_unknown_role_with_a_password_is_tried_once(
    address: str, strict: StrictPostgres
) -> None:
    """A server that asks for passwords doesn't say that there is no such role; it is final anyway."""
    unknown = make_conninfo(address, user="nobody")
    await expect_final_refusal(strict, unknown, "password authentication failed", password=WRONG)


async def test_a_role_that_may_not_log_in_is_tried_once(
    address: str, strict: StrictPostgres, superuser: Onlooker
) -> None:
    """A role without the right to log in ends the opening of a pool at the first attempt."""
    superuser.do("ALTER ROLE keeper NOLOGIN")
    await expect_final_refusal(strict, address, "is not permitted to log in", password=RIGHT)


async def test_a_host_with_an_idle_address_refuses_once(address: str, strict: StrictPostgres) -> None:
    """A host that listens on one of its addresses (localhost, often) has the last word there."""
    both = make_conninfo(address, host="localhost,localhost", hostaddr="::1,127.0.0.1")
    await expect_final_refusal(strict, both, "password authentication failed", password=WRONG)


async def test_a_password_that_is_changed_later(
    address: str, strict: StrictPostgres, superuser: Onlooker
) -> None:
    """A pool survives a password that stops working, says so, and recovers when it works again."""
    with trio.fail_after(10):
        async with open_pool(address, password=RIGHT, pool_size=1, application_name="survivor") as pool:
            set_password(superuser, WRONG)
            async with pool.worker() as connection:  # those who are in are not thrown out
                assert await who_am_i(connection) == "keeper"
            superuser.do(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'survivor'"
            )
            await until(lambda: pool.statistics().start_failures > 0)
            with pytest.raises(whitepool.CheckoutTimeout) as caught:
                await pool.block_checkout(timeout=0.3)
            assert isinstance(caught.value.__cause__, whitepool.PoolStartError)
            assert "password authentication failed" in str(caught.value.__cause__)
            assert isinstance(caught.value.__cause__.__cause__, psycopg.OperationalError)
            failures = pool.statistics().start_failures
            await until(lambda: pool.statistics().start_failures > failures)
            set_password(superuser, RIGHT)
            async with pool.worker() as connection:
                assert await who_am_i(connection) == "keeper"


async def test_no_password_is_shown(
    address: str, superuser: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    """No log record, no repr and no traceback contains a password."""
    caplog.set_level(logging.DEBUG, "whitepool")
    caplog.set_level(logging.DEBUG, "psycopg")
    secret = "hunter2hunter2"
    set_password(superuser, secret)
    port = conninfo_to_dict(address)["port"]
    ways: list[tuple[str, dict[str, Any]]] = [
        (address, {"password": secret}),
        (make_conninfo(address, password=secret), {}),
        (f"postgresql://keeper:{secret}@127.0.0.1:{port}/postgres", {}),
    ]
    said: list[str] = []
    for conninfo, keywords in ways:
        manager = PostgresManager(conninfo, **keywords)
        said += [repr(manager), str(manager)]
        async with whitepool.open_pool(manager, pool_size=1) as pool:
            resource = await pool.block_checkout()
            connection = resource.get()
            said += [repr(pool), str(pool), repr(resource), repr(connection), str(connection)]
            said += [repr(connection.info), connection.info.dsn, repr(connection.info.get_parameters())]
            said.append(repr(pool.statistics()))
            set_password(superuser, WRONG)
            pool.destroyed(resource)
            said.append(repr(resource))
            await until(lambda: pool.statistics().start_failures > 0)
            with pytest.raises(whitepool.CheckoutTimeout) as timed_out:
                await pool.block_checkout(timeout=0.05)
            said += traceback.format_exception(timed_out.value)
        with pytest.raises(psycopg.OperationalError) as refused:
            await connect(conninfo, **keywords)
        said += traceback.format_exception(refused.value)
        with pytest.raises(whitepool.PoolStartError) as not_opened:
            async with whitepool.open_pool(manager, pool_size=1):
                pass
        said += traceback.format_exception(not_opened.value)
        set_password(superuser, secret)
    said += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert "start_failed" in caplog.text
    assert [words for words in said if secret in words] == []


@pytest.mark.parametrize(
    "conninfo",
    [
        "user=keeper password={secret} with blanks",
        "user=keeper password= {secret}=x",
        "user=keeper password='{secret}",
        "postgresql://keeper:{secret}%zz@127.0.0.1/postgres",
        "postgresql://keeper:{secret}/@[::1/postgres",
        "postgresql://keeper@127.0.0.1/postgres?passwort={secret}",
        "postgresql://keeper:{secret}/2@127.0.0.1/postgres",  # the slash ought to be %2F
        "postgresql://keeper:1@{secret}@127.0.0.1/postgres",  # the first @ ought to be %40
        "{secret}",
        "password=x {secret}",
    ],
)
async def test_a_connection_string_that_makes_no_sense_is_not_quoted(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection string that can't be right is refused, and the error doesn't quote the password."""

    def refuse(host: str, *_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)  # what is taken for a host stays in here
    secret = "hunter2hunter2"
    said: list[str] = []
    try:
        manager = PostgresManager(conninfo.format(secret=secret), connect_timeout=1)
        async with whitepool.open_pool(manager, pool_size=1, start_timeout=0.2):
            pass
    except (ValueError, whitepool.PoolStartError) as error:
        said = traceback.format_exception(error)
    assert said
    assert [words for words in said if secret in words] == []
