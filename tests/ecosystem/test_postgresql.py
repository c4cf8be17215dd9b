"""The ledger in a real PostgreSQL: what it cannot take stops nothing else; answers are SQLite's.

Method: one set of records goes through the writer into PostgreSQL, into SQLite, and by two servers'
ledgers into the database of a fleet. Every question of the reader must have the same answer from
all of them.
"""

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from tests.component.ledger.test_reader import HOUR, NOW, http, part, snapshot
from tests.ecosystem.postgresql import Server
from tests.support.builders import make_open
from tests.support.fleet import sent
from tests.support.ledger_writer import LedgerWriter
from tests.support.older import as_version_17
from tests.support.world import BODY, JSON, World, journal, replying, scope_of
from vllm_cost_meter.api_server.budgets.looks import BudgetLooks
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.errors import LedgerError, OverdueError
from vllm_cost_meter.journal.places import LEDGER_MARK_NAME, make_folder_of_journals
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.deadline import Deadline, deadline
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.fleet.upkeep import migrate_fleet
from vllm_cost_meter.ledger.journal_place import journal_folder
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.retention.dropping import drop_rows
from vllm_cost_meter.ledger.rollups.rebuilding import rebuild
from vllm_cost_meter.ledger.schema import metadata, not_derived, usage_pieces
from vllm_cost_meter.ledger.tables.replies import drop_views
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.client_text import stored
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget

# An index of PostgreSQL takes no more than 2,700 bytes, after it has packed what repeats.
LONG = "".join(random.Random(1).choices(string.ascii_letters, k=8_000))
BLOCKS_USD = Decimal("0.25")
BOOK = PriceBook(
    [PriceEntry("prices[0]", Decimal("2.5"), "list", None, usd_per_kv_block_hour=BLOCKS_USD)]
)
AS_OF = AsOf(now_ns=NOW)
TAGGED = {"team": "blue"}
# Names that a human language sorts otherwise than bytes, or takes for one another.
OWNERS = [
    Owner("search", NamedBy("api_key"), tags=TAGGED),
    Owner("Search", NamedBy("api_key")),
    Owner("search-2", NamedBy("api_key"), tags={"team": "Blue"}),
    Owner("search/web", NamedBy("api_key"), NamedBy("user"), "search", TAGGED),
    Owner("sea rch", NamedBy("header", "x-tenant")),
    Owner("lab", NamedBy("api_key"), parent="search", higher=("group",)),
    Owner("unknown"),
    Owner("söl", NamedBy("api_key")),
]


@pytest.fixture
def writer(url: str) -> Iterator[LedgerWriter]:
    writer = LedgerWriter(url)
    writer.start()
    yield writer
    writer.close()


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(query))]
    finally:
        engine.dispose()


@pytest.mark.parametrize(
    ("table", "id_column"),
    [
        ("requests", "external_id"),
        ("requests", "response_id"),
        ("http_requests", "response_id"),
        ("http_requests", "x_request_id"),
    ],
)
@pytest.mark.parametrize("of", ["= 'a'", "IN ('a', 'b')"])
def test_an_index_of_some_rows_serves_who_asks_for_one(
    url: str, table: str, id_column: str, of: str
) -> None:
    open_database(url).dispose()
    # PostgreSQL would read all rows of an empty table.
    by_index = f"{url}&options=-cenable_seqscan%3Doff"
    only = f" AND {not_derived(id_column)}" if table == "requests" else ""
    plan = rows(by_index, f"EXPLAIN SELECT 1 FROM {table} WHERE {id_column} {of}{only}")
    assert f"ix_{table}_{id_column}" in str(plan)


# ---- what PostgreSQL cannot take


