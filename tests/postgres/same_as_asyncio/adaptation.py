"""How values are adapted: dumpers, loaders, and the types that PostgreSQL and Python share."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Iterable
from decimal import Decimal
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import Any

import psycopg
from psycopg import sql
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap, Dumper
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.json import Json, Jsonb, set_json_loads
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range
from psycopg.types.string import TextLoader

from .laboratory import Connection, See, attempt, rows, scenario, scenario_of_types, state


class Loud(str):
    """A type that is dumped by a dumper of its own."""


class LoudDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        return str(obj).upper().encode()


class LoudLoader(TextLoader):
    def load(self, data: Any) -> str:
        return f"<{super().load(data)!r}>"


@scenario
async def adaptation(conn: Connection, dsn: str, see: See) -> None:
    """Dumpers and loaders of the connection, of a cursor, and of a context given to connect."""
    cursor = conn.cursor()
    cursor.adapters.register_loader("text", LoudLoader)
    await cursor.execute("SELECT 'a'::text")
    see("a cursor's", loaded=await cursor.fetchone(), elsewhere=await rows(conn, "SELECT 'a'::text"))
    conn.adapters.register_loader("text", LoudLoader)
    conn.adapters.register_dumper(Loud, LoudDumper)
    see(dumped=await (await conn.execute("SELECT %s::text", (Loud("a"),))).fetchall())
    see(literal=sql.Literal(Loud("b")).as_string(conn), context=conn.connection is conn)
    context = AdaptersMap(psycopg.adapters)
    context.register_loader("int4", LoudLoader)
    given: AdaptContext
    for name, given in (("connection", conn), ("cursor", cursor)):
        async with await type(conn).connect(dsn, context=given) as other:
            see(f"the context of a {name}", loaded=await rows(other, "SELECT 'a'::text"))
    set_json_loads(lambda data: ["mine", data], conn)
    see(json=await rows(conn, """SELECT '{"a": 1}'::json"""))


async def send_and_fetch(conn: Connection, see: See, values: Iterable[object]) -> None:
    """Send values and fetch them again, in text and in binary."""
    for value in values:
        for form in ("%s", "%t", "%b"):
            for binary in (False, True):
                query = f"SELECT {form}, pg_typeof({form})::text".encode()
                cursor = conn.cursor(binary=binary)
                found = await attempt(cursor.execute(query, (value, value)))
                fetched = await cursor.fetchone() if cursor.description else found
                where = re.sub(r" at 0x\w+", "", f"{value!r} as {form}, binary {binary}")
                see(where, fetched=repr(fetched))
                await conn.rollback()


@scenario_of_types
async def plain_types(conn: Connection, dsn: str, see: See) -> None:
    """None, truth, numbers, text and bytes."""
    large = bytes(range(256)) * 1000
    cursor = await conn.execute("SELECT %s::bytea, octet_length(%s)", (large, large))
    values: tuple[Any, ...] = (
        None,
        True,
        1,
        2**40,
        2**70,
        -1.5,
        float("inf"),
        Decimal("1.10"),
        Decimal("NaN"),
        "ü'\\",
    )
    await send_and_fetch(conn, see, (*values, b"\0\xff", bytearray(b"x"), memoryview(b"y"), ""))
    see(large_bytes_are_equal=await cursor.fetchone() == (large, len(large)))


@scenario_of_types
async def times(conn: Connection, dsn: str, see: See) -> None:
    """Dates, times, intervals and time zones, also those that Python can't represent."""
    zone = dt.timezone(dt.timedelta(hours=5, minutes=30))
    moment = dt.datetime(2020, 2, 29, 12, 30, 15, 123456)
    values: tuple[Any, ...] = (
        moment,
        moment.replace(tzinfo=zone),
        moment.date(),
        moment.time(),
        dt.timedelta(-3, 5, 7),
    )
    await send_and_fetch(conn, see, (*values, moment.timetz().replace(tzinfo=zone)))
    await conn.execute("SET timezone TO 'Europe/Rome'")
    query = "SELECT '2020-07-01 12:00+00'::timestamptz, '24:00'::time::text"
    see("in Rome", times=await rows(conn, query), timezone=str(conn.info.timezone))
    for wrong in (
        "'infinity'::date",
        "'10000-01-01'::timestamp",
        "'24:00'::time",
        "'1 month'::interval",
    ):
        cursor = await conn.execute(f"SELECT {wrong}".encode())
        see(wrong, fetched=await attempt(cursor.fetchone()))


