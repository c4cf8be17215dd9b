"""Every index is one that a question uses, and no question about few requests reads them all.

Method: the statements of a question are noted, and SQLite is asked how it would run each.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event

from tests.component.ledger.test_reader import HOUR, Ledger, http, ledger, part, snapshot
from tests.support.statements import statements
from tests.support.upkeep import sql
from vllm_cost_meter.ledger.database import open_database, url_of
from vllm_cost_meter.ledger.queries.seen import unseen
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import metadata, not_derived
from vllm_cost_meter.records.owner import Owner

__all__ = ["ledger"]

LARGE = ("requests", "http_requests")


def plans_of(ledger: Ledger, ask: Callable[[LedgerReader], object]) -> str:
    """Return SQLite's plans for all statements of a question, a step on each line."""
    statements: list[tuple[str, tuple[object, ...]]] = []
    with LedgerReader(ledger.reader.url) as reader:
        with reader.transaction() as connection:
            engine = connection.engine

        def note(_connection, _cursor, statement, parameters, *_) -> None:
            if statement.startswith(("SELECT", "WITH")):
                statements.append((statement, parameters))

        event.listen(engine, "before_cursor_execute", note)
        ask(reader)
    assert statements
    with closing(sqlite3.connect(engine.url.database)) as connection:
        return "\n".join(
            step[3]
            for statement, parameters in statements
            for step in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
        )


@pytest.fixture
def full(ledger):
    """A ledger with some exchanges, of which a tenant below another one has some."""
    below = Owner("web", parent="search")
    parts = [
        replace(part(n, f"h{n}"), owner=below if n % 3 == 0 else Owner(f"tenant-{n % 7}"))
        for n in range(1, 41)
    ]
    told = [
        replace(http(f"h{n}", at=n), owner=parts[n - 1].owner, x_request_id=f"x-{n}" * (n % 5 == 0))
        for n in range(1, 41)
    ]
    ledger.write(*parts, *told, snapshot(parts))
    return ledger


@pytest.mark.parametrize(
    ("index", "ask"),
    [
        ("ix_requests_request_id", lambda reader: reader.find("internal-3")),
        ("ix_requests_external_id", lambda reader: reader.find("external-3")),
        ("ix_requests_response_id", lambda reader: reader.find("resp-h3")),
        ("ix_requests_http", lambda reader: reader.look_up("h3")),
        ("ix_requests_ended_at", lambda reader: reader.requests(limit=3)),
        ("ix_requests_x_request_id", lambda reader: reader.find("x-h3")),
        ("ix_http_requests_response_id", lambda reader: reader.find("resp-h3")),
        ("ix_http_requests_x_request_id", lambda reader: reader.find("x-h3")),
        ("ix_http_requests_finished", lambda reader: reader.requests(limit=3)),
        ("ix_http_requests_tenant", lambda reader: reader.requests(tenant="web", limit=3)),
        ("ix_rollup_groups_tenant", lambda reader: reader.requests(tenant="search", limit=3)),
        ("ix_requests_tenant", lambda reader: reader.requests(tenant="search", limit=3)),
    ],
)
def test_an_index_serves_the_question_it_is_there_for(full, index, ask):
    assert f" USING INDEX {index}" in (plans := plans_of(full, ask)) or (
        f" USING COVERING INDEX {index}" in plans
    ), plans


def test_there_is_no_index_of_bills_that_serves_no_question():
    tested = {
        argument[0]
        for mark in test_an_index_serves_the_question_it_is_there_for.pytestmark
        for argument in mark.args[1]
    }
    tables = (*LARGE, "usage_pieces", "rollup_groups")
    assert {index.name for name in tables for index in metadata.tables[name].indexes} == tested


@pytest.mark.parametrize(
    "ask",
    [
        lambda reader: reader.look_up("h3"),
        lambda reader: reader.look_up("x-h5"),
        lambda reader: reader.look_up("nobody's"),
        lambda reader: reader.requests(limit=3),
        lambda reader: reader.requests(tenant="web", limit=3),
        lambda reader: reader.requests(tenant="search", limit=3),
        lambda reader: _unseen(reader),
    ],
)
def test_no_question_about_few_requests_reads_all_of_them(full, ask):
    plans = plans_of(full, ask)
    scans = [step for step in plans.splitlines() if step.startswith("SCAN ")]
    whole = [step for step in scans if step.split()[1] in LARGE and " USING " not in step]
    assert not whole, plans


