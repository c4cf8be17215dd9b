"""Drawn ledgers over several days, whose old rows a test drops; and all figures that must stay."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from tests.component.ledger.test_reader import http, part
from tests.support.builders import make_open, make_snapshot, reply_of
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import EnergyPrice, PriceBook, PriceEntry
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Usage
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals, Snapshot
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_HOUR

NS = NS_PER_HOUR
# A midnight, UTC, from which on the worlds have some days.
FIRST = 500_016
DAYS = 4
NOW_HOUR = FIRST + (DAYS + 1) * 24
NOW = NOW_HOUR * NS
AT = AsOf(NOW, 0)
MONTH = datetime.fromtimestamp(FIRST * 3600, UTC).strftime("%Y-%m")
OWNERS = (
    Owner("alice"),
    Owner("alice/web", NamedBy("api_key"), NamedBy("user"), "alice", {"team": "blue"}),
    Owner("bob", NamedBy("api_key"), parent="group", higher=("all",)),
)
NAMES = ("alice", "alice/web", "bob", "group", "all")
BOOK = PriceBook(
    [
        PriceEntry("prices[0]", Decimal("2.5"), "list", None),
        PriceEntry("prices[1]", Decimal("3.7"), "list", FIRST + 30),
    ],
    energy_prices=[
        EnergyPrice("energy_prices[0]", Decimal("0.3"), "the bill", FIRST - 1000),
        EnergyPrice("energy_prices[1]", Decimal("0.4"), "the bill", FIRST + 50),
    ],
)
BUDGETS = [
    Budget("alice", 10**30, "usd", "rolling", tenant="alice", days=4),
    Budget("blue", 10**30, "gpu_seconds", "month", tag=("team", "blue")),
    Budget("bob", 10**30, "gpu_seconds", "rolling", tenant="bob", days=2),
]
WINDOWS = (
    (None, None),
    (FIRST + 1, FIRST + 25),
    (FIRST + 24, FIRST + 48),
    (None, FIRST + 47),
    (FIRST + 71, None),
)

hours = st.integers(FIRST - 1, FIRST + 24 * DAYS)
# Around midnights much happens.
near = st.integers(0, DAYS).flatmap(
    lambda day: st.integers(-2, 2).map(lambda h: FIRST + 24 * day + h)
)
some_hour = hours | near
times = st.none() | st.floats(0, 10_000)
tokens = st.none() | st.integers(0, 9)
exchange_ids = st.sampled_from(["h1", "h2", "h3", "h4", "h5"])
owners = st.sampled_from(OWNERS)


@dataclass(frozen=True)
class OldWorld:
    """Records by exchange, snapshots, and open requests."""

    exchanges: dict[str, list[Record]]
    states: list[Record]

    def records(self) -> list[Record]:
        return [record for some in self.exchanges.values() for record in some] + self.states


@st.composite
def bills(draw: st.DrawFn, run: str) -> list[EngineRequest]:
    found = []
    for seq in range(1, draw(st.integers(0, 7)) + 1):
        spent = draw(st.dictionaries(some_hour, st.integers(0, 50), max_size=3))
        pieces = tuple(UsagePiece(hour, ns, 2 * ns, 3, 4) for hour, ns in sorted(spent.items()))
        if draw(st.booleans()):  # The error of a bill is known in all of its hours or in none.
            pieces = tuple(p._replace(charge_error_ns=p.prefill_ns // 3) for p in pieces)
        ended = draw(some_hour)
        made = part(
            seq,
            draw(exchange_ids | st.none()),
            run_id=run,
            pieces=pieces,
            status=draw(st.sampled_from(["stop", "abort"])),
        )
        made = replace(
            made,
            bill=made.bill._replace(request_id=f"{run}-{seq}"),
            owner=draw(owners),
            model=draw(st.sampled_from([None, "m", "n"])),
            prompt_group=draw(st.sampled_from(["p", "q"])),
            finished_at_ns=ended * NS + seq,
            started_at_ns=min(ended, draw(some_hour)) * NS + 1,
            latencies=Latencies(1.0, draw(times), draw(times), draw(times)),
        )
        found.append(made)
    return found


def totals_of(hours: dict[int, ClassTotals]) -> ClassTotals:
    return ClassTotals(**{n: sum(getattr(h, n) for h in hours.values()) for n in CLASSES})


@st.composite
def state(draw: st.DrawFn, run: str, mine: list[EngineRequest]) -> Snapshot:
    """What an honest engine says of its first bills, with their energies."""
    told = draw(st.sampled_from([len(mine), max(0, len(mine) - 1)]))
    spent = {FIRST: ClassTotals(idle=1000)}
    for one in mine[:told]:
        for piece in one.bill.pieces:
            spent.setdefault(piece.hour, ClassTotals()).requests += piece.gpu_time_ns
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        reported = []
        for one in mine[:told]:
            for piece in one.bill.pieces:
                mj = draw(st.none() | st.integers(0, 99))
                if draw(st.integers(0, 5)):
                    why = "gap" if mj is None else None
                    reported.append(RequestEnergy(one.bill.seq, piece.hour, mj, why))
        of_requests = sum(each.energy_mj or 0 for each in reported)
        classes = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": of_requests, "idle": 5}
        changes["energy"] = RunEnergy(
            of_requests + 5, None, 0, classes, (), {FIRST: classes}, tuple(reported)
        )
    lives = draw(st.booleans())
    return make_snapshot(
        run_id=run,
        taken_at_ns=NOW if lives else NOW - 100 * 10**9,
        started_at_ns=FIRST * NS,
        totals=totals_of(spent),
        hours=spent,
        last_seq=told,
        billed_ns=sum(one.bill.gpu_time_ns for one in mine[:told]),
        **changes,
    )


@st.composite
def replies(draw: st.DrawFn) -> list[HttpRequest]:
    ids = draw(st.frozensets(exchange_ids | st.sampled_from(["e1", "e2"])))
    return [
        replace(
            http(id, Usage(draw(tokens), draw(tokens), draw(tokens))),
            owner=draw(owners),
            finished_at_ns=draw(some_hour) * NS + 1,
        )
        for id in sorted(ids)
    ]


@st.composite
def old_worlds(draw: st.DrawFn) -> OldWorld:
    """Two runs, perhaps a third without totals; exchanges of one or several parts; what is open."""
    exchanges: dict[str, list[Record]] = {}
    states: list[Record] = []
    for run in ("run-1", "run-2", "bare"):
        mine = draw(bills(run))
        for one in mine:
            id = one.http_request_id or f"{run}/{one.bill.seq}"
            exchanges.setdefault(id, []).append(one)
        if run != "bare":
            states.append(draw(state(run, mine)))
    for reply in draw(replies()):
        of_exchange = exchanges.setdefault(reply.http_request_id, [])
        parts = [one for one in of_exchange if isinstance(one, EngineRequest)]
        says_the_same = parts and draw(st.booleans())
        of_exchange.append(
            reply_of(draw(st.sampled_from(parts)), reply) if says_the_same else reply
        )
    for id in draw(st.frozensets(exchange_ids, max_size=2)):
        at_ns = draw(some_hour) * NS
        states.append(make_open(request_id=f"open-{id}", http_request_id=id, started_at_ns=at_ns))
    return OldWorld(exchanges, states)


# ---- all figures


def figures(url: str) -> Iterator[tuple[str, Any]]:
    """Yield every figure of a ledger that must not depend on whether rows were dropped."""
    reader = LedgerReader(url, book=BOOK)
    try:
        for window in WINDOWS:
            yield f"tenants {window}", reader.tenants(*window, as_of=AT)
            yield f"summary {window}", reader.summary(*window, as_of=AT)
            yield f"economics {window}", _economics(reader, window)
        for name in NAMES:
            for covers in ("own", "with_children"):
                found = reader.tenant(name, *WINDOWS[3], covers=covers, as_of=AT)
                yield f"{name} {covers}", None if found is None else {**found, "recent": None}
        for aggregate, idle in (("tenant,hour", "proportional"), ("day,status,tag:team", "none")):
            yield aggregate, reader.report(aggregate=aggregate, idle=idle, as_of=AT)
        yield "statement", reader.statement(MONTH, as_of=AT)
        yield "audit", _audit(reader, full=False)
        yield "full audit", _audit(reader, full=True)
        yield "tags", reader.unseen_tags([("team", "blue"), ("team", "red")])
    finally:
        reader.close()
    follower = Spending(url)
    try:
        yield "budgets", standings(follower)
    finally:
        follower.close()


def standings(follower: Spending) -> Any:
    """Return where the budgets stand."""
    return follower.look(BUDGETS, BOOK, NOW).standings


def _economics(reader: LedgerReader, window: tuple[int | None, int | None]) -> Any:
    found = economics(reader, Declared(), *window, as_of=AT)
    # These are read from rows while there are few.
    shown = {name: of for name, of in found["figures"].items() if "_p50" not in name}
    shown = {name: of for name, of in shown.items() if "_p99" not in name}
    return {**found, "figures": shown, "rows_kept_from": None}


def _audit(reader: LedgerReader, *, full: bool) -> Any:
    audit = reader.audit(AT, full=full)
    runs = [{**run, "unbilled_replies": None} for run in audit["runs"]]
    return {**audit, "runs": runs, "rows_kept_from": None}
