"""Read a ledger: `LedgerReader` answers with requests, reports, statements, the summary, the audit.

Every answer is a dict ready for JSON; its type describes each field with its unit. An answer is
read in one transaction, so its parts agree with each other. SQL does the aggregation; Python
touches single rows by the page only. An empty ledger has answers too, with zeros and nulls.

Invariant: a reader writes nothing.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, tzinfo
from typing import Any, Self, Unpack, cast

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.auditing.audit import audit_at
from vllm_cost_meter.ledger.billing.answers import InvoiceDays
from vllm_cost_meter.ledger.billing.comparison import invoice_days
from vllm_cost_meter.ledger.database import cause_of, open_to_read
from vllm_cost_meter.ledger.deadline import bounded, deadline
from vllm_cost_meter.ledger.fleet.completeness import alive_in
from vllm_cost_meter.ledger.queries import reports, requests
from vllm_cost_meter.ledger.queries.answers import Audit, CostModelRow
from vllm_cost_meter.ledger.queries.cost_models import earlier_fit, models
from vllm_cost_meter.ledger.queries.cut import NOW, AsOf, Cut, Window, read_cut, with_ends
from vllm_cost_meter.ledger.queries.open_requests import Living, running_parts
from vllm_cost_meter.ledger.queries.pages import PageKey, exchanges, page_of_keys, rows_of_parts
from vllm_cost_meter.ledger.queries.requests import Match
from vllm_cost_meter.ledger.queries.seen import unseen, unseen_tags
from vllm_cost_meter.ledger.retention.known import kept_from_hour
from vllm_cost_meter.ledger.settling import settle
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, RunFacts
from vllm_cost_meter.records.owner import WITH_CHILDREN, Covers, TenantScope
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.reports.answers import Report, Summary, Tenant, TenantsReport
from vllm_cost_meter.reports.engine_labels import ALL_ENGINES, EngineFilter
from vllm_cost_meter.reports.grammar import Question, Words, engines_named
from vllm_cost_meter.reports.grammar import question as ask
from vllm_cost_meter.reports.idle import IdlePolicy
from vllm_cost_meter.reports.request_answers import Explanation, RequestsPage, RequestWithParts
from vllm_cost_meter.reports.statement import month_question
from vllm_cost_meter.reports.statement_answers import TenantStatement
from vllm_cost_meter.reports.tenant_details import sum_of_rows
from vllm_cost_meter.units.calendar import zone_of
from vllm_cost_meter.units.time import instant_of

MAX_LIMIT = 1000
# So long a ledger is waited for that the server of the same moment makes.
WAIT_S = 1.0


class LedgerReader:
    """Reads one ledger. Thread-safe; every method blocks, so keep it off the event loop.

    Hours count since the epoch, [from_hour, to_hour); None is open.
    """

    def __init__(
        self,
        url: str,
        *,
        late: bool = False,
        book: PriceBook | Callable[[], PriceBook] = NO_PRICES,
        alive: Callable[[], Collection[str]] = tuple,
        not_applied: int | None = 0,
    ) -> None:
        """Open the ledger. `book` is a price book, or a function that returns the current one.

        `alive` returns engine runs that are known to live though they have sent no snapshot lately,
        such as those in a long step. Any other engine that is silent for too long counts as dead.
        `not_applied` is how many records the ledger's journals have that it lacks; None if unknown.
        Raises LedgerError, also if there is no ledger. With `late` the first question opens the
        ledger, and waits a moment for it: a server may start while its ledger is away or not made.
        """
        # The URL may hold a password, so messages never show it.
        self.url = url
        self._given_book = book
        self._alive = alive
        self._not_applied = not_applied
        # The number of the last bill that was waited for, by run; nobody waits for it again.
        self._settled: dict[str, int] = {}
        self._opening = threading.Lock()
        self._opened: Engine | None = None if late else open_to_read(url)

    @property
    def _engine(self) -> Engine:
        with self._opening:
            if self._opened is None:
                self._opened = open_to_read(self.url, wait_s=WAIT_S)
            return self._opened

    def require_ledger(self) -> None:
        """Raise LedgerError if there is no ledger of this version, also while one is migrated."""
        _ = self._engine

    def close(self) -> None:
        """Close the connections."""
        with self._opening:
            if self._opened is not None:
                self._opened.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the ledger.

        Raises LedgerError, and OverdueError once the question has no time left.
        """
        engine = self._engine
        try:
            with engine.connect() as connection, bounded(connection):
                yield connection
        except SQLAlchemyError as error:
            if (until := deadline.get()) is not None:
                until.check()
            shown = engine.url.render_as_string(hide_password=True)
            raise LedgerError(f"ledger {shown}: cannot be read: {cause_of(error)}") from error

    @contextmanager
    def at_cut(
        self, window: Window, as_of: AsOf = NOW, engines: EngineFilter = ALL_ENGINES
    ) -> Iterator[tuple[Connection, Cut]]:
        """Open a transaction to count bills in, with these engines' runs at their latest snapshots.

        The bills that these snapshots count are there, unless they did not come in time. Raises as
        `transaction` does.
        """
        cut = self._settled_cut(window, as_of)
        with self.transaction() as connection:
            yield connection, with_ends(connection, cut).of_engines(engines)

    def _settled_cut(self, window: Window, as_of: AsOf) -> Cut:
        """Return the runs at their latest snapshots, once the bills that these count are there."""
        living = self._living(as_of)
        with self.transaction() as connection:
            cut = read_cut(
                connection, window, alive=living.alive, now_ns=living.now_ns, book=self._book
            )
        settle(self.transaction, cut, as_of.settle_s, self._settled)
        return cut

    # ---- requests

    def find(self, id: str, only: str | None = None) -> list[Match]:
        """Return what an id means, at most `requests.MAX_MATCHES`.

        With `only` these are requests of that tenant and all below it, whoever else uses the id.
        """
        scope = None if only is None else TenantScope(only)
        with self.transaction() as connection:
            return requests.find(connection, id, scope)

    def request(self, id: str | Match, as_of: AsOf = NOW) -> RequestWithParts | None:
        """Return the request row of an id or a match, with its `parts`; None if there is none.

        Raises ValueError for an id that means several requests, and LedgerError.
        """
        match = id if isinstance(id, Match) else self._only_match(id)
        if match is None:
            return None
        row = self._request(match, as_of)
        if row is not None and requests.is_unseen(row):
            # The bill may still be on its way.
            self._settled_cut(Window(), as_of)
            row = self._request(match, as_of)
        return row

    def look_up(self, id: str, only: str | None = None) -> list[RequestWithParts]:
        """Return the request rows of all that an id means (see `find`)."""
        rows = (self.request(match) for match in self.find(id, only))
        return [row for row in rows if row is not None]

    def kept_from(self) -> str | None:
        """Return the instant before which rows of requests were dropped; None if none were."""
        with self.transaction() as connection:
            return instant_of(kept_from_hour(connection))

    def explain(self, request: Mapping[str, Any]) -> Explanation:
        """Explain the bills of a request row that has its `parts`.

        In the answer, `text` is a list of lines for people, and `parts` a list of dicts with the
        same figures. Only parts with a bill are explained. A request that never reached an engine
        has no parts. Raises LedgerError.
        """
        with self.transaction() as connection:
            return requests.explain(connection, request, self._book)

    def requests(
        self,
        limit: int = 100,
        next: str | None = None,
        tenant: str | None = None,
        covers: Covers = WITH_CHILDREN,
        only: str | None = None,
        as_of: AsOf = NOW,
    ) -> RequestsPage:
        """Return a page of request rows, the newest first, and the token of the next page.

        `covers` says whether those of all tenants below `tenant` are meant too. `only` is the
        tenant that asks: it gets its own requests and those below it. On the first page `running`
        has the newest requests without any part that ended. Raises ValueError for a token that this
        method did not make.
        """
        asked = None if tenant is None else TenantScope(tenant, covers)
        asker = None if only is None else TenantScope(only)
        limit = max(1, min(limit, MAX_LIMIT))
        before = None if next is None else PageKey.from_token(next)
        living = self._living(as_of)
        with self.transaction() as connection:
            kept_from = kept_from_hour(connection)
            keys = page_of_keys(connection, limit + 1, before, asked, asker)
            rows = exchanges(connection, keys[:limit], living, self._book)
            first = before is None
            parts = (
                running_parts(connection, asked, asker, living, limit, self._book) if first else []
            )
        more = len(keys) > limit
        return {
            "tenant": tenant,
            "covers": None if asked is None else asked.covers,
            "requests": rows,
            "running": rows_of_parts(parts),
            "rows_kept_from": instant_of(kept_from),
            "next": keys[limit - 1].token() if more else None,
        }

    # ---- reports

    def report(
        self, asked: Question | None = None, as_of: AsOf = NOW, **words: Unpack[Words]
    ) -> Report:
        """Return a report, as `/cost/report` does, for a question or its words.

        `series` is a list of pieces of time, each with `rows`: a dict for each group of usage, and
        one for each class of engine time. Fields in `_ns` are GPU-nanoseconds and those in
        `_nanousd` 10^-9 USD, both integers. None means unknown.

        Raises ValueError for a word that is not understood, and LedgerError.
        """
        if asked is not None and words:
            raise TypeError(f"report: expected a question or words, got both: {', '.join(words)}")
        question = ask(**words) if asked is None else asked
        window = Window(question.from_hour, question.to_hour)
        with self.at_cut(window, as_of, question.engines) as (connection, cut):
            return reports.report_at(connection, cut, question)

    def tenants(
        self,
        from_hour: int | None = None,
        to_hour: int | None = None,
        zone: tzinfo = UTC,
        as_of: AsOf = NOW,
    ) -> TenantsReport:
        """Return the report by tenant, with the totals of the engines beside it."""
        with self.at_cut(Window(from_hour, to_hour), as_of) as (connection, cut):
            return reports.tenants_at(connection, cut, Question(from_hour, to_hour, zone))

    def tenant(
        self,
        name: str,
        from_hour: int | None = None,
        to_hour: int | None = None,
        *,
        covers: Covers = WITH_CHILDREN,
        only: str | None = None,
        recent: int = 20,
        as_of: AsOf = NOW,
    ) -> Tenant | None:
        """Return a tenant's figures and its latest requests; None for an unknown tenant.

        `covers` says whether the figures of all tenants below it are part of these. `only` is the
        tenant that asks: it gets what is its own or below it. Only the bills of these tenants are
        read. So their money is rounded by itself, and may differ by a nano-USD from their rows in a
        report, where all rows are rounded together.
        """
        conditions = {"tenant": frozenset([name])}
        asked = Question(from_hour, to_hour, conditions=conditions, covers=covers, only=only)
        with self.at_cut(Window(from_hour, to_hour), as_of) as (connection, cut):
            cut = replace(cut, whose=TenantScope(name, covers))
            answer = reports.report_at(connection, cut, asked)
        rows = [row for piece in answer["series"] for row in piece["rows"]]
        if not rows:
            return None
        latest = self.requests(limit=recent, tenant=name, covers=covers, only=only)
        found = {
            **sum_of_rows(rows),
            "tenant": name,
            "covers": covers,
            "tenants": len(rows),
            "window": answer["window"],
            "taken_at": answer["taken_at"],
            "prices": answer["prices"],
            "recent": latest["requests"],
        }
        return cast("Tenant", found)

    def summary(
        self, from_hour: int | None = None, to_hour: int | None = None, as_of: AsOf = NOW
    ) -> Summary:
        """Return the totals of everything: requests, tokens, time by class, cost, own time."""
        with self.at_cut(Window(from_hour, to_hour), as_of) as (connection, cut):
            return reports.summary_at(connection, cut, Question(from_hour, to_hour))

    def statement(
        self,
        month: str,
        *,
        tenant: str | None = None,
        covers: Covers = WITH_CHILDREN,
        tz: str | None = None,
        idle: str | None = None,
        filter: str | None = None,
        as_of: AsOf = NOW,
    ) -> TenantStatement:
        """Return the statement of a month such as 2026-11, for one tenant or for all.

        `covers` says whether the lines of all tenants below `tenant` are part of it. With a
        `filter` such as label:pool=spot it is about these engines alone, without declared overheads
        and bills of the provider, which are of all engines.

        `lines` is a list of dicts by tenant, day and model. Their `amount_cents` are integers, and
        add up to the total.

        Raises ValueError for words that are not understood and for a tenant without a line, and
        LedgerError.
        """
        whose = None if tenant is None else TenantScope(tenant, covers)
        engines = engines_named(filter)
        asked = month_question(month, zone_of(tz), IdlePolicy.parse(idle), whose, engines)
        now_ns, window = as_of.instant_ns(), Window(asked.from_hour, asked.to_hour)
        with self.at_cut(window, as_of, engines) as (connection, cut):
            return reports.statement_at(connection, cut, asked, month=month, now_ns=now_ns)

    def invoice_days(
        self, from_hour: int | None = None, to_hour: int | None = None, as_of: AsOf = NOW
    ) -> InvoiceDays:
        """Return the metered and billed amounts for each UTC day of a window, and in total."""
        with self.at_cut(Window(from_hour, to_hour), as_of) as (connection, cut):
            return invoice_days(connection, cut)

    def audit(self, as_of: AsOf = NOW, *, full: bool = False) -> Audit:
        """Return whether every run's books balance at its cut, and all differences.

        A full audit reads every bill; else the sums kept with the bills are read.
        `balanced` is a bool, or None with a `reason` if the ledger cannot tell. `runs` is a list of
        dicts with the times and differences of each run in nanoseconds. Raises LedgerError.
        """
        with self.at_cut(Window(), as_of) as (connection, cut):
            return audit_at(connection, cut, self._not_applied, full=full)

    # ---- engine runs

    def latest_run(self) -> RunFacts | None:
        """Return the facts about the latest run that its price depends on; None without a run."""
        with self.transaction() as connection:
            return requests.latest_run(connection, self._book)

    def unseen(self, names: Iterable[str]) -> list[str]:
        """Return those names of which the ledger has no request, nor of a child of them."""
        with self.transaction() as connection:
            return unseen(connection, names)

    def unseen_tags(self, tags: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return those tags, as (key, value), that no request in the ledger has."""
        with self.transaction() as connection:
            return unseen_tags(connection, tags)

    def cost_models(self, run_id: str | None = None) -> list[CostModelRow]:
        """Return the latest cost model of each run, newest first; or all versions of one run."""
        with self.transaction() as connection:
            return models(connection, run_id)

    def earlier_fit(self, snapshot: Snapshot) -> EarlierFit | None:
        """Return the cost model that an earlier engine of the same kind had learnt, if any."""
        engine = snapshot.engine
        about = (engine.model, engine.hardware, engine.parallelism)
        with self.transaction() as connection:
            return earlier_fit(connection, snapshot.run_id, *about)

    # ---- helpers

    @property
    def _book(self) -> PriceBook:
        book = self._given_book
        return book if isinstance(book, PriceBook) else book()

    def _living(self, as_of: AsOf) -> Living:
        with self.transaction() as connection:
            told_of = alive_in(connection)
        return Living(as_of.instant_ns(), frozenset((*self._alive(), *told_of)))

    def _only_match(self, id: str) -> Match | None:
        """Return the only match of an id; None without one. Raises ValueError for several."""
        matches = self.find(id)
        if len(matches) > 1:
            own = ", ".join(str(match.http_request_id or match.request_id) for match in matches)
            raise ValueError(f"id {id!r}: expected that of one request, got that of {own}")
        return matches[0] if matches else None

    def _request(self, match: Match, as_of: AsOf) -> RequestWithParts | None:
        living = self._living(as_of)
        with self.transaction() as connection:
            return requests.request_row(connection, match, living, self._book)
