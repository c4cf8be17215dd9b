"""What tokens cost, of a real ledger: by hand, by the SQL that is told, and what is undefined."""

import contextlib
import sqlite3

import pytest

from tests.component.ledger.test_reader import HOUR, T0, Ledger, http, part, snapshot
from tests.support.builders import ENGINE, make_open
from vllm_cost_meter.economics import Declared, SaturationPoint
from vllm_cost_meter.economics.saturation import IDENTITY
from vllm_cost_meter.ledger.economics.figures import FIGURES, OF_SLO
from vllm_cost_meter.ledger.economics.query import economics, method
from vllm_cost_meter.ledger.economics.saturation import keep
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import Usage
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

S = 10**9
BOUNDS = Declared(ttft_ms=3, tpot_ms=3, e2e_ms=9, percentile=60)
AMOUNTS = (
    "cost_usd", "wall_gpu_seconds", "observed_seconds", "cold_starts", "cold_start_gpu_seconds",
    "cold_start_usd", "requests", "arrivals", "prompt_tokens", "output_tokens", "good_requests",
    "good_output_tokens",
)  # fmt: skip


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def write(ledger, usd: str | None = "36") -> None:
    """Two GPUs: 10 s busy and 30 s idle in one hour, 2 s and 18 s in the next.

    Each of four exchanges has 10 prompt tokens, 8 of them computed in 1 s, and 5 output tokens in
    2 s; TTFT is 2 ms times its number, TPOT 3 ms, end to end 4 ms times its number. The last ended
    in the second hour, and a fifth still runs.
    """
    pieces = (UsagePiece(HOUR, S, 2 * S, 8, 5),)
    late = (UsagePiece(HOUR + 1, S, 2 * S, 8, 5),)
    at = T0 + NS_PER_HOUR
    bills = [part(n, f"h{n}", pieces=pieces) for n in (1, 2, 3)]
    bills.append(part(4, "h4", pieces=late, tenant="bob", started_at_ns=at, finished_at_ns=at + S))
    told = [http(b.http_request_id, owner=b.owner, at=n) for n, b in enumerate(bills[:3])]
    told.append(http("h4", tenant="bob", started_at_ns=at, finished_at_ns=at + S))
    hours = {
        HOUR: ClassTotals(requests=9 * S, in_flight=S, idle=30 * S),
        HOUR + 1: ClassTotals(requests=2 * S, startup=18 * S),
    }
    running = make_open(request_id="r5", http_request_id="h5", started_at_ns=at)
    ledger.write(*bills, *told, running, usd=usd)
    totals = hours[HOUR].plus(hours[HOUR + 1])
    taken = snapshot(bills, totals=totals, hours=hours, gpus=2, wall_ns=30 * S)
    ledger.write(taken, usd=usd)


def figures(ledger, *hours, declared: Declared = BOUNDS):
    return economics(ledger.reader, declared, *hours, as_of=AsOf(settle_s=0))["figures"]


def test_figures_are_those_computed_by_hand(ledger):
    write(ledger)
    found = figures(ledger)
    # 60 GPU-seconds at 36 USD an hour are 0.60 USD; both GPUs, so 30 s passed.
    assert found["cost_usd"] == pytest.approx(0.60)
    assert (found["wall_gpu_seconds"], found["observed_seconds"]) == (60, 30)
    assert found["utilization"] == pytest.approx(12 / 60)
    assert (found["cold_starts"], found["cold_start_gpu_seconds"]) == (1, 18)
    assert found["cold_start_usd"] == pytest.approx(0.18)
    assert (found["requests"], found["arrivals"]) == (4, 5)
    assert (found["prompt_tokens"], found["output_tokens"]) == (40, 20)
    assert found["arrivals_per_s"] == pytest.approx(5 / 30)
    assert found["output_tokens_per_s"] == pytest.approx(20 / 30)
    assert found["usd_per_m_output_tokens"] == pytest.approx(30_000)
    assert found["usd_per_m_total_tokens"] == pytest.approx(10_000)
    assert found["usd_per_request"] == pytest.approx(0.15)
    # 4 s of prefill for 32 tokens, 8 s of decode for 20.
    assert found["usd_per_m_computed_prompt_tokens"] == pytest.approx(0.04 / 32 * 1e6)
    assert found["usd_per_m_decoded_tokens"] == pytest.approx(0.08 / 20 * 1e6)
    assert found["mean_e2e_seconds"] == pytest.approx(0.010)
    assert found["concurrency"] == pytest.approx(0.040 / 30)
    assert found["littles_law"] == pytest.approx(5 / 30 * 0.010)
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (4, 8)
    assert (found["tpot_p50_ms"], found["e2e_p99_ms"]) == (3, 16)


