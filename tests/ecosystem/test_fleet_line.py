"""A ledger sends by a line that is cut in its transactions: all arrives, once.

Method: as in test_fleet.py; the line is a real one, and the database is killed, full or slow.
"""

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ecosystem.line import Cut, Line, line_to
from tests.ecosystem.postgresql import Server, postgresql
from tests.ecosystem.test_fleet import records_of, send, write
from tests.ecosystem.test_postgresql import _figures, rows
from tests.support.fleet import sent
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database, open_to_read
from vllm_cost_meter.ledger.fleet.sender import FleetSender, open_fleet, parse_fleet_url


@pytest.fixture
def line(server: Server) -> Iterator[Line]:
    with line_to(server.socket) as line:
        yield line


def send_all(ledger: str, fleet: str) -> int:
    """Send until nothing waits; return how often that failed."""
    sender = FleetSender(ledger, fleet, shipment_bytes_max=1)
    failures = 0
    while True:
        try:
            while sender.step():
                pass
            sender.end()
            break
        except LedgerError:
            failures += 1
            assert failures < 1_000
    sender.close()
    return failures


@pytest.mark.parametrize("place", Cut)
def test_a_transaction_that_is_cut_counts_once(
    tmp_path: Path, url: str, line: Line, place: Cut
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    before, after = records_of("before"), records_of("after")
    write(own, *before)
    # The tables, the join, and what comes after it: each is cut.
    line.cut(place, place, place)
    assert send_all(own, line.by_line(url)) == 3
    line.cut(place)
    write(own, *after)
    assert send_all(own, line.by_line(url)) == 1
    assert line.made(place) == 4
    assert _figures(url) == _figures(own)
    assert rows(url, "SELECT count(DISTINCT sender_id) FROM shipments") == [(1,)]


@pytest.mark.parametrize("seed", range(2))
def test_a_line_that_is_cut_again_and_again_loses_nothing_and_doubles_nothing(
    tmp_path: Path, url: str, line: Line, seed: int
) -> None:
    chance = random.Random(seed)
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    left = records_of("run")
    cuts = 0
    while left:
        batch = [left.pop(0) for _ in range(min(chance.randint(1, 9), len(left)))]
        write(own, *batch)
        places = chance.choices(list(Cut), k=chance.randint(0, 3))
        line.cut(*places)
        cuts += len(places)
        send_all(own, line.by_line(url))
    assert _figures(url) == _figures(own)
    made = sum(line.made(place) for place in Cut)
    assert 0 < made <= cuts


def test_a_database_whose_disk_is_full_keeps_what_waits_and_loses_nothing(tmp_path: Path) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    write(own, *records_of("before"))
    with postgresql(disk_mib=120) as small:
        assert small.disk is not None
        fleet = small.new_database()
        sent(own, fleet)
        small.disk.fill()
        for number in range(6):
            write(own, *records_of(f"run {number}"))
        with pytest.raises(LedgerError, match="No space left on device"):
            sent(own, fleet)
        small.disk.free()
        if small.has_ended:
            small.start()
        send(own, fleet)
        assert _figures(fleet) == _figures(own)


def test_a_database_that_is_killed_between_two_shipments_loses_nothing(tmp_path: Path) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    write(own, *records_of("before"))
    with postgresql(disk_mib=120) as small:
        fleet = small.new_database()
        sender = FleetSender(own, fleet)
        while sender.step():
            pass
        small.kill()
        write(own, *records_of("after"))
        with pytest.raises(LedgerError, match="^fleet postgresql"):
            sender.step()
        small.start()
        send(own, fleet)
        sender.close()
        assert _figures(fleet) == _figures(own)


def test_a_peer_that_vanished_without_a_word_is_noticed_within_half_a_minute(
    tmp_path: Path, url: str, line: Line
) -> None:
    """A machine that lost its power closes nothing, and Linux would wait for two hours."""
    by_line = line.by_line(url)
    open_fleet(parse_fleet_url(by_line)).dispose()
    for engine in (open_fleet(parse_fleet_url(by_line)), open_to_read(by_line)):
        with engine.connect() as connection:
            descriptor = connection.connection.driver_connection.fileno()
            with socket.socket(fileno=os.dup(descriptor)) as peer:
                idle_s, every_s, probes, unanswered_ms = (
                    peer.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (
                        *(socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT),
                        socket.TCP_USER_TIMEOUT,
                    )
                )
        engine.dispose()
        assert idle_s + every_s * probes <= 30
        assert 0 < unanswered_ms <= 30_000


def test_a_url_decides_itself_how_long_its_peer_may_be_silent(url: str, line: Line) -> None:
    engine = open_fleet(parse_fleet_url(f"{line.by_line(url)}&keepalives_idle=77"))
    with engine.connect() as connection:
        descriptor = connection.connection.driver_connection.fileno()
        with socket.socket(fileno=os.dup(descriptor)) as peer:
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
    engine.dispose()
