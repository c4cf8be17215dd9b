"""Whatever the tree of tenants and its history, all surfaces mean the same by "a tenant".

The judge walks the drawn parents, one step at a time, as they were declared when each bill came. It
knows no code of the meter.
"""

import tempfile
from contextlib import closing
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from tests.property.test_ledger_books import HOUR, NOW, http_of, snapshot_of, store
from tests.property.test_ledger_prices import book_of
from tests.support.builders import make_bill, make_part
from tests.support.examples import examples
from vllm_cost_meter.config.tenants import TenantSetting, declared_of
from vllm_cost_meter.ledger.coverage import is_of
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import requests
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.prices.book import NO_PRICES
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import COVERS, OWN, WITH_CHILDREN, Owner, TenantScope
from vllm_cost_meter.reports.grammar import Question
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.tenants.rules import BodyClaims, ChildRule, ConstantRule, Resolver

AT = AsOf(NOW, 0)
MONTH = "2027-01"
# Prefixes of each other, other cases, characters that LIKE and globs take for others, and slashes.
ROOTS = ("ali", "alice", "Alice", "a%", "a_", "ab", "al", 'a"b', "ali-1")
NAMES = (*ROOTS, "ali/x", "ali/x/y", "alice/x", "a%/x", "Alice/x")
# What a client says of itself; None says nothing.
users = st.sampled_from([None, "x", "y", "ali", "%"])
Tree = dict[str, str]


@st.composite
def trees(draw) -> Tree:
    """The parents of all names: those with a slash have their own, others any that came before."""
    parents: Tree = {}
    order = draw(st.permutations(ROOTS))
    for place, name in enumerate(order):
        parent = draw(st.none() | st.sampled_from(order[:place])) if place else None
        if parent is not None:
            parents[name] = parent
    return parents | {name: name.rpartition("/")[0] for name in NAMES if "/" in name}


def is_below(tenant: str, user: str | None, name: str, tree: Tree) -> bool:
    """Whether a request of a tenant, or of the child that a user is, belongs to a name."""
    at = f"{tenant}/{user}" if user else tenant
    while at != name:
        # A child that a client chose has the tenant as parent.
        parent = tree.get(at, tenant if at == f"{tenant}/{user}" else None)
        if parent is None:
            return False
        at = parent
    return True


def owner_in(tree: Tree, tenant: str, user: str | None) -> Owner:
    entries = [TenantSetting(name=name, parent=tree.get(name)) for name in NAMES]
    resolver = Resolver([ConstantRule(tenant), ChildRule("user")], declared_of(entries))
    return resolver.resolve([], BodyClaims(user=user))


bills = st.lists(
    st.tuples(st.sampled_from(NAMES), users, st.integers(0, 1), st.integers(1, 10**12)),
    min_size=1,
    max_size=10,
)


class Books:
    """A ledger of drawn bills, some of before a change of the tree and some of after it."""

    def __init__(self, folder: str, drawn: list, history: list[Tree]) -> None:
        self.bills = drawn
        self.history = history
        parts = [
            make_part(
                make_bill(
                    run_id="run0",
                    seq=seq,
                    request_id=f"r{seq}",
                    pieces=(UsagePiece(HOUR, ns, 0, 8, 5),),
                ),
                owner=owner_in(history[when % len(history)], tenant, user),
                started_at_ns=NOW,
                finished_at_ns=NOW,
            )
            for seq, (tenant, user, when, ns) in enumerate(drawn, 1)
        ]
        self.url = f"sqlite:///{Path(folder) / 'ledger.db'}"
        engine = open_database(self.url)
        https = [http_of(part) for part in parts]
        idle = [(0, "idle", 12_345)]
        store(engine, [*parts, *https, snapshot_of(0, parts, idle, 1)], seed=0)
        engine.dispose()
        self.owners = [part.owner for part in parts]

    def judged(self, name: str, covers: str) -> list[int]:
        """The GPU time of each bill that belongs to a name."""
        return [
            ns
            for tenant, user, when, ns in self.bills
            if (
                is_below(tenant, user, name, self.history[when % len(self.history)])
                if covers == WITH_CHILDREN
                else (f"{tenant}/{user}" if user else tenant) == name
            )
        ]