@pytest.mark.parametrize("bad", [LONG, "a\0b"], ids=["too long for an index", "a NUL"])
@pytest.mark.parametrize("kind", ["bill", "HTTP request", "open request"])
def test_a_record_with_a_text_that_postgresql_cannot_take_is_dropped_alone(
    url: str, bad: str, kind: str
) -> None:
    record = {
        "bill": part(7, tenant=bad),
        "HTTP request": http(bad),
        "open request": make_open(request_id=bad),
    }[kind]
    # In one batch with others, before and after it.
    before = [*(part(seq, f"h{seq}") for seq in range(1, 5)), http("h1")]
    after = [*(part(seq, f"h{seq}") for seq in range(8, 11)), http("h8")]
    batches = BatchWriter(url)
    (refused,) = batches.write([*before, record, *after])
    batches.drop()
    assert refused.record is record
    assert re.search(r"index row|NUL", str(refused.error))
    seqs = [1, 2, 3, 4, 8, 9, 10]
    assert rows(url, "SELECT seq FROM requests ORDER BY seq") == [(seq,) for seq in seqs]
    assert rows(url, "SELECT http_request_id FROM replies ORDER BY 1") == [("h1",), ("h8",)]


def test_ids_that_clients_choose_are_stored_whatever_they_are(tmp_path: Path, url: str) -> None:
    world = World(tmp_path, ledger=url)
    long, nul = LONG.encode(), b"a\0b"

    def generate(id: str) -> None:
        world.engine.born(f"{id}-internal", id)
        world.engine.billed(stored(f"{id}-internal"))

    for said in (long, nul):
        # vLLM makes its ids of the client's, and the engine sends them in the stored form.
        id = f"cmpl-{said.decode()}-0"
        app = replying(JSON, [BODY], lambda id=id: generate(id))
        client = world.run(app, scope_of(headers=[(b"x-request-id", said)]))
        assert client.status == 200
        assert b"x-cost-meter-gpu-seconds" in client.ours
    journal(world.runtime)
    world.runtime.writer.close(5)
    with LedgerReader(url) as reader:
        assert [len(reader.find(said.decode())) for said in (long, nul)] == [1, 1]
    bounded = "SELECT max(length(x_request_id)), max(length(response_id)) FROM replies"
    assert rows(url, bounded) == [(256, 256)]
    assert rows(url, "SELECT count(*) FROM requests") == [(2,)]
    assert world.runtime.writer.dropped == 0


# ---- the same answers as from SQLite


def written(url: str, runs: Sequence[str] = ("run", "Run 2"), *, are_split: bool = False) -> None:
    """Write two runs with bills of several tenants over three hours, energy, and one that runs.

    With `are_split` one computes prompts for the other, which gets them over a KV connector.
    """
    writer = LedgerWriter(url)
    writer.start()
    for run in runs:
        bills = [_bill(run, seq) for seq in range(1, 25)]
        replies = [http(f"{run}-{n}", at=n, owner=OWNERS[n % len(OWNERS)]) for n in range(1, 25)]
        if are_split:
            bills = [_half(run, each) for each in bills]
            replies = [
                replace(each, x_request_id=f"router-{n}") for n, each in enumerate(replies, 1)
            ]
        writer.commit(*bills, *replies, _state(run, bills)).result(30)
    writer.commit(make_open(request_id="open", http_request_id="h-open", owner=OWNERS[0])).result(
        30
    )
    writer.close()


def _bill(run: str, seq: int) -> Any:
    pieces = tuple(
        UsagePiece(HOUR - hour, 100 * seq, 7 * seq, 8, 5, kv_block_ms=40 * seq)
        for hour in range(seq % 3 + 1)
    )
    owner = OWNERS[seq % len(OWNERS)]
    return part(seq, f"{run}-{seq}", run_id=run, pieces=pieces, owner=owner)


def _half(run: str, each: Any) -> Any:
    """Return a bill as the prefill server or the decode server has it; one in five is unknown."""
    if each.bill.seq % 5 == 0:
        return each
    is_decode = run == "Run 2"
    bill = each.bill._replace(external_tokens=6 if is_decode else 0, cached_tokens=2)
    return replace(each, bill=bill, kv_role=KV_CONSUMER if is_decode else KV_PRODUCER)


