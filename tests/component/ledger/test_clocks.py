"""Clocks that are set back, or ahead on other machines: no engine is alive, or dead, by them alone.

An engine's clock is set back by an hour: what it told before is from the future then.
"""

import pytest

from tests.component.ledger.test_open_requests import USED, open_, row_of, seen
from tests.component.ledger.test_reader import NOW, T0, Ledger, snapshot
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, AsOf
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339

SECOND = 10**9
# The run began 10 minutes before its clock was set back by an hour.
RAN_NS = 600 * SECOND
BACK = T0 + RAN_NS - NS_PER_HOUR
SINCE_NS = 60 * SECOND
LATER = BACK + SINCE_NS


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def run_of(ledger: Ledger, now_ns: int, run_id: str = "run") -> tuple[bool, int, int]:
    """Whether a run lives, and what of it is in flight and lost."""
    (run,) = [
        run
        for run in ledger.reader.audit(as_of=AsOf(now_ns, settle_s=0))["runs"]
        if run["run_id"] == run_id
    ]
    return run["alive"], run["in_flight_ns"], run["lost_ns"]


@pytest.mark.parametrize(
    ("ahead_ns", "lives"), [(DEAD_AFTER_NS, True), (DEAD_AFTER_NS + 1000, False)]
)
def test_a_snapshot_from_the_future_is_that_of_a_living_engine_within_15_s_only(
    ledger, ahead_ns, lives
):
    """As from the past. It was alive for as long as the clocks differed, which may be years."""
    ledger.write(snapshot([], taken_at_ns=NOW + ahead_ns), open_())
    assert run_of(ledger, NOW) == ((True, 40, 0) if lives else (False, 0, 40))
    state = row_of(ledger, now_ns=NOW)["state"]
    assert state == ("running" if lives else "lost")


def test_an_engine_that_died_as_the_clock_was_set_back_is_dead(ledger):
    ledger.write(seen(("internal-1", USED)), open_())
    assert run_of(ledger, NOW - NS_PER_HOUR)[0] is False
    assert row_of(ledger, now_ns=NOW - NS_PER_HOUR)["state"] == "lost"


def test_an_engine_that_the_asker_knows_lives_whatever_the_clocks_say(ledger):
    ledger.knowing("run")
    ledger.write(seen(("internal-1", USED)), open_())
    assert run_of(ledger, NOW - NS_PER_HOUR)[0] is True
    assert row_of(ledger, now_ns=NOW - NS_PER_HOUR)["state"] == "running"


def set_back(ledger: Ledger, *live: tuple, **changes) -> None:
    """Let an engine be told of again after its clock was set back."""
    times = {"started_at_ns": T0, "taken_at_ns": LATER, "wall_ns": RAN_NS + SINCE_NS}
    ledger.write(seen(*live, number=2, **{**times, **changes}))


def test_requests_that_came_after_the_clock_was_set_back_run_and_are_listed(ledger):
    """By their engine's clock they came before it began."""
    ledger.write(open_(1, started_at_ns=BACK + SECOND), open_(2, "h2", started_at_ns=LATER))
    set_back(ledger, ("internal-1", USED))
    for id, used_ns in (("h1", USED.gpu_time_ns), ("h2", 0)):
        row = row_of(ledger, id, now_ns=LATER)
        assert (row["state"], row["gpu_time_ns"]) == ("running", used_ns)
    page = ledger.reader.requests(as_of=AsOf(LATER, settle_s=0))
    assert [row["http_request_id"] for row in page["running"]] == ["h2", "h1"]


def test_what_came_before_the_engine_began_by_any_clock_is_lost(ledger):
    ledger.write(open_(started_at_ns=BACK - RAN_NS - SECOND))
    set_back(ledger)
    assert row_of(ledger, now_ns=LATER)["state"] == "lost"
    assert ledger.reader.requests(as_of=AsOf(LATER, settle_s=0))["running"] == []


def test_what_a_dead_engine_lost_has_its_owner_on_both_sides_of_the_step(ledger):
    ledger.write(
        open_(1, started_at_ns=T0 + SECOND, tenant="before"),
        open_(2, "h2", started_at_ns=BACK + SECOND, tenant="after"),
    )
    set_back(ledger, ("internal-1", USED), ("internal-2", USED))
    (run,) = ledger.reader.audit(as_of=AsOf(LATER + 60 * SECOND, settle_s=0))["runs"]
    assert {one["tenant"] for one in run["lost_requests"]} == {"before", "after"}
    row = row_of(ledger, "h2", now_ns=LATER + 60 * SECOND)
    assert (row["state"], row["gpu_time_ns"]) == ("lost", USED.gpu_time_ns)


def test_figures_are_as_of_the_engines_that_live_not_of_a_dead_one_from_the_future(ledger):
    ledger.write(
        snapshot([], run_id="dead", taken_at_ns=NOW + NS_PER_HOUR, gpus=8),
        snapshot([], run_id="lives", taken_at_ns=NOW, gpus=2, totals=ClassTotals(idle=1000)),
    )
    summary = ledger.reader.summary(as_of=AsOf(NOW, settle_s=0))
    assert (summary["taken_at"], summary["gpus"]) == (rfc3339(NOW), 2)


def test_without_an_engine_that_lives_figures_are_as_of_the_latest_snapshot(ledger):
    ledger.write(
        snapshot([], run_id="one", taken_at_ns=NOW, gpus=8),
        snapshot([], run_id="two", taken_at_ns=NOW + NS_PER_HOUR, gpus=2),
    )
    summary = ledger.reader.summary(as_of=AsOf(NOW + 2 * NS_PER_HOUR, settle_s=0))
    assert (summary["taken_at"], summary["gpus"]) == (rfc3339(NOW + NS_PER_HOUR), 2)
