"""Reports of a real ledger: what each dimension is, how requests count, and that all adds up."""

import pytest

from tests.component.ledger.test_reader import HOUR, NOW, T0, Ledger, http, part, snapshot
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import Usage
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.reports.facts import UNALLOCATED
from vllm_cost_meter.reports.grammar import question
from vllm_cost_meter.units.time import NS_PER_HOUR

OFF = {"as_of": AsOf(NOW, 0)}


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def rows(ledger, **words):
    (series,) = ledger.reader.report(question(**words), **OFF)["series"]
    return series["rows"]


def figures(ledger, aggregate: str, *names: str, **words):
    """The usage rows' columns, by the columns they are added up by."""
    keys = aggregate.split(",")
    return {
        tuple(row[key] for key in keys): tuple(row[name] for name in names)
        for row in rows(ledger, aggregate=aggregate, **words)
        if row["class"] == "requests"
    }


def write_five(ledger) -> None:
    """Five exchanges of 300 ns and 10 prompt tokens each, the last in the next hour."""
    late = {"pieces": (UsagePiece(HOUR + 1, 100, 200, 8, 5),)}
    at = T0 + NS_PER_HOUR
    bills = [
        part(1, "h1", tags='{"team":"red","env":"prod"}'),
        part(2, "h2", tags='{"env":"prod","team":"red"}', lora="sql"),
        part(3, "h3", tags='{"team":"blue"}', model="n", status="aborted"),
        part(4, "h4", tenant="bob", route="/v1/chat/completions"),
        part(5, "h5", tenant="bob", model=None, finished_at_ns=at, **late),
    ]
    told = [http(b.http_request_id, owner=b.owner) for b in bills[:4]]
    told.append(http("h5", tenant="bob", finished_at_ns=at))
    hours = {
        HOUR: ClassTotals(requests=1200, idle=1000, in_flight=40),
        HOUR + 1: ClassTotals(requests=300, host=60),
    }
    totals = hours[HOUR].plus(hours[HOUR + 1])
    ledger.write(*bills, *told, usd="3600")
    ledger.write(snapshot(bills, totals=totals, hours=hours), usd="3600")


@pytest.mark.parametrize(
    ("aggregate", "found"),
    [
        ("tenant", {("alice",): (3, 900, 30), ("bob",): (2, 600, 20)}),
        ("model", {("m",): (3, 900, 30), ("n",): (1, 300, 10), (UNALLOCATED,): (1, 300, 10)}),
        ("lora", {("sql",): (1, 300, 10), (UNALLOCATED,): (4, 1200, 40)}),
        (
            "route",
            {("/v1/completions",): (4, 1200, 40), ("/v1/chat/completions",): (1, 300, 10)},
        ),
        ("status", {("stop",): (4, 1200, 40), ("aborted",): (1, 300, 10)}),
        (
            "tag:team",
            {("red",): (2, 600, 20), ("blue",): (1, 300, 10), (UNALLOCATED,): (2, 600, 20)},
        ),
        ("tag:env,tenant", {
            ("prod", "alice"): (2, 600, 20), (UNALLOCATED, "alice"): (1, 300, 10),
            (UNALLOCATED, "bob"): (2, 600, 20),
        }),
        ("hour", {
            ("2027-01-15T08:00:00Z",): (4, 1200, 40), ("2027-01-15T09:00:00Z",): (1, 300, 10),
        }),
        ("day,tenant", {
            ("2027-01-15", "alice"): (3, 900, 30), ("2027-01-15", "bob"): (2, 600, 20),
        }),
        ("month", {("2027-01",): (5, 1500, 50)}),
    ],
)  # fmt: skip
def test_usage_is_told_apart_by_each_dimension(ledger, aggregate, found):
    write_five(ledger)
    assert figures(ledger, aggregate, "requests", "gpu_time_ns", "prompt_tokens") == found


def test_usage_is_told_apart_by_a_label_of_the_engine_and_by_none_where_it_has_none(ledger):
    pools = {"run": {"pool": "spot", "zone": "a"}, "two": {"zone": "a", "pool": "spot"}, "bare": {}}
    for run_id, labels in pools.items():
        http_id = f"h-{run_id}"
        tags = '{"team":"red"}'
        bills = [part(1, http_id, run_id=run_id, tags=tags), part(2, None, run_id=run_id)]
        ledger.write(*bills, http(http_id), usd="3600")
        ledger.write(snapshot(bills, run_id=run_id, labels=labels), usd="3600")
    names = ("requests", "gpu_time_ns", "prompt_tokens")
    assert figures(ledger, "label:pool", *names) == {
        ("spot",): (2, 1200, 40), (UNALLOCATED,): (1, 600, 20),
    }  # fmt: skip
    assert figures(ledger, "label:pool,tag:team,tenant", *names) == {
        ("spot", "red", "alice"): (2, 600, 20), ("spot", UNALLOCATED, "alice"): (0, 600, 20),
        (UNALLOCATED, "red", "alice"): (1, 300, 10),
        (UNALLOCATED, UNALLOCATED, "alice"): (0, 300, 10),
    }  # fmt: skip
    spot = figures(ledger, "tenant", *names, filter="label:pool=spot,big+label:zone=a")
    assert spot == {("alice",): (2, 1200, 40)}
    assert figures(ledger, "tenant", *names, filter="label:zone=b") == {}


