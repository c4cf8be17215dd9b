"""Cost per token and request in a window, with the SQL behind each figure.

A figure is an expression over scalar subqueries on a few named tables (see `figures`). The tables
are the ledger's own, with the window, the prices and the declared latency bounds written into them.
`sql_of` returns exactly the text that is executed, so anybody who doubts a figure can run it by
hand. SQLite and PostgreSQL both take it.

GPU time and money come from the engines' hours, which include idle time and start-up. Requests and
tokens count exchanges that ended in the window; arrivals count exchanges that came in it. A ratio
whose denominator is zero is null, so a window without traffic has a cost, but no cost per token.
Figures are floating-point numbers; the exact books are in `reports`.

Invariant: a figure that is an amount adds up over the parts of a window.
"""

# ruff: noqa: S608 - only numbers, instants and run ids are written into the SQL below
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, cast

from sqlalchemy import ColumnElement, TextClause, text
from sqlalchemy.engine import Connection

from vllm_cost_meter.economics import Declared, Sent
from vllm_cost_meter.ledger.economics.answers import Deployment, Economics, FigureMethod
from vllm_cost_meter.ledger.economics.figures import (
    ARRIVED_OF_ALL,
    ARRIVED_OF_SOME,
    ENDED_AT,
    FIGURES,
    LATENCIES_OF_ALL,
    LATENCIES_OF_SOME,
    OF_ALL_ENGINES,
    OF_SLO,
    TABLES,
)
from vllm_cost_meter.ledger.economics.observed import engines_at_once, observed_ns
from vllm_cost_meter.ledger.queries.costs import CutCosts, overheads_of
from vllm_cost_meter.ledger.queries.cut import NOW, AsOf, Cut, Window
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.rollups.reading import other_hours, whole_days
from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.reports.engine_labels import ALL_ENGINES, EngineFilter
from vllm_cost_meter.reports.price_answers import PriceRow
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.time import US_PER_HOUR, instant_of

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAMED = re.compile(r"\{(\w+)\}")


def economics(
    reader: LedgerReader,
    declared: Declared,
    from_hour: int | None = None,
    to_hour: int | None = None,
    as_of: AsOf = NOW,
    engines: EngineFilter = ALL_ENGINES,
) -> Economics:
    """Return the cost of a window's tokens and requests, with load and latency, ready for JSON.

    Hours count since the epoch, [from_hour, to_hour); None means no bound. `declared` has the
    operator's latency bounds and full load. Of some `engines`, figures about bills and overheads
    are null, and rates are over the time in which any of these ran.
    """
    with reader.at_cut(Window(from_hour, to_hour), as_of, engines) as (connection, cut):
        figures = read_figures(connection, cut, declared, figures_shown(declared))
    return {
        "window": cut.window.as_dict(),
        "taken_at": cut.at(),
        "deployments": deployments(cut),
        "slo": declared.slo(figures.get("good_requests_share")),
        "rows_kept_from": instant_of(cut.kept_from),
        "prices": cast("list[PriceRow]", CutCosts.of(cut).cost.listed()),
        "engines": engines.text,
        "figures": figures,
    }


def method(
    reader: LedgerReader,
    declared: Declared,
    from_hour: int | None = None,
    to_hour: int | None = None,
    engines: EngineFilter = ALL_ENGINES,
) -> list[FigureMethod]:
    """Return the unit, meaning and executed SQL of each figure for a window, ready for JSON."""
    window = Window(from_hour, to_hour)
    with reader.at_cut(window, AsOf(settle_s=0), engines) as (_, cut):
        return [
            {
                "figure": name,
                "unit": FIGURES[name].unit or None,
                "meaning": FIGURES[name].meaning,
                "sql": sql_of([name], cut, declared),
            }
            for name in figures_shown(declared)
        ]


def sql_of(names: Iterable[str], cut: Cut, declared: Declared) -> str:
    """Return the SQL statement whose single row has these figures, in this order."""
    columns = [f"{_expanded(name, cut, declared)} AS {name}" for name in names]
    return with_tables("SELECT\n  " + ",\n  ".join(columns), cut)


