"""A fleet's tables stay small, and no answer changes by that."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from tests.component.ledger.test_reader import part, snapshot
from tests.ecosystem.test_fleet import (
    KilledError,
    Mortal,
    name_of,
    records_of,
    send,
    send_all_of,
    write,
)
from tests.ecosystem.test_postgresql import _figures, rows
from tests.support.builders import make_open
from tests.support.fleet import sent
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet import sender as sender_module
from vllm_cost_meter.ledger.fleet.sender import FleetSender
from vllm_cost_meter.ledger.fleet.tidying import fold
from vllm_cost_meter.ledger.fleet.upkeep import tidy_fleet


def test_only_the_latest_of_what_is_told_of_a_run_stays(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "TIDY_EVERY_S", 0.0)
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    sent(own, url)
    bills = [part(seq, f"h{seq}") for seq in range(1, 4)]
    sender = FleetSender(own, url)
    for number in range(1, 4):
        write(own, *bills[:number], snapshot(bills[:number], number))
        while sender.step():
            pass
    sender.end()
    sender.close()
    for name in ("told_snapshots", "told_engine_hours", "told_live_usage"):
        assert rows(url, f"SELECT number FROM {name}") == [(3,)]
    assert _figures(url) == _figures(own)


def test_what_was_sent_long_ago_is_added_up_and_no_answer_changes(tmp_path: Path, url: str) -> None:
    alone = f"sqlite:///{tmp_path}/alone.db"
    ledgers = {run: f"sqlite:///{tmp_path}/{run}.db" for run in ("one", "two")}
    for each in (alone, *ledgers.values()):
        open_database(each).dispose()
    sums = ("rollup_hours", "rollup_latencies", "rollup_arrivals", "bill_sums", "energy_sums")
    engine = create_engine(url)
    for at in range(0, len(records_of("one")), 20):
        for run, ledger in ledgers.items():
            some = records_of(run)[at : at + 20]
            write(ledger, *some)
            write(alone, *some)
            send(ledger, url)
        assert _figures(url) == _figures(alone)
        with engine.begin() as connection:
            for ledger in ledgers.values():
                fold(connection, name_of(ledger), after_s=0.0)
        for name in sums:
            assert rows(url, f"SELECT DISTINCT first_number FROM sent_{name}") in ([(-1,)], [])
        assert _figures(url) == _figures(alone)
    engine.dispose()
    left = rows(url, "SELECT sender_id, count(*) FROM shipments GROUP BY sender_id")
    assert sorted(left) == sorted((name_of(ledger), 1) for ledger in ledgers.values())


def test_a_shipment_that_comes_again_after_it_was_added_up_counts_once(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    sent(own, url)
    write(own, *records_of("one")[:20])
    mortal = Mortal(own, url, shipment_bytes_max=1)
    mortal.dies = True
    with pytest.raises(KilledError):
        mortal.step()
    mortal.close()
    engine = create_engine(url)
    with engine.begin() as connection:
        fold(connection, name_of(own), after_s=0.0)
    engine.dispose()
    write(own, *records_of("one")[20:])
    send(own, url)
    assert _figures(url) == _figures(own)


def test_tidying_while_everybody_sends_changes_no_answer(tmp_path: Path, url: str) -> None:
    names = [f"run-{number}" for number in range(4)]
    alone = f"sqlite:///{tmp_path}/alone.db"
    open_database(alone).dispose()
    for name in names:
        sent(f"sqlite:///{tmp_path}/{name}.db", url)
        write(alone, *records_of(name))
    engine = create_engine(url)
    is_over = False

    def send_bit_by_bit(name: str) -> None:
        ledger = f"sqlite:///{tmp_path}/{name}.db"
        for at in range(0, len(records_of(name)), 5):
            write(ledger, *records_of(name)[at : at + 5])
            send(ledger, url)

    def tidy() -> None:
        while True:
            with engine.begin() as connection:
                for name in names:
                    fold(connection, name_of(f"sqlite:///{tmp_path}/{name}.db"), after_s=0.0)
            assert tidy_fleet(url).senders == len(names)
            if is_over:
                return

    with ThreadPoolExecutor(len(names) + 2) as threads:
        tidying = [threads.submit(tidy) for _ in range(2)]
        for each in [threads.submit(send_bit_by_bit, name) for name in names]:
            each.result()
        is_over = True
        for each in tidying:
            each.result()
    engine.dispose()
    assert _figures(url) == _figures(alone)


def test_an_open_request_leaves_the_fleet_when_its_bill_comes(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "TIDY_EVERY_S", 0.0)
    own = f"sqlite:///{tmp_path}/ledger.db"
    sent(own, url)
    short, long = part(1, "short"), part(2, "long")
    opened = [
        make_open(
            request_id=each.bill.request_id,
            http_request_id=each.http_request_id,
            started_at_ns=each.started_at_ns,
        )
        for each in (short, long)
    ]
    write(own, *opened, short)
    sender = FleetSender(own, url)
    send_all_of(sender)
    assert rows(url, "SELECT request_id FROM open_requests") == [(long.bill.request_id,)]
    write(own, long)
    send_all_of(sender)
    sender.close()
    assert rows(url, "SELECT request_id FROM open_requests") == []
    assert _figures(url) == _figures(own)
