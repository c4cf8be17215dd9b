"""Economics of real traffic: the side endpoint, the summary, and the SQL run by hand, agree."""

import contextlib
import sqlite3

import pytest

from tests.integration.server import Server
from tests.integration.traffic import ask


def test_figures_of_real_traffic_are_the_summarys_and_their_sql_gives_them(server: Server) -> None:
    with server.client() as client:
        for _ in range(3):
            ask(client, "/v1/completions")
    server.balanced()
    answer, summary = server.cost("economics?window=24h"), server.cost("summary?window=24h")
    figures = answer["figures"]
    for name in ("requests", "prompt_tokens", "output_tokens"):
        assert figures[name] == summary[name] > 0
    assert figures["arrivals"] == figures["requests"]
    assert 0 < figures["utilization"] < 1
    # The later snapshot of the two holds a moment more.
    assert figures["cost_usd"] == pytest.approx(float(summary["cost_usd"]), rel=0.05)
    assert figures["littles_law"] == pytest.approx(figures["concurrency"], rel=0.1)
    assert figures["ttft_p50_ms"] < figures["e2e_p50_ms"] < figures["e2e_p99_ms"]
    (deployment,) = answer["deployments"]
    assert (deployment["model"], deployment["precision"]) == ("tiny", "float32")
    with contextlib.closing(sqlite3.connect(f"file:{server.ledger_file}?mode=ro", uri=True)) as by:
        for step in server.cost("economics/method?window=24h")["figures"]:
            (value,) = by.execute(step["sql"]).fetchone()
            if step["unit"] in ("", None, "ms") and "share" not in step["figure"]:
                told = figures[step["figure"]]
                is_blank = told is None  # the penalty: nobody declared what full load is
                assert value == (None if is_blank else pytest.approx(told, rel=0.05)), step
