"""Tokens that came over a KV connector: apart from cached ones in rows, sums and answers.

A client is told by vLLM that these tokens were cached. The ledger must not take that for the
engine's own cache.
"""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tests.component.ledger.test_reader import HOUR, Ledger, http, part, snapshot
from tests.component.ledger.test_reader import ledger as ledger  # a fixture
from tests.support.upkeep import sql, url_of, wrong_sums
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.economics.query import read_mix
from vllm_cost_meter.ledger.queries.cut import Window
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.ledger.tables.replies import put_beside_bills
from vllm_cost_meter.records.requests import EngineRequest, Usage

COUNTED = ("prompt_tokens", "cached_tokens", "external_tokens", "external_known_tokens")


def received(seq: int, external_tokens: int | None, *, cached_tokens: int = 2) -> EngineRequest:
    """A bill of 10 prompt tokens, some of them cached and some that came over a connector."""
    record = part(seq, f"h{seq}")
    bill = record.bill._replace(cached_tokens=cached_tokens, external_tokens=external_tokens)
    return replace(record, bill=bill)


def counted(ledger: Ledger) -> tuple[int, ...]:
    row = ledger.rows()["alice"]
    return tuple(row[name] for name in COUNTED)


def test_what_the_client_was_told_was_cached_is_not_called_so(ledger, tmp_path):
    ledger.write(received(1, 6, cached_tokens=0), http("h1", Usage(10, 6, 5)))
    (row,) = ledger.reader.look_up("h1")
    assert (row["cached_tokens"], row["external_tokens"]) == (0, 6)
    assert counted(ledger) == (10, 0, 6, 10)
    # What the client was told stays on record, in the row of the bill.
    path = tmp_path / "ledger.db"
    assert sql(path, "SELECT cached_tokens FROM replies") == [(6,)]
    assert sql(path, "SELECT cached_tokens, reply_told & 2 FROM requests") == [(0, 2)]
    assert wrong_sums(path) == []


def test_a_decode_server_that_tells_the_prefill_servers_hits_has_none_of_its_own(ledger, tmp_path):
    ledger.write(received(1, 6, cached_tokens=0), http("h1", Usage(10, 3, 5)))
    assert sql(tmp_path / "ledger.db", "SELECT cached_tokens FROM http_requests") == [(3,)]
    assert ledger.reader.look_up("h1")[0]["cached_tokens"] == 0
    assert counted(ledger) == (10, 0, 6, 10)
    assert wrong_sums(tmp_path / "ledger.db") == []


def test_without_a_connector_the_client_is_believed_as_before(ledger, tmp_path):
    ledger.write(received(1, 0), http("h1", Usage(10, 4, 5)))
    assert ledger.reader.look_up("h1")[0]["cached_tokens"] == 4
    assert counted(ledger) == (10, 4, 0, 10)
    assert wrong_sums(tmp_path / "ledger.db") == []


def test_the_sums_are_the_same_whichever_comes_first(ledger, tmp_path):
    reply, bill = http("h1", Usage(10, 6, 5)), received(1, 6, cached_tokens=0)
    ledger.write(reply)
    ledger.write(bill)
    assert counted(ledger) == (10, 0, 6, 10)
    assert wrong_sums(tmp_path / "ledger.db") == []


def test_a_reply_that_is_put_beside_its_bill_later_says_what_its_client_was_told(ledger, tmp_path):
    path = tmp_path / "ledger.db"
    ledger.write(http("h1", Usage(10, 6, 5)), http("h2", Usage(10, 0, 5)))
    ledger.write(received(1, 6, cached_tokens=0), received(2, 6, cached_tokens=0))
    engine = open_database(url_of(path))
    with writing(engine).begin() as connection:
        put_beside_bills(connection)
    engine.dispose()
    # The second client was told of no cached tokens: that is not what its bill says.
    assert sql(path, "SELECT http_request_id FROM http_requests") == [("h2",)]
    assert sql(path, "SELECT http_request_id, cached_tokens FROM replies ORDER BY 1") == [
        ("h1", 6), ("h2", 0),
    ]  # fmt: skip
    assert wrong_sums(path) == []


