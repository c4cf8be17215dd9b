"""The page on budgets shows the error that a client gets, and the numbers of the code."""

import json
import re
from datetime import datetime
from zoneinfo import ZoneInfo

from tests.support.pages import DOCS, section
from vllm_cost_meter.api_server.admission import FIRST_FIGURES_S, FRESH_S_MIN, SNAPSHOTS_MISSED_MAX
from vllm_cost_meter.api_server.refusal import TOO_MANY_REQUESTS, UNAVAILABLE, refusal, warning
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, Standing, Verdict

PAGE = DOCS / "howto" / "budgets.md"
TEXT = " ".join(PAGE.read_text().split())
BERLIN = ZoneInfo("Europe/Berlin")
NOW = int(datetime(2026, 11, 24, 12, tzinfo=BERLIN).timestamp()) * 10**9


def spent() -> Standing:
    budget = Budget("search, November", 500 * 10**9, "usd", "month", BERLIN, tenant="search")
    return Standing(budget, {NOW // (3600 * 10**9): 500_010_000_000}, NOW)


def test_the_error_is_the_one_that_a_client_gets():
    lines = section(PAGE, "What clients see").splitlines()
    shown = "".join(line.strip() + " " for line in lines if line[:4] == "    ")
    told = refusal(
        Verdict("blocked", spent()), Owner("search"), "/v1/chat/completions", is_coarse=False
    )
    assert json.loads(shown) == json.loads(told.body)


def test_headers_statuses_and_numbers_are_those_of_the_code():
    told = refusal(Verdict("blocked", spent()), Owner("search"), "/v1/completions", is_coarse=False)
    names = {
        name.decode()
        for name, _ in (*told.headers, *warning((spent(),), Owner("search"), is_coarse=False))
    }
    assert set(re.findall(r"`(x-[a-z-]+)", TEXT)) == {name for name in names if name[:2] == "x-"}
    assert f"| {TOO_MANY_REQUESTS}, the error below" in TEXT
    assert f"| {UNAVAILABLE}, code `cost_meter_stale`" in TEXT
    assert SNAPSHOTS_MISSED_MAX == 3
    assert f"three intervals (and {FRESH_S_MIN:.0f} s)" in TEXT
    assert f"waits for the first figures, for at most {FIRST_FIGURES_S:.0f} s" in TEXT
    interval_s = Settings.model_fields["snapshot_interval_s"].default
    assert f"(`COST_METER_SNAPSHOT_INTERVAL_S`, {interval_s:.0f} s)" in TEXT
