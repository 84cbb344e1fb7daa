"""A hundred pools share a server: no herd, no starvation, no lasting collapse, no wave of retirements.

The pools are the real ones; the server is a model, and each simulation is the same for its seed. With
each promise goes what it is worth: without the precaution that keeps it, the same scene breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from statistics import mean

import pytest
import trio
import trio.testing
from timing import alarm

from benchmarks import fleets
from benchmarks.fleets import per_window, without_backoff, without_jitter
from benchmarks.model_server import ModelServer, ServerFull, ServerGone, open_fleet, simulate
from benchmarks.sizes import TASKS, Query, predict, serve, simulated

POOLS, SIZE = 100, 5
DOWN_FOR = 4.0
LONGEST_PAUSE = 0.8
"""Seconds between two attempts, at most, while the server is away."""


@pytest.fixture(autouse=True)
def no_endless_simulation() -> Iterator[None]:
    with alarm(120):
        yield


# -- A restart -----------------------------------------------------------------------------------------


@cache
def restarted(without: Callable[[], AbstractContextManager[None]] = nullcontext) -> fleets.Restart:
    with without():
        return simulate(partial(fleets.restart, POOLS, size=SIZE, down_for=DOWN_FOR))


def most_at_once(result: fleets.Restart) -> int:
    """Return the most attempts in 10 ms, from two seconds before the server returns."""
    return max(per_window(result.attempts, 0.01, -2, 1))


def attempts_a_second(result: fleets.Restart) -> float:
    """Return the attempts of each pool in a second of the server's absence, after the first two."""
    return sum(-2 < time < 0 for time in result.attempts) / 2 / POOLS


def test_no_herd_at_the_return_of_a_server() -> None:
    """Attempts do not come in step: no more than a third of the pools try within 10 ms."""
    assert most_at_once(restarted()) <= POOLS / 3


def test_without_jitter_there_is_a_herd() -> None:
    """All pools try at once, and then all open the rest of their connections at once."""
    assert most_at_once(restarted(without_jitter)) >= POOLS


def test_a_server_that_is_away_is_asked_seldom() -> None:
    """At most three times a second by each pool."""
    assert attempts_a_second(restarted()) <= 3


def test_without_backoff_it_is_asked_all_the_time() -> None:
    assert attempts_a_second(restarted(without_backoff)) > 30


def test_no_pool_is_left_behind_by_a_restart() -> None:
    """The last pool serves after the longest pause and the time that the server takes for all, at most,
    and is whole then, too. No attempt was in vain."""
    result = restarted()
    assert len(result.served) == len(result.whole) == POOLS
    assert max(result.served) <= LONGEST_PAUSE + result.floor
    assert max(result.whole) <= LONGEST_PAUSE + result.floor
    assert sum(time > 0 for time in result.attempts) == POOLS * SIZE


# -- Lifetimes -----------------------------------------------------------------------------------------


def fullest_window(without: Callable[[], AbstractContextManager[None]] = nullcontext) -> float:
    """Return how many times the mean are replaced in the fullest 10 s of half an hour."""
    with without():
        times = simulate(partial(fleets.lifetimes, POOLS, max_lifetime=600.0, length=1810.0))
    counts = per_window(times, 10, 0, 1810)
    assert sum(counts) >= 2 * POOLS * SIZE
    return max(counts) / mean(counts)


def test_old_connections_are_replaced_one_after_the_other() -> None:
    """Connections that were opened together don't end together: nowhere are there twice as many as on
    average."""
    assert fullest_window() <= 2


def test_without_jitter_they_are_replaced_together() -> None:
    assert fullest_window(without_jitter) > 50


# -- A spike -------------------------------------------------------------------------------------------

SPIKE = (3.0, 15.0)
KNOWN = 9.0
"""By then, three timeouts after its beginning, each pool knows that this is no burst."""
LENGTH = 28.0