def with_tables(selected: str, cut: Cut) -> str:
    """Return a query preceded by the tables that it names, directly or through other tables."""
    needed: dict[str, str] = {}
    values = _values(cut)
    for name, body in reversed(list(TABLES.items())):
        rest = "\n".join((selected, *needed.values()))
        if re.search(rf"\b(FROM|JOIN) {name}\b", rest):
            needed[name] = _NAMED.sub(lambda found: values[found[1]], body)
    tables = [f"{name} AS (\n{body}\n)" for name, body in reversed(list(needed.items()))]
    return f"WITH {', '.join(tables)}\n{selected}" if tables else selected


def read_mix(connection: Connection, cut: Cut) -> Iterator[Sent]:
    """Yield each exchange that ended in a cut's window, with its time and size, oldest first.

    Raises ValueError for a window in which rows may have been dropped.
    """
    if not cut.has_all_rows:
        raise ValueError(
            f"window: expected one from {instant_of(cut.kept_from)} on, because rows of requests"
            " that ended before were dropped and each one is priced by itself; got one that begins"
            " before"
        )
    query = (
        "SELECT finished_at, prompt_tokens, cached_tokens, output_tokens FROM ended"
        " ORDER BY finished_at"
    )
    for row in connection.execute(_statement(with_tables(query, cut))):
        ended_at = _EPOCH + timedelta(microseconds=row[0])
        yield Sent(ended_at, *(int(tokens) for tokens in row[1:]))


def _statement(sql: str) -> TextClause:
    # SQLAlchemy takes a colon for a parameter, and instants have colons.
    return text(sql.replace(":", "\\:"))


def read_figures(
    connection: Connection, cut: Cut, declared: Declared, names: Sequence[str]
) -> dict[str, float | None]:
    """Return these figures for a cut's window. The figures in OF_SLO need a declared bound."""
    row = connection.execute(_statement(sql_of(names, cut, declared))).one()
    return dict(zip(names, map(_number, row), strict=True))


def deployments(cut: Cut) -> list[Deployment]:
    """Return the deployments that ran in the window, and the number of runs for each.

    Hardware, GPUs, model, precision, parallelism and vLLM version are as the engines reported.
    """
    names = ("hardware", "gpus", "model", "precision", "parallelism", "vllm_version")
    counted: Counter[tuple[Any, ...]] = Counter(
        tuple(run.row[name] for name in names) for run in cut.runs if run.total_ns()
    )
    rows = [{**dict(zip(names, of, strict=True)), "runs": n} for of, n in counted.items()]
    return cast("list[Deployment]", rows)


def figures_shown(declared: Declared) -> list[str]:
    """Return the names of the figures in an answer."""
    return [name for name in FIGURES if declared.has_slo or name not in OF_SLO]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


def condition(declared: Declared) -> str:
    """Return the SQL condition that holds for a row of `ended` within all bounds."""
    # A reply of one token has no time between tokens.
    tpot = f"(tpot_ms <= {declared.tpot_ms!r} OR (tpot_ms IS NULL AND output_tokens <= 1))"
    kept = [
        *([f"ttft_ms <= {declared.ttft_ms!r}"] if declared.ttft_ms is not None else []),
        *([tpot] if declared.tpot_ms is not None else []),
        *([f"e2e_ms <= {declared.e2e_ms!r}"] if declared.e2e_ms is not None else []),
    ]
    return " AND ".join(kept)


def _expanded(name: str, cut: Cut, declared: Declared) -> str:
    """Return a figure's expression, with the figures that it names filled in."""

    def of(found: re.Match[str]) -> str:
        if found[1] == "slo":
            return condition(declared)
        if found[1] == "has_all_rows":
            return _has_all_rows(cut)
        if found[1] == "theta_max":
            known = declared.theta_max
            return "CAST(NULL AS DOUBLE PRECISION)" if known is None else repr(known)
        return f"({_expanded(found[1], cut, declared)})"

    if name in OF_ALL_ENGINES and not cut.engines.is_all:
        return "CAST(NULL AS DOUBLE PRECISION)"
    return _NAMED.sub(of, FIGURES[name].expression)