def test_goodput_is_of_what_kept_every_bound(ledger):
    write(ledger)
    answer = economics(ledger.reader, BOUNDS, as_of=AsOf(settle_s=0))
    found = answer["figures"]
    # TTFT 2 ms and end to end 4 ms: the first alone, as the second has its first token at 4 ms.
    assert (found["good_requests"], found["good_output_tokens"]) == (1, 5)
    assert found["good_requests_share"] == 0.25
    assert found["usd_per_m_good_output_tokens"] == pytest.approx(120_000)
    assert found["missed_spend_share"] == 0.75
    assert answer["slo"] == {
        "ttft_ms": 3, "tpot_ms": 3, "e2e_ms": 9, "percentile": 60, "met": False,
    }  # fmt: skip
    assert economics(ledger.reader, Declared(e2e_ms=16), as_of=AsOf(settle_s=0))["slo"]["met"]


def test_the_penalty_is_against_a_full_load_that_was_declared_and_else_blank(ledger):
    write(ledger)
    full = figures(ledger, declared=Declared(theta_max=20))
    assert full["penalty"] == pytest.approx(20 / (20 / 30))
    blank = figures(ledger, declared=Declared())
    assert full["saturation_output_tokens_per_s"] == 20
    assert blank.pop("penalty") is blank.pop("saturation_output_tokens_per_s") is None
    assert {name: full[name] for name in blank} == blank


@pytest.mark.parametrize("engines", [1, 2])
def test_a_measured_full_load_holds_for_as_many_engines_as_ran_at_once(ledger, engines):
    write(ledger)
    about = {name: getattr(ENGINE, name) for name in IDENTITY} | {"gpus": 2}
    point = SaturationPoint("p", "2026-01-01T00:00:00Z", about, engines, 10, 5, 40.0, 8.0, 60, "{}")
    assert keep(ledger.url, [point]) == 1
    assert full_load(ledger) == (40 if engines == 1 else None)
    # A second server runs beside the first one.
    beside = {HOUR: ClassTotals(idle=2 * 30 * S)}
    ledger.write(
        snapshot([], run_id="beside", totals=beside[HOUR], hours=beside, gpus=2, wall_ns=30 * S)
    )
    assert full_load(ledger) == (40 if engines == 2 else None)


def full_load(ledger):
    answer = figures(ledger, HOUR, HOUR + 1, declared=Declared())
    return answer["saturation_output_tokens_per_s"]


def test_without_bounds_there_is_no_goodput(ledger):
    write(ledger)
    answer = economics(ledger.reader, Declared(), as_of=AsOf(settle_s=0))
    assert answer["slo"] is None
    assert not set(OF_SLO) & set(answer["figures"])


def test_the_sql_that_is_told_gives_the_figure_by_hand(ledger):
    write(ledger)
    for hours in ((), (HOUR, HOUR + 1), (HOUR + 1, None), (HOUR + 7, HOUR + 9)):
        told = figures(ledger, *hours)
        steps = method(ledger.reader, BOUNDS, *hours)
        assert [step["figure"] for step in steps] == list(told) == list(FIGURES)
        with contextlib.closing(sqlite3.connect(ledger.url.removeprefix("sqlite:///"))) as by_hand:
            for step in steps:
                (row,) = by_hand.execute(step["sql"]).fetchall()
                assert row == (told[step["figure"]],), step["figure"]