@cache
def spiked(patience: float, cancels: bool) -> fleets.Spike:
    """Triple the load of a hundred pools of two connections for twelve seconds.

    That many connections are right for the server: all of them at work, each answers in half a second,
    a quarter of the deadline.
    """
    scene = partial(
        fleets.spike,
        POOLS,
        size=2,
        spike=SPIKE,
        length=LENGTH,
        patience=patience,
        cancels=cancels,
    )
    return simulate(scene)


@pytest.mark.parametrize("cancels", [True, False])
def test_a_spike_leaves_no_collapse_behind(cancels: bool) -> None:
    """As soon as the pools know of the spike, the server does little that is of no use, and afterwards
    all load is served again, although clients repeat what has failed. That holds whether or not the
    server takes requests to cancel what its clients have given up."""
    result = spiked(0.4, cancels)
    assert result.goodput(KNOWN, SPIKE[1]) >= 0.9
    assert result.goodput(LENGTH - 8, LENGTH) >= 0.65  # the load is 0.7


def test_without_shedding_the_collapse_lasts() -> None:
    """The load is the usual one again, but the repetitions keep the queues full."""
    result = spiked(1.0, True)
    assert result.goodput(KNOWN, SPIKE[1]) < 0.5
    assert result.goodput(LENGTH - 8, LENGTH) < 0.2