@scenario_of_types
async def uuids_networks_and_json(conn: Connection, dsn: str, see: See) -> None:
    """UUID, inet, cidr, JSON and JSONB."""
    values: tuple[Any, ...] = (
        uuid.UUID(int=7),
        ip_address("10.0.0.1"),
        ip_network("10.0.0.0/8"),
        ip_address("::1"),
    )
    document = {"a": [1, None, "ü"], "b": {"c": 1.5}}
    await send_and_fetch(conn, see, (*values, Json(document), Jsonb(document)))
    see(plain_dict=await attempt(conn.execute("SELECT %s", (document,))), state=state(conn))


@scenario_of_types
async def arrays(conn: Connection, dsn: str, see: See) -> None:
    """Arrays: empty, nested, with nulls, of several types, and uneven ones."""
    values: tuple[Any, ...] = (
        [],
        [1, 2],
        [1, None],
        [[1, 2], [3, 4]],
        ["a,b", '"', "NULL", None],
        [dt.date(2020, 1, 1)],
        [uuid.UUID(int=1)],
        [2**40, 1],
        [1, "x"],
        [[1], [2, 3]],
    )
    await send_and_fetch(conn, see, values)


@scenario_of_types
async def ranges(conn: Connection, dsn: str, see: See) -> None:
    """Ranges and multiranges."""
    day = dt.date(2020, 1, 1)
    values: list[object] = [Range(1, 5), Range(1, 5, "[]"), Range(None, 5), Range(empty=True)]
    values += [Range(day, None), Range(Decimal(1), Decimal("1.5"), "(]"), [Range(1, 2)]]
    values += [Multirange([Range(1, 2), Range(5, 9)]), Multirange([])]
    await send_and_fetch(conn, see, values)


class Mood(Enum):
    """The Python side of an enum."""

    GOOD = "fine"
    BAD = "so so"


@scenario_of_types
async def enums_and_composites(conn: Connection, dsn: str, see: See) -> None:
    """Types that are looked up on the server: enums and composites."""
    await conn.execute("CREATE TYPE mood AS ENUM ('fine', 'so so')")
    await conn.execute("CREATE TYPE point3 AS (x int, y text, mood mood)")
    await conn.commit()
    enum_info = await EnumInfo.fetch(conn, "mood")
    assert enum_info is not None
    register_enum(enum_info, conn, Mood, mapping={mood: mood.value for mood in Mood})
    composite_info = await CompositeInfo.fetch(conn, "point3")
    assert composite_info is not None
    register_composite(composite_info, conn)
    assert composite_info.python_type is not None
    value = composite_info.python_type(1, "a,(b", Mood.GOOD)
    for binary in (False, True):
        cursor = conn.cursor(binary=binary)
        await cursor.execute(
            "SELECT %s::mood, %s::mood[], %s::point3, ARRAY[%s::point3]",
            (Mood.BAD, list(Mood), value, value),
        )
        see(f"binary {binary}", fetched=repr(await cursor.fetchone()))
    see(labels=enum_info.labels, fields=composite_info.field_names)
    see(no_such_type=await attempt(EnumInfo.fetch(conn, "nowhere")), state=state(conn))
    await conn.rollback()
    await conn.execute("DROP TYPE point3, mood")
    await conn.commit()