def test_for_a_bill_without_an_exchange_no_reply_is_looked_for(ledger):
    """All such bills would be read for that."""
    ledger.write(part(1, None))
    with statements() as asked:
        assert ledger.reader.look_up("internal-1")
    assert not [one for one in asked if "FROM replies" in one]


def _unseen(reader: LedgerReader) -> None:
    with reader.transaction() as connection:
        assert unseen(connection, ["web", "other"]) == ["other"]


def test_a_bill_of_nothing_is_listed_for_the_tenant_above_it(ledger):
    nothing = part(1, None, pieces=())
    nothing = replace(
        nothing,
        owner=Owner("web", parent="search"),
        bill=nothing.bill._replace(
            prompt_tokens=0, cached_tokens=0, output_tokens=0,
            pieces=(part(1).bill.pieces[0]._replace(
                hour=HOUR, prefill_ns=0, decode_ns=0, prefill_tokens=0, decode_tokens=0),),
        ),
    )  # fmt: skip
    ledger.write(nothing)
    assert len(ledger.reader.requests(tenant="search")["requests"]) == 1


def test_a_ledger_that_was_migrated_has_the_indexes_of_a_new_one(tmp_path):
    new, old = tmp_path / "new.db", tmp_path / "old.db"
    open_database(url_of(new)).dispose()
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript((Path(__file__).parent / "ledger_v1.sql").read_text())
    open_database(url_of(old)).dispose()
    listed = "SELECT name, sql FROM sqlite_master WHERE type='index' AND sql IS NOT NULL"
    assert dict(sql(old, listed)) == dict(sql(new, listed))


DIGITS = "0123456789abcdef"
# vLLM's internal id with the engine's external id and that of the response, as its APIs make them,
# with ids that clients choose, and with others.
RELATED = [
    (f"cmpl-{DIGITS}-0-89abcdef", f"cmpl-{DIGITS}-0", f"cmpl-{DIGITS}"),
    (f"chatcmpl-{DIGITS}-89abcdef", f"chatcmpl-{DIGITS}", f"chatcmpl-{DIGITS}"),
    ("cmpl-mine-0-89abcdef", "cmpl-mine-0", "cmpl-mine"),
    ("cmpl-a/b-0-89abcdef", "cmpl-a/b-0", "cmpl-a/b"),
    (f"cmpl-{DIGITS}{DIGITS}-0", f"cmpl-{DIGITS}", "cmpl-0123"),
    ("ünï-0-89abcdef", "ünï-0", "ünï"),
    ("internal", "external", f"resp_{DIGITS}"),
    ("alone", None, None),
]


def test_a_bill_without_a_reply_is_found_by_each_of_its_ids_whatever_they_have_in_common(ledger):
    bills = [
        replace(
            part(seq, None),
            bill=part(seq, None).bill._replace(request_id=internal),
            external_id=external,
            response_id=response,
        )
        for seq, (internal, external, response) in enumerate(RELATED, 1)
    ]
    ledger.write(*bills)
    for bill in bills:
        for id in {bill.bill.request_id, bill.external_id, bill.response_id} - {None}:
            whose = {other.bill.seq for other in bills if id in _ids_of(other)}
            assert {match.seq for match in ledger.reader.find(id)} == whose, id


def _ids_of(part):
    return part.bill.request_id, part.external_id, part.response_id


def test_by_the_id_of_a_response_bills_are_found_in_the_index_of_vllms_own_ids(ledger):
    internal, external, response = RELATED[0]
    bill = part(1, None).bill._replace(request_id=internal)
    ledger.write(replace(part(1, None), bill=bill, external_id=external, response_id=response))
    assert "INDEX ix_requests_request_id" in plans_of(ledger, lambda reader: reader.find(response))
    with closing(sqlite3.connect(ledger.url.removeprefix("sqlite:///"))) as connection:
        for id_column in ("response_id", "external_id"):
            index = f"ix_requests_{id_column}"
            counted = (
                f"SELECT count(*) FROM requests INDEXED BY {index} WHERE {not_derived(id_column)}"
            )
            assert connection.execute(counted).fetchone() == (0,)