def _has_all_rows(cut: Cut) -> str:
    return "1 = 1" if cut.has_all_rows else "1 = 0"


def _values(cut: Cut) -> dict[str, str]:
    window = cut.window
    low, high = window.from_hour, window.to_hour
    began_us = [None if hour is None else hour * US_PER_HOUR for hour in (low, high)]
    instants = [instant_of(hour) for hour in (low, high)]

    def between(column: str, *bounds: object) -> str:
        terms = [
            f"{column} {sign} {bound if isinstance(bound, int) else _quoted(str(bound))}"
            for sign, bound in zip((">=", "<"), bounds, strict=True)
            if bound is not None
        ]
        return " AND ".join(terms) or "1 = 1"

    spans = _price_spans(cut)
    # A sum has one price: its run's at its first hour.
    splits = sorted({hour for _, *both, _ in spans for hour in both if hour % HOURS_PER_DAY})
    conditions = {
        "hours": between("hour", low, high),
        "has_all_rows": _has_all_rows(cut),
        "came": between("r.started_at", *began_us),
        "came_first": between("MIN(started_at)", *began_us),
    }
    is_all = cut.engines.is_all
    latencies, arrived = (
        (LATENCIES_OF_ALL, ARRIVED_OF_ALL) if is_all else (LATENCIES_OF_SOME, ARRIVED_OF_SOME)
    )
    return {
        **conditions,
        **_conditions_on_engines(cut),
        "latencies": latencies.format(**conditions),
        "arrived": arrived.format(**conditions),
        "whole_days": _text(whole_days(window, splits)),
        "other_hours": _text(other_hours(window, splits)),
        "ended": between(ENDED_AT, *began_us),
        "began": between("started_at", *instants),
        "beyond": _beyond_table(cut),
        "observed": _observed_table(cut),
        "engines": str(engines_at_once(cut)),
        "price": _price_table(spans),
        "overhead": _overhead_table(cut),
    }


def _conditions_on_engines(cut: Cut) -> dict[str, str]:
    """Return what is added to conditions, so that they hold for chosen engines only."""
    nothing = "SELECT run_id AS chosen_run_id FROM runs WHERE 1 = 0"
    rows = [(_quoted(run.run_id),) for run in cut.all_runs]
    chosen = "IN (SELECT chosen_run_id FROM chosen)"
    added = {
        "of_hours": f" AND engine_hours.run_id {chosen}",
        "of_groups": f" AND group_id IN (SELECT group_id FROM rollup_groups WHERE run_id {chosen})",
        "of_exchanges": f" HAVING MIN(run_id) {chosen}",
        "of_runs": f" AND run_id {chosen}",
    }
    if cut.engines.is_all:
        return dict.fromkeys(added, "")
    return {**added, "chosen": _table(("chosen_run_id",), rows, nothing)}


# A run, hours [from, to) in which its price is the same, and that price; None where it has none.
_PriceSpan = tuple[str, int, int, Rates | None]


def _price_spans(cut: Cut) -> list[_PriceSpan]:
    """Return the prices of all runs in the window's hours that they ran in."""
    rows: list[_PriceSpan] = []
    for run in cut.all_runs:
        hours = sorted(hour for hour in run.hours if cut.window.contains(hour))
        for hour in hours:
            price = run.prices.at(hour)
            rates = None if price is None else price.rates
            if rows and rows[-1][0] == run.run_id and rows[-1][3] == rates:
                rows[-1] = (*rows[-1][:2], hour + 1, rates)
            else:
                rows.append((run.run_id, hour, hour + 1, rates))
    return rows