def figures_of(reader: LedgerReader, name: str, covers: str) -> dict[str, tuple[int, int]]:
    """(GPU time, requests) of a name in each answer of the reader."""
    found = {}
    asked = Question(conditions={"tenant": frozenset([name])}, covers=covers)
    for what, question in (("report", asked), ("own report", Question().by(name))):
        if what == "report" or covers == WITH_CHILDREN:
            (series,) = reader.report(question, AT)["series"] or [{"rows": []}]
            rows = series["rows"]
            found[what] = (
                sum(row["gpu_time_ns"] for row in rows),
                sum(row["requests"] for row in rows),
            )
    for what, only in (("tenant", None), ("me", name)):
        row = reader.tenant(name, covers=covers, only=only, as_of=AT)
        found[what] = (row["gpu_time_ns"], row["requests"]) if row else (0, 0)
        assert row is None or row["covers"] == covers
    page = reader.requests(limit=1000, tenant=name, covers=covers, as_of=AT)
    assert (page["tenant"], page["covers"]) == (name, covers)
    found["requests"] = (
        sum(row["gpu_time_ns"] for row in page["requests"]),
        len(page["requests"]),
    )
    try:
        answer = reader.statement(MONTH, tenant=name, covers=covers, as_of=AT)
        total = answer["total"]
        assert answer["covers"] == covers
        found["statement"] = (total["gpu_time_ns"], total["requests"])
    except ValueError:
        found["statement"] = (0, 0)
    return found


def budget_of(url: str, name: str) -> int:
    budget = Budget("b", 1, "gpu_seconds", "rolling", tenant=name)
    with closing(Spending(url)) as spending:
        (standing,) = spending.look([budget], NO_PRICES, NOW).standings
    return standing.total


slow = settings(max_examples=examples(12))
names = st.sampled_from(NAMES)


@slow
@given(st.lists(trees(), min_size=1, max_size=2), bills, st.data())
def test_every_surface_counts_the_same_bills_as_a_tenants(history, drawn, data):
    some = data.draw(st.sets(names, min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        books = Books(folder, drawn, history)
        with closing(LedgerReader(books.url)) as reader:
            for name in some:
                for covers in COVERS:
                    due = books.judged(name, covers)
                    figures = figures_of(reader, name, covers)
                    assert figures == dict.fromkeys(figures, (sum(due), len(due))), name
                assert budget_of(books.url, name) == sum(books.judged(name, WITH_CHILDREN))


@slow
@given(trees(), bills, st.integers(1, 999), st.data())
def test_a_tenant_with_children_is_the_sum_of_own_figures_to_the_nano_usd(tree, drawn, usd, data):
    name = data.draw(names)
    with tempfile.TemporaryDirectory() as folder:
        books = Books(folder, drawn, [tree])
        book = book_of([(None, None, usd, 7)])
        with closing(LedgerReader(books.url, book=book)) as reader:
            (series,) = reader.report(Question(), AT)["series"]
            rows = {row["tenant"]: row for row in series["rows"] if row["class"] == "requests"}
            assert {row["covers"] for row in rows.values()} == {OWN}
            drawn_of = dict(zip((owner.tenant for owner in books.owners), drawn, strict=True))
            below = [
                tenant
                for tenant, (named, user, *_) in drawn_of.items()
                if is_below(named, user, name, tree)
            ]
            found = reader.tenant(name, as_of=AT)
            if not below:
                assert found is None
                return
            assert found["tenants"] == len(below)
            for field in ("gpu_time_ns", "requests", "output_tokens", "decode_ns"):
                assert found[field] == sum(rows[tenant][field] for tenant in below), field
            named = Question(conditions={"tenant": frozenset([name])})
            (shown,) = reader.report(named, AT)["series"]
            assert shown["rows"] == [row for row in rows.values() if row["tenant"] in below]
            # A tenant's own bills are read only, so they are rounded by themselves.
            own = [reader.tenant(tenant, covers=OWN, as_of=AT)["cost_nanousd"] for tenant in below]
            cost = sum(rows[tenant]["cost_nanousd"] for tenant in below)
            for total in (sum(own), found["cost_nanousd"]):
                assert abs(total - cost) <= len(below)
            cents = [
                reader.statement(MONTH, tenant=tenant, covers=OWN, as_of=AT)["total"]
                for tenant in below
            ]
            whole = reader.statement(MONTH, tenant=name, as_of=AT)
            assert whole["total"]["amount_cents"] == sum(each["amount_cents"] for each in cents)
            assert {line["tenant"] for line in whole["lines"]} == set(below)


@slow
@given(st.lists(trees(), min_size=1, max_size=2), bills, names, st.sampled_from(COVERS))
def test_the_rule_in_sql_is_the_rule_of_owners(history, drawn, name, covers):
    scope = TenantScope(name, covers)
    with tempfile.TemporaryDirectory() as folder:
        books = Books(folder, drawn, history)
        engine = open_database(books.url)
        due = sorted(o.tenant for o in books.owners if scope.includes(o.tenant, o.above))
        with engine.connect() as connection:
            for table in (requests, replies):
                held = connection.execute(select(table.c.tenant).where(is_of(table.c, scope)))
                assert sorted(held.scalars()) == due
        engine.dispose()