def test_without_traffic_dollars_are_counted_and_tokens_have_no_cost(ledger):
    idle = {HOUR: ClassTotals(idle=10 * S)}
    ledger.write(snapshot([], totals=idle[HOUR], hours=idle, wall_ns=10 * S), usd="36")
    found = figures(ledger)
    assert found["cost_usd"] == pytest.approx(0.1)
    assert (found["utilization"], found["requests"], found["arrivals_per_s"]) == (0, 0, 0)
    undefined = [name for name, value in found.items() if value is None]
    assert set(undefined) >= {
        "usd_per_m_output_tokens", "usd_per_m_total_tokens", "usd_per_request", "ttft_p99_ms",
        "usd_per_m_decoded_tokens", "missed_spend_share", "mean_e2e_seconds",
    }  # fmt: skip


def test_an_empty_ledger_has_no_cost_and_no_error(ledger):
    found = figures(ledger)
    assert found["cost_usd"] is None
    assert found["requests"] == 0


def test_without_a_price_there_is_load_and_no_cost(ledger):
    write(ledger, usd=None)
    found = figures(ledger)
    assert found["utilization"] == pytest.approx(0.2)
    assert [name for name, value in found.items() if "usd" in name and value is not None] == []


def test_parts_of_a_window_add_up_to_it(ledger):
    write(ledger)
    whole = figures(ledger)
    parts = [figures(ledger, None, HOUR + 1), figures(ledger, HOUR + 1, None)]
    for name in AMOUNTS:
        assert sum(part[name] for part in parts) == pytest.approx(whole[name]), name


def test_doubling_the_price_doubles_every_dollar_and_moves_nothing_else(tmp_path):
    found = []
    for number, usd in enumerate(("36", "72")):
        ledger = Ledger(f"sqlite:///{tmp_path / f'{number}.db'}")
        write(ledger, usd)
        found.append(figures(ledger))
        ledger.close()
    once, twice = found
    for name, value in once.items():
        factor = 2 if "usd" in name else 1
        assert twice[name] == (None if value is None else pytest.approx(factor * value)), name


def test_renaming_tenants_creates_no_money(ledger):
    write(ledger)
    before = figures(ledger)
    path = ledger.url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for table in ("requests", "http_requests", "usage_pieces", "open_requests"):
            connection.execute(f"UPDATE {table} SET tenant = 'one'")
    assert figures(ledger) == before


def test_load_and_tokens_are_those_of_the_summary(ledger):
    write(ledger)
    ledger.write(part(5, None), part(6, "h6"), part(7, "h6", prompt_group="group-6"))
    ledger.write(http("h6", Usage(11, None, 7), at=9))
    for hours in ((), (HOUR, HOUR + 1)):
        summary = ledger.reader.summary(*hours, as_of=AsOf(settle_s=0))
        found = figures(ledger, *hours)
        for name in ("requests", "prompt_tokens", "output_tokens"):
            assert found[name] == summary[name], name
        assert found["wall_gpu_seconds"] * S == pytest.approx(summary["wall_gpu_ns"])


def test_what_ran_is_told_by_the_engines(ledger):
    write(ledger)
    (one,) = economics(ledger.reader, Declared(), as_of=AsOf(settle_s=0))["deployments"]
    assert set(one) == {
        "hardware", "gpus", "model", "precision", "parallelism", "vllm_version", "runs",
    }  # fmt: skip
    assert (one["gpus"], one["runs"]) == (2, 1)
    assert (
        economics(ledger.reader, Declared(), HOUR + 8, HOUR + 9, as_of=AsOf(settle_s=0))[
            "deployments"
        ]
        == []
    )
