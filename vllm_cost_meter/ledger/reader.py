"""Questions to the ledger: one request, many, tenants, the summary, the audit.

Every answer is a plain dict ready for JSON, under the names of the public interface, and is read
in one transaction, so that its parts agree with each other. Aggregation is SQL; Python touches
rows by the page only. An empty ledger has answers too: zeros and nulls.

Invariant: a reader writes nothing.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Self, Unpack

from sqlalchemy import and_, or_, select, tuple_
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.billing.comparison import bill_lines, billed_summary
from vllm_cost_meter.ledger.database import cause_of, open_database
from vllm_cost_meter.ledger.queries.audit import audit_runs
from vllm_cost_meter.ledger.queries.cost_models import earlier_fit, models
from vllm_cost_meter.ledger.queries.cut import RUN_COLUMNS, Cut, Window, read_cut, settle
from vllm_cost_meter.ledger.queries.energy import class_mj, energy_state, select_parts, total_mj
from vllm_cost_meter.ledger.queries.open_requests import (
    Living,
    open_parts,
    running_parts,
)
from vllm_cost_meter.ledger.queries.pages import Key, exchanges, page_of_keys, rows_of_parts
from vllm_cost_meter.ledger.queries.requests import Match, find
from vllm_cost_meter.ledger.queries.tenants import (
    Totals,
    after_cut,
    declared_overheads,
    tenant_rows,
)
from vllm_cost_meter.ledger.queries.usage import read_facts
from vllm_cost_meter.ledger.schema import (
    http_requests,
    open_requests,
    prices,
    requests,
    runs,
    usage_pieces,
)
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, RunFacts
from vllm_cost_meter.prices.run_prices import RunPrices
from vllm_cost_meter.records.snapshot import OVERHEAD_ROWS, EarlierFit, Snapshot
from vllm_cost_meter.reports.allocation import PriceOf, report
from vllm_cost_meter.reports.explanation import explained
from vllm_cost_meter.reports.grammar import Question, Words
from vllm_cost_meter.reports.grammar import question as ask
from vllm_cost_meter.reports.idle import IdlePolicy
from vllm_cost_meter.reports.request_row import RUNNING, exchange, ordered, shown_part
from vllm_cost_meter.reports.statement import OverheadCost, month_question, statement
from vllm_cost_meter.units.calendar import zone_of

MAX_LIMIT = 1000
# How long a report waits for bills that its cut counts and that are still on their way.
SETTLE_S = 2.0
# Overhead in which the GPUs worked all the same.
WORK = ("in_flight", "tail", "dummy")


class LedgerReader:
    """Reads one ledger. Thread-safe; every method blocks, so keep it off the event loop."""

    def __init__(
        self,
        url: str,
        *,
        create: bool = False,
        book: PriceBook | Callable[[], PriceBook] = NO_PRICES,
    ) -> None:
        """Open the ledger, to be priced by a book, or by what gives the book as it is now.

        Raises LedgerError, also when there is none and `create` is not set.
        """
        # It may hold a password.
        self.url = url
        self._given_book = book
        # Bills already waited for in vain, by run: nobody waits for them again.
        self._known_missing: dict[str, int] = {}
        self._engine = open_database(url, create=create)
        if self._engine.dialect.name == "postgresql":
            self._engine = self._engine.execution_options(isolation_level="REPEATABLE READ")

    @property
    def _book(self) -> PriceBook:
        book = self._given_book
        return book if isinstance(book, PriceBook) else book()

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # ---- requests

    def find(self, id: str) -> list[Match]:
        """Return what an id means, the newest first, at most MAX_MATCHES.

        It may be an HTTP record's own id, a response id, an X-Request-Id, or the internal or
        external id of an engine request.
        """
        with self.transaction() as connection:
            return find(connection, id)

    def request(
        self,
        id: str | Match,
        *,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
    ) -> dict[str, Any] | None:
        """Return the request row of an id or a match, with its `parts`; None if there is none.

        `alive` names runs known to live though their last snapshot is old. Raises ValueError for an
        id that several requests have, and LedgerError.
        """
        match = id if isinstance(id, Match) else self._only_match(id)
        if match is None:
            return None
        row = self._request(match, alive, now_ns)
        if row is not None and any(
            part["state"] == RUNNING and part["run_id"] is None for part in row["parts"]
        ):
            # No snapshot tells of it: it has not begun, or has ended and its bill is on its way.
            self.cut(Window(), alive, now_ns, settle_s)
            row = self._request(match, alive, now_ns)
        return row

    def look_up(self, id: str) -> list[dict[str, Any]]:
        """Return the request rows of all that an id means, the newest first."""
        rows = (self.request(match) for match in self.find(id))
        return [row for row in rows if row is not None]

    def explain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return how the bills of a request row, with its `parts`, came about.

        `text` is a list of lines for people, `parts` a list of dicts with the same figures. Only
        what has ended is explained; a request that never reached an engine has no parts. Raises
        LedgerError.
        """
        run_ids = {part["run_id"] for part in request["parts"] if part["run_id"]}
        priced = (
            select(*RUN_COLUMNS)
            .join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
            .where(runs.c.run_id.in_(run_ids))
        )
        p = usage_pieces.c
        keys = [(part["run_id"], part["seq"]) for part in request["parts"] if part["seq"]]
        pieces = select(p.run_id, p.seq, p.hour, p.prefill_ns + p.decode_ns)
        pieces = pieces.where(tuple_(p.run_id, p.seq).in_(keys)).order_by(p.hour)
        known = {run_id: RunPrices(run_id, RunFacts(), self._book) for run_id in run_ids}
        spent: dict[tuple[str, int], list[tuple[int, int]]] = {}
        with self.transaction() as connection:
            for row in connection.execute(priced):
                known[row.run_id] = RunPrices.of(row._asdict(), self._book)
            for run_id, seq, hour, ns in connection.execute(pieces):
                spent.setdefault((run_id, seq), []).append((hour, ns))
            used = [model for run_id in run_ids for model in models(connection, run_id)]
        return explained(request, known, spent, used)

    def requests(
        self,
        limit: int = 100,
        next: str | None = None,
        tenant: str | None = None,
        *,
        alive: Collection[str] = (),
        now_ns: int | None = None,
    ) -> dict[str, Any]:
        """Return a page of request rows, the newest first, and the token of the next page.

        `running`, on the first page, has the newest requests of which nothing has ended yet.
        Raises ValueError for a token that this method did not make.
        """
        limit = max(1, min(limit, MAX_LIMIT))
        before = None if next is None else Key.from_token(next)
        living = _living(alive, now_ns)
        with self.transaction() as connection:
            keys = page_of_keys(connection, limit + 1, before, tenant)
            rows = exchanges(connection, keys[:limit], living, self._book)
            first = before is None
            parts = running_parts(connection, tenant, living, limit, self._book) if first else []
        more = len(keys) > limit
        return {
            "requests": rows,
            "running": rows_of_parts(parts),
            "next": keys[limit - 1].token() if more else None,
        }

    # ---- reports

    def tenants(
        self,
        from_hour: int | None = None,
        to_hour: int | None = None,
        *,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
    ) -> dict[str, Any]:
        """Return a row for each tenant and for each class of overhead; they add up to wall x gpus.

        Hours count since the epoch, [from_hour, to_hour). `alive` names runs known to live though
        their last snapshot is old.
        """
        cut = self.cut(Window(from_hour, to_hour), alive, now_ns, settle_s)
        with self.transaction() as connection:
            totals = Totals.of(cut)
            rows = tenant_rows(connection, cut, totals)
            late = after_cut(connection, cut)
            billed = billed_summary(connection, cut)
        wall_gpu_ns = cut.wall_gpu_ns()
        difference_ns = wall_gpu_ns - sum(row["gpu_time_ns"] for row in rows)
        return {
            "window": cut.window.as_dict(),
            "taken_at": cut.at(),
            "tenants": rows,
            "wall_gpu_ns": wall_gpu_ns,
            "gpus": cut.gpus(),
            "adds_up": difference_ns == 0,
            "difference_ns": difference_ns,
            "after_cut": late,
            **totals.as_dict(),
            "overheads": [line.as_dict() for line in declared_overheads(cut)],
            "billed": billed,
            **cut.own_time(),
            "energy_mj": total_mj(cut),
            **{f"{name}_mj": class_mj(cut, name) for name in ("requests", "unattributed")},
            "runs": [{**run.state(), **energy_state(run)} for run in cut.runs],
        }

    def tenant(
        self,
        name: str,
        from_hour: int | None = None,
        to_hour: int | None = None,
        *,
        recent: int = 20,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
    ) -> dict[str, Any] | None:
        """Return one tenant's row and its latest requests; None for a name without any."""
        report = self.tenants(from_hour, to_hour, alive=alive, now_ns=now_ns, settle_s=settle_s)
        for row in report["tenants"]:
            if row["tenant"] == name:
                latest = self.requests(limit=recent, tenant=name)["requests"]
                about = {key: report[key] for key in ("window", "taken_at", "prices")}
                return {**row, **about, "recent": latest}
        return None

    def summary(
        self,
        from_hour: int | None = None,
        to_hour: int | None = None,
        *,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
    ) -> dict[str, Any]:
        """Return the totals of everything: requests, tokens, time by class, cost, own time."""
        report = self.tenants(from_hour, to_hour, alive=alive, now_ns=now_ns, settle_s=settle_s)
        rows = report.pop("tenants")
        tenants, overhead = rows[: -len(OVERHEAD_ROWS)], rows[-len(OVERHEAD_ROWS) :]
        requests_ns = sum(row["gpu_time_ns"] for row in tenants)
        class_ns = {
            f"{name}_ns": row["gpu_time_ns"]
            for name, row in zip(OVERHEAD_ROWS, overhead, strict=True)
        }
        worked_ns = requests_ns + sum(class_ns[f"{name}_ns"] for name in WORK)
        wall_gpu_ns = report["wall_gpu_ns"]
        counts = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
        return {
            **report,
            **{name: sum(row[name] for row in tenants) for name in counts},
            "requests_ns": requests_ns,
            **class_ns,
            **{
                f"{name}_mj": row["energy_mj"]
                for name, row in zip(OVERHEAD_ROWS, overhead, strict=True)
            },
            "utilization": worked_ns / wall_gpu_ns if wall_gpu_ns else None,
        }

    def report(
        self,
        asked: Question | None = None,
        *,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
        **words: Unpack[Words],
    ) -> dict[str, Any]:
        """Return the answer of `/cost/report` to a question, or to the words that ask one.

        `series` is a list of pieces of time, each with its `rows`: a dict for each value of what is
        aggregated by, and one for each class of overhead. `_ns` are nanoseconds of GPU time,
        `_nanousd` 10^-9 USD, integers both; None is unknown.

        Raises ValueError for a word that is not understood, and LedgerError.
        """
        if asked is not None and words:
            raise TypeError(f"report: expected a question or words, got both: {', '.join(words)}")
        question = ask(**words) if asked is None else asked
        cut = self.cut(Window(question.from_hour, question.to_hour), alive, now_ns, settle_s)
        with self.transaction() as connection:
            facts = read_facts(connection, cut, question.dimensions)
        return {
            "window": {**cut.window.as_dict(), "tz": str(question.zone)},
            "taken_at": cut.at(),
            "prices": Totals.of(cut).cost.listed(),
            **report(facts, question, _price_of(cut)),
        }

    def statement(
        self,
        month: str,
        *,
        tenant: str | None = None,
        tz: str | None = None,
        idle: str | None = None,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
    ) -> dict[str, Any]:
        """Return one tenant's statement of a month such as 2026-11, or that of all.

        `lines` are dicts by tenant, day and model; their `amount_cents`, integers, add up to the
        total to the cent.

        Raises ValueError for words that are not understood and a tenant without a line, and
        LedgerError.
        """
        now_ns = time.time_ns() if now_ns is None else now_ns
        asked = month_question(month, zone_of(tz), IdlePolicy.parse(idle))
        cut = self.cut(Window(asked.from_hour, asked.to_hour), alive, now_ns, settle_s)
        with self.transaction() as connection:
            facts = read_facts(connection, cut, asked.dimensions)
            overhead, billed = bill_lines(connection, cut)
        overhead += [
            OverheadCost(line.overhead.name, line.overhead.source, line.nanousd)
            for line in declared_overheads(cut)
        ]
        answer = statement(
            facts, asked, _price_of(cut), tenant=tenant, overhead=overhead, now_ns=now_ns
        )
        return {
            "month": month,
            "window": {**cut.window.as_dict(), "tz": str(asked.zone)},
            "taken_at": cut.at(),
            "methods": sorted({run.row["method"] for run in cut.runs if run.total_ns()}),
            "prices": Totals.of(cut).cost.listed(),
            "billed": billed,
            **answer,
        }

    def audit(
        self,
        *,
        alive: Collection[str] = (),
        now_ns: int | None = None,
        settle_s: float = SETTLE_S,
    ) -> dict[str, Any]:
        """Return whether the books of every run balance at its latest cut, and all differences.

        `balanced` is a bool, `runs` a list of dicts with the times and differences of each run in
        nanoseconds. Raises LedgerError.
        """
        cut = self.cut(Window(), alive, now_ns, settle_s)
        with self.transaction() as connection:
            runs = audit_runs(connection, cut)
            late = after_cut(connection, cut)
        return {"balanced": all(run["balanced"] for run in runs), "runs": runs, "after_cut": late}

    def latest_run(self) -> RunFacts | None:
        """Return what the price of the latest run depends on; None if there has been none."""
        latest = (
            select(*RUN_COLUMNS)
            .join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
            .order_by(runs.c.started_at.desc(), runs.c.run_id)
            .limit(1)
        )
        with self.transaction() as connection:
            row = connection.execute(latest).first()
        return None if row is None else RunPrices.of(row._asdict(), self._book).facts

    # ---- cost models

    def cost_models(self, run_id: str | None = None) -> list[dict[str, Any]]:
        """Return the latest cost model of each run, newest run first; of one run, all versions."""
        with self.transaction() as connection:
            return models(connection, run_id)

    def earlier_fit(self, snapshot: Snapshot) -> EarlierFit | None:
        """Return what an engine like the one of a snapshot had learnt before, None if nothing."""
        with self.transaction() as connection:
            return earlier_fit(
                connection,
                snapshot.run_id,
                snapshot.engine.model,
                snapshot.engine.hardware,
                snapshot.engine.parallelism,
            )

    # ---- how

    def _only_match(self, id: str) -> Match | None:
        """Return the match of an id, None if there is none. Raises ValueError for several."""
        matches = self.find(id)
        if len(matches) > 1:
            own = ", ".join(str(match.http_request_id or match.request_id) for match in matches)
            raise ValueError(f"id {id!r}: expected that of one request, got that of {own}")
        return matches[0] if matches else None

    def _request(
        self, match: Match, alive: Collection[str], now_ns: int | None
    ) -> dict[str, Any] | None:
        h, r, o = http_requests.c, requests.c, open_requests.c
        if match.http_request_id is not None:
            billed = r.http_request_id == match.http_request_id
            opened = o.http_request_id == match.http_request_id
        else:
            key = and_(r.run_id == match.run_id, r.seq == match.seq)
            # It may have got its bill since it was found.
            billed = or_(key, and_(r.request_id == match.request_id, r.http_request_id.is_(None)))
            opened = and_(o.request_id == match.request_id, o.http_request_id.is_(None))
        told = select(http_requests).where(h.http_request_id == match.http_request_id)
        with self.transaction() as connection:
            http = connection.execute(told).first()
            parts = [row._asdict() for row in connection.execute(select_parts().where(billed))]
            parts += open_parts(connection, opened, _living(alive, now_ns), self._book)
        if http is None and not parts:
            return None
        return {
            **exchange(http._asdict() if http else None, parts),
            "parts": [shown_part(part) for part in ordered(parts)],
        }

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the ledger."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            shown = self._engine.url.render_as_string(hide_password=True)
            raise LedgerError(f"ledger {shown}: cannot be read: {cause_of(error)}") from error

    def cut(
        self, window: Window, alive: Collection[str], now_ns: int | None, settle_s: float
    ) -> Cut:
        """Return all runs at their latest snapshots; bills up to there are waited for so long."""
        with self.transaction() as connection:
            now_ns = time.time_ns() if now_ns is None else now_ns
            cut = read_cut(connection, window, alive=alive, now_ns=now_ns, book=self._book)
        settle(self.transaction, cut, settle_s, self._known_missing)
        return cut


def _price_of(cut: Cut) -> PriceOf:
    """Return the price of each run and hour."""
    prices = cut.prices_of()

    def price_of(run_id: str, hour: int) -> Fraction | None:
        price = prices[run_id].at(hour)
        return None if price is None else price.usd_per_gpu_hour

    return price_of


def _living(alive: Collection[str], now_ns: int | None) -> Living:
    return Living(time.time_ns() if now_ns is None else now_ns, alive)
