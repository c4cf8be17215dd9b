"""Budgets over all servers of a fleet: real ledgers, senders and PostgreSQL."""

import shutil
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from tests.ecosystem.postgresql import Server
from tests.support.fleet_budgets import (
    NOW,
    THIS_HOUR,
    FleetServer,
    away,
    bill,
    budget,
    execute,
    opened,
    put_together,
    running,
)
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

EACH = budget(name="each", each_server=True)


@pytest.fixture
def servers(tmp_path: Path, url: str) -> Iterator[tuple[FleetServer, FleetServer]]:
    """Return two servers of one fleet."""
    both = FleetServer(tmp_path, "one", url), FleetServer(tmp_path, "two", url)
    yield both
    for each in both:
        each.stop()


# ---- what counts


def test_a_budget_counts_what_all_servers_have_used(servers) -> None:
    one, two = servers
    one.write(bill("a", 1, 30))
    two.write(bill("b", 1, 500), bill("b", 2, 7, tenant="rival"))
    one.send()
    two.send()
    assert one.used(budget(), EACH) == [530, 30]
    assert two.used(budget(), EACH) == [530, 500]
    standing, each = one.standings(budget(), EACH)
    assert (standing.others.used_here, standing.others.is_counted) == (30, True)
    assert standing.others.stale is None
    assert each.others is None


def test_what_comes_later_is_added_and_the_own_ledger_counts_at_once(servers) -> None:
    one, two = servers
    for each in servers:
        each.send()
    assert one.used() == [0]
    two.write(bill("b", 1, 10))
    two.send()
    two.write(bill("b", 2, 200))
    two.send()
    one.write(bill("a", 1, 3_000))
    assert one.used() == [3_210]
    one.send()
    assert one.used() == [3_210]
    assert two.used() == [3_210]


def test_of_a_ledger_that_two_servers_share_all_counts_as_their_own(
    servers, tmp_path: Path, url: str
) -> None:
    shared, _ = servers
    also = FleetServer(tmp_path, "one", url)
    shared.write(bill("a", 1, 30), bill("b", 1, 500))
    shared.send()
    assert shared.used() == [530]
    (standing,) = also.standings()
    also.stop()
    assert standing.others.used_here == 530


def test_what_runs_elsewhere_counts_until_its_bill_does(servers) -> None:
    one, two = servers
    two.write(opened("b", "x"), opened("b", "y", "rival"), running("b", 1, x=40, y=5))
    two.send()
    assert one.used(budget(), budget(name="r", tenant="rival")) == [40, 5]
    # The bill came after the snapshot that shows the request: it must not count twice.
    two.write(bill("b", 1, 60, request_id="b-x"))
    two.send()
    assert one.used() == [60]
    two.write(running("b", 2, y=9))
    two.send()
    assert one.used(budget(), budget(name="r", tenant="rival")) == [60, 9]


def test_what_ran_on_a_server_that_stopped_counts_no_more(servers) -> None:
    one, two = servers
    two.write(opened("b", "x"), running("b", 1, x=40))
    two.send()
    assert one.used() == [40]
    two.send(stops=True)
    assert one.used() == [0]


def test_what_ran_on_a_silent_server_counts_as_last_known_in_its_own_hour(servers) -> None:
    one, two = servers
    two.write(opened("b", "x"), running("b", 1, x=40))
    two.send()
    daily = budget(period="rolling", days=1)
    now_ns = time.time_ns()
    assert one.used(daily, now_ns=now_ns) == [40]
    assert one.used(daily, now_ns=now_ns + 20 * NS_PER_HOUR) == [40]
    assert one.used(daily, now_ns=now_ns + 25 * NS_PER_HOUR) == [0]


def test_money_of_other_servers_is_by_their_own_price_and_rounded_once(servers) -> None:
    one, two = servers
    cheap, dear = (
        PriceEntry(host, Decimal(usd), "s", None, matches=RunMatch(host=host))
        for host, usd in (("vm-1", "1.25"), ("vm-2", "3.75"))
    )
    usd = budget(unit="usd", limit=10**9)
    ns = 1_000_000_001
    for server, host, run in ((one, "vm-1", "a"), (two, "vm-2", "b")):
        server.write(running(run, 1, host=host), bill(run, 1, ns))
        server.send()
    book = PriceBook([cheap, dear])
    expected = [round((Decimal("1.25") + Decimal("3.75")) * ns / 3600)]
    assert one.used(usd, book=book) == expected
    assert two.used(usd, book=book) == expected
    one.read(usd)
    (unknown,) = one.standings(usd, book=PriceBook([cheap]))
    assert unknown.total is None
    assert unknown.unknown.startswith("no price for run b at ")
    assert unknown.others.used_here is not None


# ---- restored and copied ledgers