def _price_table(spans: Sequence[_PriceSpan]) -> str:
    """Return the runs' prices in the window as SQL; a run without a price has no row."""
    return _table(
        ("price_run_id", "from_hour", "to_hour", "usd_per_gpu_hour", "usd_per_kv_block_hour"),
        [
            (_quoted(run_id), low, high, *(repr(float(usd)) for usd in rates))
            for run_id, low, high, rates in spans
            if rates is not None
        ],
        "SELECT run_id AS price_run_id, 0 AS from_hour, 0 AS to_hour, 0.0 AS usd_per_gpu_hour,"
        " 0.0 AS usd_per_kv_block_hour FROM runs WHERE 1 = 0",
    )


def _observed_table(cut: Cut) -> str:
    """Return the time in each hour of the window in which any engine ran, as SQL; NULL unknown."""
    nothing = "SELECT 0 AS hour, 0.0 AS ns FROM runs WHERE 1 = 0"
    observed = observed_ns(cut)
    if observed is None:
        return "SELECT 0 AS hour, CAST(NULL AS DOUBLE PRECISION) AS ns"
    return _table(
        ("hour", "ns"), [(hour, repr(float(ns))) for hour, ns in observed.items()], nothing
    )


def _beyond_table(cut: Cut) -> str:
    """Return the GPU time that bills have beyond the engines' hours, in the window, as SQL.

    A run without totals has neither a number nor GPUs.
    """
    unknown = "CAST(NULL AS INTEGER)"
    spent: list[tuple[str, object, object, int, int]] = []
    for run in cut.runs:
        last, of_run = run.last_bills, (run.row["engine_index"], run.row["gpus"])
        spent += [
            (run.run_id, *of_run, hour, ns - last.in_flight[hour])
            for hour, ns in last.billed.items()
        ]
    for bare in cut.without_totals:
        hours = bare.billed.hours.items()
        spent += [(bare.run_id, unknown, unknown, hour, ns) for hour, ns in hours]
    return _table(
        ("run_id", "hour", "engine_index", "gpus", "gpu_ns", "busy_ns", "startup_ns"),
        [
            (_quoted(run_id), hour, engine_index, gpus, f"1.0 * {ns}", f"1.0 * {ns}", 0.0)
            for run_id, engine_index, gpus, hour, ns in spent
            if ns and cut.window.contains(hour)
        ],
        "SELECT run_id, 0 AS hour, engine_index, gpus, 0.0 AS gpu_ns, 0.0 AS busy_ns,"
        " 0.0 AS startup_ns FROM runs WHERE 1 = 0",
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[object]], nothing: str) -> str:
    """Return a query with these rows, each a sequence of SQL terms; without any it is `nothing`.

    SQLite takes 500 queries in a UNION, and any number of rows in VALUES.
    """
    if not rows:
        return nothing
    columns = ", ".join(f"column{place} AS {name}" for place, name in enumerate(names, 1))
    values = ",\n  ".join(f"({', '.join(map(str, row))})" for row in rows)
    return f"SELECT {columns} FROM (VALUES\n  {values}\n) AS given"


def _overhead_table(cut: Cut) -> str:
    """Return the declared overheads in the window as SQL."""
    rows: list[tuple[object, ...]] = []
    # The SQL works out the amount of a percentage.
    for line in overheads_of(cut, lambda _begin, _end: None):
        usd = None if line.nanousd is None else line.nanousd / NANOUSD_PER_USD
        amounts = [
            "CAST(NULL AS DOUBLE PRECISION)" if amount is None else repr(float(amount))
            for amount in (line.overhead.percent, usd)
        ]
        rows.append((line.from_hour, line.to_hour, *amounts))
    return _table(
        ("from_hour", "to_hour", "percent", "usd"),
        rows,
        "SELECT 0 AS from_hour, 0 AS to_hour, 0.0 AS percent, 0.0 AS usd FROM runs WHERE 1 = 0",
    )


def _text(condition: ColumnElement[bool]) -> str:
    return str(condition.compile(compile_kwargs={"literal_binds": True}))


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