def fair_share(result: fleets.Spike) -> float:
    """Return which part of their share of the answers in the spike the unluckiest pools have got.

    They are a tenth of all, as it is chance what a single one gets: between a third and a half.
    """
    unluckiest = sorted(counts["during"] for counts in result.by_pool)[: POOLS // 10]
    return sum(unluckiest) / len(unluckiest) * POOLS / (result.capacity * (SPIKE[1] - SPIKE[0]))


def test_no_pool_starves_in_a_spike() -> None:
    """They get half of their share of the server, at least, the time until they know included."""
    assert fair_share(spiked(0.4, True)) >= 1 / 2


def test_without_shedding_pools_starve() -> None:
    assert fair_share(spiked(1.0, True)) < 1 / 4


# -- Sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_model_of_sizes_is_what_pools_do(size: int, elsewhere: float) -> None:
    """Eight pools beside eight cores, always busy: throughput, and both waits, are as predicted."""
    query = Query(core=0.01, elsewhere=elsewhere)
    model = predict(8, 8 * size, 8 * TASKS, query)
    found = simulated(8, 8, size, query)
    assert found.per_second == pytest.approx(model.per_second, rel=0.05)
    assert found.inside == pytest.approx(model.inside, rel=0.05)
    assert found.waited == pytest.approx(model.waited, rel=0.05)


def test_what_the_model_says() -> None:
    """Throughput is that of the connections, or that of the cores, and the rest waits."""
    assert predict(8, 4, 8, Query(core=0.01)).per_second == pytest.approx(400)
    assert predict(8, 32, 64, Query(core=0.01)).per_second == pytest.approx(800)
    assert predict(8, 32, 64, Query(core=0.01)).inside == pytest.approx(0.04)  # 32 x 0.01 / 8
    assert predict(1, 1, 2, Query(core=0.01, elsewhere=0.03)).per_second == pytest.approx(25)
    assert predict(1, 1, 2, Query(core=0.01, elsewhere=0.03)).waited == pytest.approx(0.04)


@cache
def waited(size: int) -> float:
    """Return which share of the requests waits, under the load of `docs/howto/sizing.md`."""
    scene = partial(serve, 12, size, 1_500, Query(core=0.004, elsewhere=0.012), cores=8, seconds=10)
    return simulate(scene).waited


def test_twice_the_average_is_enough() -> None:
    """The load keeps two connections of each pool busy on average. With four, few requests wait."""
    assert waited(4) < 1 / 4


def test_the_average_is_not_enough() -> None:
    assert waited(2) > 3 / 4


# -- The model -----------------------------------------------------------------------------------------


def test_a_simulation_is_the_same_each_time() -> None:
    """For a seed; and another one is another simulation."""
    scene = partial(fleets.restart, 5)
    assert simulate(scene) == simulate(scene)
    assert simulate(scene) != simulate(scene, seed=8)


def test_sessions_share_the_cores() -> None:
    """Three queries on two cores slow each other down while all three are there; no work is lost."""
    ends = {}

    async def main() -> None:
        server = ModelServer(cores=2, connect_work=0)

        async def query(work: float) -> None:
            connection = await server.connect()
            begun = trio.current_time()
            await connection.query(work)
            ends[work] = trio.current_time() - begun

        async with trio.open_nursery() as nursery:
            for work in (1, 2, 3):
                nursery.start_soon(query, work)

    simulate(main)
    # For 1.5 s each gets two thirds of a core. Then two are left, and each has a core of its own.
    assert ends == pytest.approx({1: 1.5, 2: 2.5, 3: 3.5})


def test_work_that_is_cancelled_is_given_up_or_runs_on() -> None:
    """A server that does not cancel works on, and keeps the place of the session until it is done."""

    async def main(cancels: bool) -> tuple[int, bool]:
        server = ModelServer(cores=1, cancels=cancels)
        connection = await server.connect()
        with trio.move_on_after(0.5):
            await connection.query(10)
        is_usable = connection.is_alive
        connection.close()
        await trio.sleep(9)
        held = len(server.sessions)
        await trio.sleep(1)
        assert not server.sessions
        return held, is_usable

    assert simulate(main, True) == (0, True)
    assert simulate(main, False) == (1, False)


def test_a_model_server_is_full() -> None:
    """It refuses the session that is one too many, and has room again when one has left."""

    async def main() -> None:
        server = ModelServer(max_connections=1)
        connection = await server.connect()
        with pytest.raises(ServerFull):
            await server.connect()
        connection.close()
        await server.connect()
        assert (len(server.attempts), len(server.opened), len(server.refused)) == (3, 2, 1)

    simulate(main)


def test_a_model_server_stops_freezes_and_vanishes() -> None:
    """A query fails when the server stops; waits, while it is frozen; and never ends, if it has
    vanished. A fleet is whole again after each of these."""

    async def main() -> None:
        server = ModelServer()
        async with open_fleet(server, pools=2, pool_size=3, max_overflow=0) as fleet:
            assert (fleet.alive, len(server.sessions)) == (6, 6)
            async with trio.open_nursery() as nursery:
                async with fleet.sessions[0].worker() as connection:
                    nursery.start_soon(server.restart, 2)
                    with pytest.raises(ServerGone):
                        await connection.query(1)
                await trio.sleep(1)
                assert fleet.alive == 0
            await trio.sleep(2)
            assert fleet.alive == len(server.sessions) == 6

            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.pause, 2)
                async with fleet.sessions[0].worker() as connection:
                    began = trio.current_time()
                    await trio.lowlevel.checkpoint()
                    await connection.query(1)
                    assert trio.current_time() - began == pytest.approx(3)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(server.fail_over, 2, silently=True))
                async with fleet.sessions[0].worker() as connection:
                    with pytest.raises(trio.TooSlowError), trio.fail_after(60):
                        await connection.query(1)
            await trio.sleep(1)
            assert fleet.alive == len(server.sessions) == 6

    simulate(main)


async def test_the_model_runs_on_trios_mock_clock_too(autojump_clock: trio.testing.MockClock) -> None:
    """It is slower there, and does the same."""
    server = ModelServer(cores=1)
    async with open_fleet(server, pools=2, pool_size=1, max_overflow=0) as fleet:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for session in fleet.sessions:
                async with session.worker() as connection:
                    nursery.start_soon(connection.query, 1)
        assert trio.current_time() - began == pytest.approx(2)