def test_choices_share_their_prompt_and_what_came_of_it(ledger, tmp_path):
    choices = [replace(received(n, 6), http_request_id="h1", prompt_group="g") for n in (1, 2)]
    ledger.write(*choices, http("h1"))
    assert counted(ledger) == (10, 2, 6, 10)
    assert ledger.reader.look_up("h1")[0]["external_tokens"] == 6
    assert wrong_sums(tmp_path / "ledger.db") == []


def test_an_unknown_figure_is_null_in_a_row_and_known_of_no_prompt_in_a_sum(ledger, tmp_path):
    ledger.write(received(1, None), http("h1"), received(2, 5), http("h2"))
    assert ledger.reader.look_up("h1")[0]["external_tokens"] is None
    assert counted(ledger) == (20, 4, 5, 10)
    assert wrong_sums(tmp_path / "ledger.db") == []


def test_a_comparison_with_apis_takes_them_for_computed(ledger):
    bill = received(1, 6, cached_tokens=1)
    ledger.write(bill, http("h1", Usage(10, 7, 5)), snapshot([bill]))
    with ledger.reader.at_cut(Window(HOUR, HOUR + 1)) as (connection, cut):
        (sent,) = read_mix(connection, cut)
    assert (sent.prompt_tokens, sent.cached_tokens) == (10, 1)


def test_explain_says_what_came_over_the_connector(ledger):
    bill = received(1, 6, cached_tokens=0)
    ledger.write(bill, http("h1"), snapshot([bill]))
    (row,) = ledger.reader.look_up("h1")
    explained = ledger.reader.explain(row)
    assert explained["parts"][0]["external_tokens"] == 6
    assert explained["parts"][0]["cached"] == {"tokens": 0, "saved_estimate_ns": 0}
    assert (
        "  6 tokens of its prompt came over a KV connector: not computed here" in explained["text"]
    )


# ---- ledgers from before


def as_version_19(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP VIEW replies")
        for table in ("rollup_hours", "rollup_days", "dropped_hours"):
            for column in ("external_tokens", "external_known_tokens"):
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.execute("ALTER TABLE requests DROP COLUMN external_tokens")
        for table in ("requests", "open_requests"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN kv_role")
        connection.execute("UPDATE schema_version SET version = 19")


def test_of_bills_from_before_it_is_unknown_and_never_0(tmp_path):
    path = tmp_path / "ledger.db"
    older = [received(1, None), http("h1", Usage(10, 4, 5)), received(2, None), http("h2")]
    before = Ledger(url_of(path))
    before.write(*older, snapshot(older[::2]))
    before.close()
    as_version_19(path)
    open_database(url_of(path)).dispose()
    assert sql(path, "SELECT version FROM schema_version") == [(SCHEMA_VERSION,)]
    assert sql(path, "SELECT DISTINCT external_tokens, kv_role FROM requests") == [(None, None)]
    now = Ledger(url_of(path))
    assert counted(now) == (20, 6, 0, 0)
    # No bill reads as changed: the digest of what was not known is that of before.
    assert now.audit(full=True)["balanced"]
    now.write(received(3, 5), http("h3"))
    assert counted(now) == (30, 8, 5, 10)
    now.close()
    assert wrong_sums(path) == []


def test_a_figure_that_was_changed_from_outside_is_seen(ledger, tmp_path):
    bill = received(1, 6)
    ledger.write(bill, http("h1"), snapshot([bill]))
    assert ledger.audit(full=True)["balanced"]
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute("UPDATE requests SET external_tokens = 7")
    assert [run["changed"] for run in ledger.audit(full=True)["runs"]] == [True]