def _state(run: str, bills: list[Any]) -> Any:
    billed = sum(each.bill.gpu_time_ns for each in bills)
    energy = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": 720, "idle": 5}
    hours = dict.fromkeys((HOUR - 2, HOUR - 1), ClassTotals())
    for each in bills:
        for piece in each.bill.pieces:
            old = hours.get(piece.hour, ClassTotals())
            ns = piece.prefill_ns + piece.decode_ns
            hours[piece.hour] = ClassTotals(requests=old.requests + ns)
    idle = ClassTotals(requests=hours[HOUR].requests, idle=1000, tail=3)
    reported = tuple(RequestEnergy(seq, HOUR, 30, None) for seq in range(1, 25))
    return snapshot(
        bills,
        run_id=run,
        totals=ClassTotals(requests=billed, idle=1000, tail=3),
        hours={**hours, HOUR: idle},
        energy=RunEnergy(725, None, 0, energy, (), {HOUR: energy}, reported),
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[list[LedgerReader]]:
    """Return readers of the same in SQLite, in PostgreSQL, and in fleets with and without days."""
    folder = tmp_path_factory.mktemp("both")
    urls = [f"sqlite:///{folder / 'ledger.db'}", server.new_database()]
    for each in urls:
        written(each, are_split=True)
    fleets = [server.new_database(), server.new_database()]
    migrate_fleet(fleets[1], by_day=True)
    for name in ("run", "Run 2"):
        for number, fleet in enumerate(fleets):
            url = f"sqlite:///{folder / name}-{number}.db"
            if name == "run":  # the other one joins with what it had
                sent(url, fleet)
            written(url, [name], are_split=True)
            sent(url, fleet, stops=True)
    readers = [LedgerReader(each, book=BOOK) for each in (*urls, *fleets)]
    yield readers
    for reader in readers:
        reader.close()


def same(both: list[LedgerReader], ask: Callable[[LedgerReader], Any]) -> Any:
    """Ask all; return the answer that they must have in common."""
    of_sqlite, *others = (ask(reader) for reader in both)
    for other in others:
        assert other == of_sqlite
    return of_sqlite


@pytest.mark.parametrize(
    "aggregate", ["tenant", "tenant,model", "tag:team", "hour,status", "day,model,route"]
)
@pytest.mark.parametrize("idle", ["none", "proportional"])
def test_reports_are_the_same(both: list[LedgerReader], aggregate: str, idle: str) -> None:
    told = same(both, lambda r: r.report(aggregate=aggregate, idle=idle, as_of=AS_OF))
    assert told["series"][0]["rows"]


def test_every_bill_and_its_explanation_are_the_same(both: list[LedgerReader]) -> None:
    pages = same(both, lambda reader: list(_pages(reader)))
    shown = [row for page in pages for row in page["requests"]]
    assert len(shown) == 48
    for row in shown:
        one = same(both, lambda reader, row=row: reader.request(row["http_request_id"], AS_OF))
        same(both, lambda reader, one=one: reader.explain(one))


def test_the_halves_of_a_request_are_the_same_answer(both: list[LedgerReader]) -> None:
    for n in range(1, 25):
        told = same(both, lambda reader, n=n: reader.look_up(f"router-{n}"))
        same(both, lambda reader, told=told: [reader.explain(row) for row in told])
        costs = [row["cost_nanousd"] for row in told]
        # Of one in five nobody knows that it was split.
        assert costs == ([7, 7] if n % 5 == 0 else [14])
        assert all(row["external_tokens"] == (None if n % 5 == 0 else 6) for row in told)


def _pages(reader: LedgerReader) -> Iterator[Any]:
    after = None
    while True:
        yield (page := reader.requests(10, after, as_of=AS_OF))
        if (after := page["next"]) is None:
            return


@pytest.mark.parametrize("covers", ["own", "with_children"])
@pytest.mark.parametrize("name", sorted({owner.tenant for owner in OWNERS} | {"group"}))
def test_a_tenant_is_the_same_whatever_a_language_sorts_alike(
    both: list[LedgerReader], name: str, covers: Any
) -> None:
    asked = {"covers": covers, "as_of": AS_OF}
    same(both, lambda reader: reader.tenant(name, only=name, **asked))
    same(both, lambda reader: reader.requests(tenant=name, **asked))


@pytest.mark.parametrize("tenant", [None, "search", "Search", "group"])
def test_statements_are_the_same(both: list[LedgerReader], tenant: str | None) -> None:
    asked = {"tenant": tenant, "idle": "proportional", "as_of": AS_OF}
    assert same(both, lambda reader: reader.statement("2027-01", **asked))["lines"]


def test_the_audit_finds_all_balanced(both: list[LedgerReader]) -> None:
    for full in (False, True):
        same(both, lambda reader, full=full: {**reader.audit(AS_OF, full=full), "fleet": None})
        assert [reader.audit(AS_OF, full=full)["balanced"] for reader in both] == [True] * len(both)
    *ledgers, one, by_day = (reader.audit(AS_OF)["fleet"] for reader in both)
    whole = {"senders": 2, "runs": 2, "complete_runs": 2, "incomplete": [], "unsent": []}
    assert (ledgers, one, by_day) == ([None, None], whole, whole)


def test_summary_tenants_models_and_what_was_seen_are_the_same(both: list[LedgerReader]) -> None:
    same(both, lambda reader: reader.summary(as_of=AS_OF))
    same(both, lambda reader: reader.tenants(as_of=AS_OF))
    same(both, lambda reader: reader.cost_models())
    same(both, lambda reader: reader.invoice_days(as_of=AS_OF))
    names = ["search", "SEARCH", "sea", "group", "söl"]
    assert same(both, lambda reader: reader.unseen(names)) == ["SEARCH", "sea", "group"]
    tags = [("team", "blue"), ("team", "BLUE"), ("team", "b%")]
    assert same(both, lambda reader: reader.unseen_tags(tags)) == tags[1:]


def test_economics_are_the_same_to_the_last_digits(both: list[LedgerReader]) -> None:
    of_each = [economics(each, Declared(), as_of=AS_OF) for each in both]
    figures = [each.pop("figures") for each in of_each]
    assert of_each[1:] == of_each[:1] * 3
    # Databases add up floating point numbers in orders of their own.
    known = [{n: v for n, v in each.items() if v is not None} for each in figures]
    for other in known[1:]:
        assert other == pytest.approx(known[0], rel=1e-12)
    assert len(known[0]) > 20
    assert known[0]["kv_cost_usd"] > 0


def test_budgets_stand_at_the_same_amounts(both: list[LedgerReader]) -> None:
    scopes = [{"tenant": owner.tenant} for owner in OWNERS]
    scopes += [{"tenant": "group"}, {"tag": ("team", "blue")}]
    budgets = [
        Budget(f"b{number}", 10**9, unit, "rolling", days=36_500, **scope)
        for number, scope in enumerate(scopes)
        for unit in ("usd", "gpu_seconds")
    ]

    def used(reader: LedgerReader) -> list[tuple[str, int | None]]:
        looks = BudgetLooks(reader.url)
        try:
            while (figures := looks.look(budgets, BOOK)) is None or not figures.standings:
                pass
            return [(each.budget.name, each.total) for each in figures.standings]
        finally:
            looks.close()

    assert len({amount for _, amount in same(both, used)}) > 5


def test_rows_are_dropped_and_all_answers_stay(tmp_path: Path, url: str) -> None:
    urls = [f"sqlite:///{tmp_path / 'ledger.db'}", url]
    answers = []
    for each in urls:
        written(each)
        before = _figures(each)
        engine = open_database(each)
        assert drop_rows(engine, HOUR + 16).bills == 48
        assert _figures(each) == before
        written(each)  # an old journal
        assert _figures(each) == before
        with writing(engine).begin() as connection:
            rebuild(connection)
        engine.dispose()
        assert _figures(each) == before
        answers.append(before)
    assert answers[0] == answers[1]
    assert answers[0][0]["balanced"] is True
    assert rows(url, "SELECT count(*) FROM requests") == [(0,)]


def test_a_ledger_of_the_version_before_is_packed_and_every_answer_stays(url: str) -> None:
    written(url)
    before = _figures(url)
    columns = "SELECT table_name, column_name, data_type FROM information_schema.columns"
    types = f"{columns} WHERE table_schema = current_schema() ORDER BY 1, ordinal_position"
    today = rows(url, types)
    several_hours = rows(url, "SELECT count(*) FROM requests WHERE hour IS NULL")
    engine = create_engine(url)
    with engine.begin() as connection:
        as_version_17(connection.exec_driver_sql)
        for table, column in (
            *(("requests", "started_at"), ("requests", "finished_at")),
            *(("http_requests", "started_at"), ("http_requests", "finished_at")),
            ("open_requests", "started_at"),
        ):
            as_text = '\'YYYY-MM-DD"T"HH24:MI:SS.US"Z"\''
            connection.exec_driver_sql(
                f"ALTER TABLE {table} ALTER COLUMN {column} TYPE TEXT USING"
                f" to_char(to_timestamp({column} / 1e6) AT TIME ZONE 'UTC', {as_text})"
            )
        pieces = ", ".join(column.name for column in usage_pieces.c)
        connection.exec_driver_sql(
            f"INSERT INTO usage_pieces ({pieces}) SELECT {pieces} FROM requests"
            " WHERE hour IS NOT NULL"
        )
        for column in ("hour", "charge_error_ns"):
            connection.exec_driver_sql(f"ALTER TABLE requests DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE schema_version SET version = 13")
    engine.dispose()
    assert rows(url, types) != today
    open_database(url).dispose()
    assert rows(url, types) == today
    assert rows(url, "SELECT count(*) FROM requests WHERE hour IS NULL") == several_hours
    assert _figures(url) == before


def _figures(url: str) -> list[Any]:
    with LedgerReader(url, book=BOOK) as reader:
        audit = {**reader.audit(AS_OF, full=True), "rows_kept_from": None, "fleet": None}
        reports = [reader.tenants(*hours, as_of=AS_OF) for hours in ((), (HOUR - 1, HOUR))]
        return [audit, *reports, reader.report(aggregate="tenant,hour", as_of=AS_OF)]


# ---- what only a server does


def test_a_bill_that_is_committed_late_counts_for_its_budget(
    writer: LedgerWriter, url: str
) -> None:
    budgets = [Budget("b", 10**9, "gpu_seconds", "rolling", days=36_500, tenant="alice")]
    looks = BudgetLooks(url)
    used = []
    for number, seqs in enumerate(((1, 4), (3,), (2,)), 1):
        bills = [part(seq, f"h{seq}") for seq in seqs]
        writer.commit(*bills, snapshot(bills, number)).result(30)
        figures = looks.look(budgets, BOOK)
        assert figures is not None
        used.append(figures.standings[0].total)
    looks.close()
    assert used == [600, 900, 1_200]


def test_what_two_writers_bring_at_the_same_time_is_added_up_once(url: str) -> None:
    bills = [part(seq, f"h{seq}") for seq in range(1, 9)]
    classes = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": 8 * 30}
    told = tuple(RequestEnergy(seq, HOUR, 30, None) for seq in range(1, 9))
    energy = RunEnergy(8 * 30, None, 0, classes, (), {HOUR: classes}, told)
    state = snapshot(bills, totals=ClassTotals(requests=8 * 300), energy=energy)
    replies = [http(f"h{seq}") for seq in range(1, 9)]
    open_database(url).dispose()
    both = [LedgerWriter(url) for _ in range(2)]
    for one in both:
        one.start()
    written = [one.commit(*bills, *replies, state) for _ in range(5) for one in both]
    for each in written:
        each.result(30)
    for one in both:
        one.close()
    assert rows(url, "SELECT bills, gpu_time_ns FROM bill_sums") == [(8, 8 * 300)]
    assert rows(url, "SELECT energy_mj FROM energy_sums") == [(8 * 30,)]
    assert rows(url, "SELECT SUM(requests) FROM rollup_hours") == [(8,)]
    with LedgerReader(url) as reader:
        assert reader.audit(AS_OF, full=True)["balanced"]


def test_a_question_that_takes_too_long_is_ended_by_the_server(
    writer: LedgerWriter, url: str
) -> None:
    writer.commit(http("h1")).result(30)
    token = deadline.set(Deadline(0.2))
    try:
        with (
            LedgerReader(url) as reader,
            pytest.raises(OverdueError, match=r"longer than 0\.2 s"),
            reader.transaction() as connection,
        ):
            connection.execute(text("SELECT pg_sleep(60)"))
    finally:
        deadline.reset(token)


def test_a_database_that_lost_its_ledger_gets_no_new_one(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    make_folder_of_journals(journal_folder(url))
    batches = BatchWriter(url)
    engine = batches.opened()
    with engine.begin() as connection:
        drop_views(connection)
        metadata.drop_all(connection)
    batches.drop()
    with pytest.raises(LedgerError, match="There was one, so no other is begun"):
        batches.opened()
    mark = journal_folder(url) / LEDGER_MARK_NAME
    mark.unlink()
    again = BatchWriter(url)
    again.opened()
    again.drop()
    assert mark.exists()