def test_a_restored_ledger_counts_all_that_it_had_sent_and_nothing_twice(
    servers, tmp_path: Path
) -> None:
    one, two = servers
    one.send()
    one.write(bill("a", 1, 10))
    one.send()
    shutil.copy(one.path, tmp_path / "backup.db")
    one.write(bill("a", 2, 200), opened("a", "x"), running("a", 1, x=4_000))
    one.send()
    assert (one.used(), two.used()) == ([4_210], [4_210])
    one.stop()
    shutil.copy(tmp_path / "backup.db", one.path)
    one.start()
    # It has less of the run than it has sent, and says so at once.
    assert one.used() == [4_210]
    one.write(bill("after", 1, 50_000))
    one.send()
    # What ran when it was restored has no bill.
    assert (one.used(), two.used()) == ([50_210], [50_210])


def test_of_a_copied_ledger_each_run_counts_by_who_has_more_of_it(
    servers, tmp_path: Path, url: str
) -> None:
    one, two = servers
    one.send()
    one.write(bill("shared", 1, 10))
    one.send()
    shutil.copy(one.path, tmp_path / "copy.db")
    copy = FleetServer(tmp_path, "copy", url)
    copy.write(bill("copy", 1, 300))
    one.write(bill("shared", 2, 2_000), opened("shared", "x"), running("shared", 1, x=60_000))
    for each in (one, copy):
        each.send()
    # To the fleet the copy is the same ledger, until the first one goes on.
    one.write(running("shared", 2, x=60_001))
    one.send()
    figures = [each.used() for each in (one, two, copy)]
    copy.stop()
    assert figures == [[62_311]] * 3


# ---- without the database


def test_while_the_database_is_away_nothing_is_forgiven_also_by_a_restart(servers) -> None:
    one, two = servers
    two.write(bill("b", 1, 500), opened("b", "x"), running("b", 1, x=7))
    two.send()
    one.send()
    assert one.used() == [507]
    with away(one.fleet):
        two.write(bill("b", 2, 3_000))
        one.write(bill("a", 1, 20_000))
        with pytest.raises(LedgerError, match="^fleet postgresql"):
            one.read()
        assert [each.total for each in one.standings()] == [20_507]
        one.stop()
        one.start()
        (standing,) = one.standings()
        assert standing.total == 20_507
        assert standing.others.is_counted
        # Of a budget that looks further back nothing is known.
        (longer,) = one.standings(budget(days=300))
        assert not longer.others.is_counted
    two.send()
    one.send()
    assert one.used() == [23_507]
    assert two.used() == [23_507]


def test_a_server_that_starts_without_any_figures_says_that_it_has_none(servers) -> None:
    one, _ = servers
    with away(one.fleet):
        with pytest.raises(LedgerError):
            one.read()
        (standing,) = one.standings()
    assert not standing.others.is_counted
    assert standing.others.age_ns is None
    assert standing.others.stale is not None


def test_figures_are_stale_when_the_fleet_was_not_read_and_when_it_lacks_what_is_here(
    servers,
) -> None:
    one, _ = servers
    one.send()
    one.read()
    now_ns = time.monotonic_ns()
    assert one.use.stale(now_ns + 9 * NS_PER_SECOND) is None
    assert one.use.stale(now_ns + 12 * NS_PER_SECOND) == "the figures of the fleet are 12 s old"
    one.write(bill("a", 1, 5))
    one.read()
    held_ns = time.monotonic_ns()
    one.use._fresh_ns = 0
    assert one.use.stale(held_ns).startswith("the figures of the fleet are")
    one.use._read_ns = held_ns
    assert one.use.stale(held_ns).startswith("the fleet lacks what this server has used")
    one.send()
    one.read()
    one.use._read_ns = one.use._sent_ns
    assert one.use.stale(one.use._sent_ns) is None


def test_kept_figures_are_this_users_alone_and_those_of_another_fleet_are_dropped(
    servers, server: Server
) -> None:
    one, two = servers
    two.write(bill("b", 1, 500))
    two.send()
    one.send()
    assert one.used() == [500]
    kept = sorted(one.path.parent.glob("one.db.fleet-0*"))
    assert [path.name for path in kept] == [
        "one.db.fleet-0",
        "one.db.fleet-0-shm",
        "one.db.fleet-0-wal",
    ]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    one.stop()
    one.fleet = server.new_database()
    one.start()
    (standing,) = one.standings()
    assert not standing.others.is_counted


@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + b"x" * 4_000])
def test_kept_figures_that_are_damaged_are_made_anew(servers, damage: bytes) -> None:
    one, two = servers
    two.write(bill("b", 1, 500))
    two.send()
    one.send()
    assert one.used() == [500]
    one.stop()
    one.path.with_name("one.db.fleet-0").write_bytes(damage)
    one.start()
    assert one.used() == [500]


def test_two_processes_with_the_same_kept_figures_count_nothing_twice(servers) -> None:
    one, two = servers
    one.send()
    two.send()
    assert one.used() == [0]
    old = one.use
    one.start()  # a new process, while the old one has not ended yet
    two.write(bill("b", 1, 500))
    two.send()
    one.read()
    old.look((budget(),), NOW)
    two.write(bill("b", 2, 30))
    two.send()
    old.look((budget(),), NOW)
    assert [each.total for each in one.standings()] == [530]
    assert one.used() == [530]
    known = old._kept.known(0)
    one.read()
    with pytest.raises(LedgerError, match="another process writes them"):
        old._kept.take(old._reader.look(known), 0)
    assert one.used() == [530]
    old.close()