def test_a_day_is_of_the_time_zone(ledger):
    write_five(ledger)
    # 9 hours behind: the second hour, from 09:00 UTC, begins at midnight.
    assert figures(ledger, "day", "requests", "gpu_time_ns", tz="America/Anchorage") == {
        ("2027-01-14",): (4, 1200), ("2027-01-15",): (1, 300),
    }  # fmt: skip


def test_the_answer_says_of_what_window_prices_and_snapshot_it_is(ledger):
    write_five(ledger)
    asked = question(window="2027-01-15T08:00:00Z,2027-01-15T09:00:00Z", tz="Asia/Tokyo")
    answer = ledger.reader.report(asked, **OFF)
    assert answer["window"] == {
        "from": "2027-01-15T08:00:00.000000Z", "to": "2027-01-15T09:00:00.000000Z",
        "from_hour": HOUR, "to_hour": HOUR + 1, "tz": "Asia/Tokyo",
    }  # fmt: skip
    assert answer["taken_at"] == "2027-01-15T08:01:00.000000Z"
    assert [price["usd_per_gpu_hour"] for price in answer["prices"]] == ["3600"]
    assert (answer["wall_gpu_ns"], answer["wall_cost_nanousd"], answer["adds_up"]) == (
        2240, 2240, True,
    )  # fmt: skip


def test_steps_are_pieces_of_the_window(ledger):
    write_five(ledger)
    series = ledger.reader.report(question(step="1h", idle="proportional"), **OFF)["series"]
    assert [(one["from"], one["gpu_time_ns"], one["cost_nanousd"]) for one in series] == [
        ("2027-01-15T08:00:00.000000Z", 2240, 2240), ("2027-01-15T09:00:00.000000Z", 360, 360),
    ]  # fmt: skip
    assert [
        [(r["tenant"], r["idle_share_ns"]) for r in one["rows"] if r["class"] == "requests"]
        for one in series
    ] == [[("alice", 750), ("bob", 250)], [("bob", 60)]]


def test_parts_count_once_with_what_the_client_was_told(ledger):
    ledger.write(
        *(part(seq, prompt_group="same") for seq in (1, 2)),
        part(3, status="aborted"),
        part(4, "h2"),
        part(5, None, tenant="bob"),
        http(),
        http("h2", Usage(9, None, 4)),
    )
    names = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    assert figures(ledger, "tenant", *names) == {
        ("alice",): (2, 29, 6, 19), ("bob",): (0, 10, 2, 5),
    }  # fmt: skip
    # Its parts ended in two ways: it counts under the first by name, and their time apart.
    assert figures(ledger, "status", *names) == {
        ("aborted",): (1, 20, 4, 15), ("stop",): (1, 19, 4, 9),
    }  # fmt: skip


def test_bills_after_the_cut_wait_and_missing_ones_are_a_difference(ledger):
    bills = [part(n, f"h{n}") for n in (1, 2, 3)]
    ledger.write(bills[0], bills[2], snapshot(bills[:2]))
    answer = ledger.reader.report(question(), **OFF)
    assert (answer["adds_up"], answer["difference_ns"]) == (False, 300)
    assert answer["series"][0]["rows"][0]["gpu_time_ns"] == 300


def test_in_flight_time_of_a_dead_run_is_lost_and_shared_as_such(ledger):
    bills = [part(1)]
    ledger.write(*bills, snapshot(bills), usd="3600")
    later = {"as_of": AsOf(NOW + 16 * 10**9, 0)}
    (series,) = ledger.reader.report(question(idle="even"), **later)["series"]
    shown = {row["class"]: row["gpu_time_ns"] for row in series["rows"]}
    assert (shown["in_flight"], shown["lost"]) == (0, 40)
    assert series["rows"][0]["idle_share_ns"] == 1000 + 3 + 40


def test_runs_without_a_price_are_named(ledger):
    first, second = [part(1)], [part(1, "h2", run_id="second-run", tenant="bob")]
    ledger.write(*first, snapshot(first), usd="3600")
    ledger.write(*second, snapshot(second, run_id="second-run"))
    assert figures(ledger, "tenant", "cost_nanousd", "cost_reason") == {
        ("alice",): (300, None), ("bob",): (None, "no price for run second-run at 2027-01-15T08Z: "
        "none is set by COST_METER_GPU_HOUR_USD or [[prices]]"),
    }  # fmt: skip
    assert figures(ledger, "tenant", "cost_nanousd", price="7200") == {
        ("alice",): (600,), ("bob",): (600,),
    }  # fmt: skip
    assert ledger.reader.report(question(), **OFF)["wall_cost_nanousd"] is None


def test_an_empty_ledger_has_an_answer(ledger):
    answer = ledger.reader.report(question(aggregate="tenant,tag:team"), **OFF)
    assert (answer["wall_gpu_ns"], answer["adds_up"], answer["prices"]) == (0, True, [])
    assert {row["gpu_time_ns"] for row in answer["series"][0]["rows"]} == {0}


def test_rows_by_tenant_are_those_of_the_tenant_report(ledger):
    write_five(ledger)
    for window in (None, "2027-01-15T08:00:00Z,2027-01-15T09:00:00Z"):
        asked = question(window=window)
        (series,) = ledger.reader.report(asked, **OFF)["series"]
        old = ledger.tenants(asked.from_hour, asked.to_hour)["tenants"]
        names = ("tenant", "requests", "prompt_tokens", "output_tokens", "gpu_time_ns")
        assert [[row[name] for name in (*names, "cost_nanousd")] for row in series["rows"]] == [
            [row[name] for name in (*names, "cost_nanousd")] for row in old
        ]
