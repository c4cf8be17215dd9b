"""No reply waits longer than its bound, and nobody waits for what does not come.

The engine's meter off, the ledger locked, its disk full: replies go out without a cost, at the
bound, and after five of them at once; nothing is lost, and the first bill that comes ends it.
"""

import asyncio
import time

from tests.support.world import (
    BODY,
    COST_HEADERS,
    DONE,
    JSON,
    SSE,
    TOKEN,
    USAGE,
    Client,
    full_disk,
    replying,
)

BOUND_S = 0.05
# The bound of replies that should not wait at all: no machine is so busy that one takes as long.
LONG_S = 60.0


def test_a_bill_that_never_comes_delays_the_reply_by_the_bound_and_is_counted(make_world):
    world = make_world(bill_timeout_ms=round(BOUND_S * 1000))
    client = world.run(replying(JSON, [BODY], lambda: world.engine.born("r")))
    assert client.ours == {}
    assert client.body == BODY
    assert client.waited_s >= BOUND_S
    assert world.misses == 1
    assert world.rows("SELECT gpu_time_ns, cost_nanousd FROM replies") == [(None, None)]


def test_a_stream_waits_once_for_a_bill_that_never_comes(make_world):
    world = make_world(bill_timeout_ms=round(BOUND_S * 1000))
    client = world.run(replying(SSE, [TOKEN, USAGE, DONE], lambda: world.engine.born("r")))
    assert client.body == TOKEN + USAGE + DONE
    assert client.at_s[-1] - client.at_s[1] >= BOUND_S, "the wait is behind the tokens"
    assert world.misses == 1


def test_after_five_misses_nobody_waits_until_a_bill_comes(make_world):
    world = make_world(bill_timeout_ms=round(BOUND_S * 1000))

    def ask(before) -> Client:
        return world.run(replying(JSON, [BODY], before))

    def never(number: int) -> Client:
        return ask(lambda: world.engine.born(f"never-{number}"))

    assert all(never(number).waited_s >= BOUND_S for number in range(5))
    world.let_replies_wait(LONG_S)
    assert all(never(number).waited_s < LONG_S for number in range(5, 8))
    assert world.misses == 8
    # The first that comes is not waited for, the next is told.
    assert ask(lambda: world.engine.generate("a")).ours == {}
    assert world.rows("SELECT count(*) FROM requests") == [(1,)]
    deadline = time.monotonic() + 5
    while world.collector.breaker.open and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(ask(lambda: world.engine.generate("b")).ours) == len(COST_HEADERS)


def test_an_engine_whose_meter_is_off_costs_five_waits_and_no_more(make_world):
    world = make_world(bill_timeout_ms=round(BOUND_S * 1000))

    async def ask() -> list[Client]:
        clients = []
        for number in range(50):
            world.let_replies_wait(BOUND_S if number < 5 else LONG_S)
            app = replying(JSON, [BODY], lambda number=number: world.engine.born(f"r{number}"))
            clients.append(await world.ask(app))
        return clients

    clients = asyncio.run(ask())
    waits = [client.waited_s for client in clients]
    assert all(wait >= BOUND_S for wait in waits[:5])
    assert all(wait < LONG_S for wait in waits[5:])
    assert all(client.body == BODY and client.ours == {} for client in clients)
    assert len(world.rows("SELECT * FROM replies")) == 50


def test_a_locked_ledger_delays_no_reply_and_loses_nothing(make_world):
    world = make_world()
    with world.locked():
        for number in range(8):
            client = world.run(
                replying(JSON, [BODY], lambda n=number: world.engine.generate(f"r{n}"))
            )
            assert len(client.ours) == len(COST_HEADERS)
            assert client.waited_s < LONG_S
    assert world.rows("SELECT count(*), count(http_request_id) FROM requests") == [(8, 8)]


def test_a_full_disk_delays_five_replies_and_loses_nothing(make_world):
    world = make_world(bill_timeout_ms=round(BOUND_S * 1000))
    with full_disk():
        clients = []
        for number in range(8):
            world.let_replies_wait(BOUND_S if number < 5 else LONG_S)
            app = replying(JSON, [BODY], lambda n=number: world.engine.generate(f"r{n}"))
            clients.append(world.run(app))
        stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("s")))
        assert world.runtime.writer.journaled == 0
        assert "No space left" in world.runtime.writer.last_error
    assert all(client.ours == {} for client in clients)
    assert stream.body == USAGE + DONE
    assert all(client.waited_s >= BOUND_S for client in clients[:5])
    assert all(client.waited_s < LONG_S for client in (*clients[5:], stream))
    assert world.rows("SELECT count(*), count(http_request_id) FROM requests") == [(9, 9)]
    assert world.rows("SELECT count(*) FROM replies") == [(9,)]
    assert world.runtime.writer.dropped == 0
    assert len(world.run(replying(JSON, [BODY], lambda: world.engine.generate("z"))).ours) == len(
        COST_HEADERS
    )