# ---- shipments that were put together


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("read_before", [0, 2, 5])
def test_shipments_that_were_put_together_while_nobody_read_count_once(
    servers, keep: int, read_before: int
) -> None:
    one, two = servers
    one.send()
    two.send()
    for seq in range(6):
        if seq == read_before:
            assert one.used() == [int("1" * seq or "0")]
        two.write(bill("b", seq + 1, 10**seq))
        two.send()
    put_together(one.fleet, keep)
    assert one.used() == [111_111]
    two.write(bill("b", 7, 10**6))
    two.send()
    assert one.used() == [1_111_111]
    put_together(one.fleet, keep)
    two.write(running("b", 1))
    two.send()
    assert one.used() == [1_111_111]
    two.write(bill("b", 8, 10**7))
    two.send()
    put_together(one.fleet)
    two.write(running("b", 2))
    two.send()
    assert one.used() == [11_111_111]


def test_a_database_that_was_restored_from_a_backup_is_read_anew(servers) -> None:
    one, two = servers
    two.send()
    one.send()
    for seq in (1, 2):
        two.write(bill("b", seq, 10**seq))
        two.send()
    assert one.used() == [110]
    last = "(SELECT MAX(first_number) FROM shipments WHERE first_number > 0)"
    for table in ("sent_rollup_hours", "sent_bill_sums", "shipments"):
        if table != "shipments":
            execute(one.fleet, f"DELETE FROM {table} WHERE first_number = {last}")
    execute(one.fleet, f"DELETE FROM shipments WHERE first_number = {last}")
    assert one.used() == [10]
    two.send()
    two.write(bill("b", 3, 10**3))
    two.send()
    assert one.used() == [1_110]


# ---- connections and rights


def test_readers_need_no_session_of_their_own_and_no_right_but_to_read(
    servers, server: Server, tmp_path: Path, url: str
) -> None:
    one, two = servers
    one.send()
    two.write(bill("b", 1, 500))
    two.send()
    execute(url, "CREATE ROLE budget_reader LOGIN")
    execute(url, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO budget_reader")
    with server.pooled(url.replace("//meter@", "//budget_reader@"), sessions=1) as pooled:
        readers = [FleetServer(tmp_path, f"reader{n}", pooled) for n in range(3)]
        for round in range(8):
            two.write(bill("b", round + 2, 1))
            two.send()
            assert [each.used() for each in readers] == [[501 + round]] * 3
        for each in readers:
            each.stop()


# ---- what changes meanwhile


def test_budgets_periods_and_prices_may_change_at_any_look(servers) -> None:
    one, two = servers
    one.send()
    two.write(
        bill("b", 1, 10), bill("b", 2, 200, hour=THIS_HOUR - 24 * 3), bill("b", 3, 3_000, "rival")
    )
    two.send()
    month = budget(days=30)
    assert one.used(month) == [210]
    assert one.used(budget(days=1), budget(name="r", tenant="rival")) == [10, 3_000]
    two.write(bill("b", 4, 40_000, "rival"))
    two.send()
    # A day later, as the clock of this machine has it.
    later = NOW + 25 * NS_PER_HOUR
    assert one.used(budget(days=1), budget(name="r", tenant="rival"), now_ns=later) == [0, 43_000]
    assert one.used(month, now_ns=NOW + 28 * 24 * NS_PER_HOUR) == [10]
    assert one.used(month) == [210]
    usd = budget(unit="usd", limit=1)
    price = PriceEntry("p", Decimal("36"), "s", None)
    dearer = PriceEntry("q", Decimal("72"), "s", THIS_HOUR)
    assert one.used(usd, book=PriceBook([price])) == [2]
    assert one.used(usd, book=PriceBook([price, dearer])) == [2]
    assert one.used(usd, book=NO_PRICES) == [None]


def test_what_a_machine_whose_clock_is_ahead_has_used_counts_in_a_rolling_period(servers) -> None:
    one, two = servers
    one.send()
    two.write(bill("b", 1, 10), bill("b", 2, 200, hour=THIS_HOUR + 5))
    two.send()
    assert one.used(budget(days=1)) == [210]
    assert one.used(budget(days=1), now_ns=NOW + 25 * NS_PER_HOUR) == [200]


def test_a_rolling_budget_that_is_used_up_tells_when_it_has_room_again(servers) -> None:
    one, two = servers
    one.send()
    one.write(bill("a", 1, 30))
    two.write(bill("b", 1, 50, hour=THIS_HOUR - 5), bill("b", 2, 40))
    two.send()
    one.read()
    (standing,) = one.standings(budget(days=1))
    assert dict(standing.used) == {THIS_HOUR - 5: 50, THIS_HOUR: 70}
    assert standing.resets_at().timestamp() == (THIS_HOUR - 5 + 24) * 3600
