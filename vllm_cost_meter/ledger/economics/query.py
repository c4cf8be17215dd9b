"""What a deployment's tokens cost in a window, with the SQL behind each figure.

A figure is an expression over scalar subqueries on a few named tables (all in `figures`): the
ledger's own with the window, the prices and the declared latency bounds written into them. What is
executed is exactly the text that `sql_of` returns, so whoever doubts a figure can run it by hand.
SQLite and PostgreSQL both take it.

GPU time and money are of the engines' hours: idle, start-up and all else are in them. Requests and
tokens are of what ended in the window, arrivals of what came in it. What cannot be divided by
nothing is null, so a window without traffic has dollars, and no cost per token. Figures are
floating-point numbers; the books, which are exact, are in `reports`.

Invariant: figures of the window's parts add up to the window's, where they are amounts.
"""

# ruff: noqa: S608 - numbers, instants and run ids are all that is written into the SQL below
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import TextClause, text
from sqlalchemy.engine import Connection

from vllm_cost_meter.economics import Declared, Sent
from vllm_cost_meter.ledger.economics.figures import FIGURES, OF_SLO, TABLES
from vllm_cost_meter.ledger.queries.cut import Cut, Window
from vllm_cost_meter.ledger.queries.tenants import Totals, overheads_of
from vllm_cost_meter.ledger.reader import SETTLE_S, LedgerReader
from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339

_NAMED = re.compile(r"\{(\w+)\}")


def economics(
    reader: LedgerReader,
    declared: Declared,
    from_hour: int | None = None,
    to_hour: int | None = None,
    *,
    settle_s: float = SETTLE_S,
) -> dict[str, Any]:
    """Return what tokens and requests of a window cost, at which load and latency.

    Hours count since the epoch, [from_hour, to_hour).
    """
    cut = reader.cut(Window(from_hour, to_hour), (), None, settle_s)
    with reader.transaction() as connection:
        figures = read_figures(connection, cut, declared, figures_told(declared))
    return {
        "window": cut.window.as_dict(),
        "taken_at": cut.at(),
        "deployments": deployments(cut),
        "slo": declared.slo(figures.get("good_requests_share")),
        "prices": Totals.of(cut).cost.listed(),
        "figures": figures,
    }


def method(
    reader: LedgerReader,
    declared: Declared,
    from_hour: int | None = None,
    to_hour: int | None = None,
) -> list[dict[str, Any]]:
    """Return how each figure of a window comes about: unit, meaning, and the SQL as it is."""
    cut = reader.cut(Window(from_hour, to_hour), (), None, 0)
    return [
        {
            "figure": name,
            "unit": FIGURES[name].unit or None,
            "meaning": FIGURES[name].meaning,
            "sql": sql_of([name], cut, declared),
        }
        for name in figures_told(declared)
    ]


def sql_of(names: Iterable[str], cut: Cut, declared: Declared) -> str:
    """Return the statement whose one row has these figures, in this order."""
    columns = [f"{_expanded(name, declared)} AS {name}" for name in names]
    return _with_tables("SELECT\n  " + ",\n  ".join(columns), cut)


def _with_tables(selected: str, cut: Cut) -> str:
    """Return a query with the tables that it names, and those that they name, before it."""
    needed: dict[str, str] = {}
    values = _values(cut)
    for name, body in reversed(list(TABLES.items())):
        rest = selected + "".join(needed.values())
        if re.search(rf"\b(FROM|JOIN) {name}\b", rest):
            needed[name] = _NAMED.sub(lambda found: values[found[1]], body)
    tables = [f"{name} AS (\n{body}\n)" for name, body in reversed(list(needed.items()))]
    return f"WITH {', '.join(tables)}\n{selected}" if tables else selected


def read_mix(connection: Connection, cut: Cut) -> Iterator[Sent]:
    """Yield what ended in a cut's window, each with its own time and size, oldest first."""
    query = (
        "SELECT finished_at, prompt_tokens, cached_tokens, output_tokens FROM ended"
        " ORDER BY finished_at"
    )
    for row in connection.execute(_statement(_with_tables(query, cut))):
        yield Sent(datetime.fromisoformat(row[0]), *(int(tokens) for tokens in row[1:]))


def _statement(sql: str) -> TextClause:
    # A colon would be taken for a parameter: instants have some.
    return text(sql.replace(":", "\\:"))


def read_figures(
    connection: Connection, cut: Cut, declared: Declared, names: Sequence[str]
) -> dict[str, float | None]:
    """Return these figures of a cut's window; those of latency bounds need one declared."""
    row = connection.execute(_statement(sql_of(names, cut, declared))).one()
    return dict(zip(names, map(_number, row), strict=True))


def deployments(cut: Cut) -> list[dict[str, Any]]:
    """Return what ran in the window, as the engines said: hardware, model, precision and so on."""
    names = ("hardware", "gpus", "model", "precision", "parallelism", "vllm_version")
    counted: Counter[tuple[Any, ...]] = Counter(
        tuple(run.row[name] for name in names) for run in cut.runs if run.total_ns()
    )
    return [{**dict(zip(names, of, strict=True)), "runs": n} for of, n in counted.items()]


def figures_told(declared: Declared) -> list[str]:
    """Return the names of the figures that are told."""
    return [name for name in FIGURES if declared.has_slo or name not in OF_SLO]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


def condition(declared: Declared) -> str:
    """Return the SQL condition on a row of `ended` that kept all bounds."""
    # A reply of one token has no time between tokens.
    tpot = f"(tpot_ms <= {declared.tpot_ms!r} OR (tpot_ms IS NULL AND output_tokens <= 1))"
    kept = [
        *([f"ttft_ms <= {declared.ttft_ms!r}"] if declared.ttft_ms is not None else []),
        *([tpot] if declared.tpot_ms is not None else []),
        *([f"e2e_ms <= {declared.e2e_ms!r}"] if declared.e2e_ms is not None else []),
    ]
    return " AND ".join(kept)


def _expanded(name: str, declared: Declared) -> str:
    """Return the expression of a figure with those it names in their place."""

    def of(found: re.Match[str]) -> str:
        if found[1] == "slo":
            return condition(declared)
        if found[1] == "theta_max":
            known = declared.theta_max
            return "CAST(NULL AS DOUBLE PRECISION)" if known is None else repr(known)
        return f"({_expanded(found[1], declared)})"

    return _NAMED.sub(of, FIGURES[name].expression)


def _values(cut: Cut) -> dict[str, str]:
    window = cut.window
    low, high = window.from_hour, window.to_hour
    instants = [None if hour is None else rfc3339(hour * NS_PER_HOUR) for hour in (low, high)]

    def between(column: str, *bounds: object) -> str:
        terms = [
            f"{column} {sign} {bound if isinstance(bound, int) else _quoted(str(bound))}"
            for sign, bound in zip((">=", "<"), bounds, strict=True)
            if bound is not None
        ]
        return " AND ".join(terms) or "1 = 1"

    return {
        "hours": between("hour", low, high),
        "ended": between("COALESCE(h.finished_at, r.finished_at)", *instants),
        "arrived": between("MIN(started_at)", *instants),
        "began": between("started_at", *instants),
        "price": _price_table(cut),
        "overhead": _overhead_table(cut),
    }


def _price_table(cut: Cut) -> str:
    """Return the prices of the runs in the window as a query; a run without one has no row."""
    rows: list[tuple[str, int, int, float | None]] = []
    for run in cut.runs:
        hours = sorted(hour for hour in run.hours if cut.window.contains(hour))
        for hour in hours:
            price = run.prices.at(hour)
            usd = None if price is None else float(price.usd_per_gpu_hour)
            if rows and rows[-1][0] == run.run_id and rows[-1][3] == usd:
                rows[-1] = (*rows[-1][:2], hour + 1, usd)
            else:
                rows.append((run.run_id, hour, hour + 1, usd))
    told = [
        f"SELECT {_quoted(run_id)} AS price_run_id, {low} AS from_hour, {high} AS to_hour,"
        f" {usd!r} AS usd_per_gpu_hour"
        for run_id, low, high, usd in rows
        if usd is not None
    ]
    nothing = (
        "SELECT run_id AS price_run_id, 0 AS from_hour, 0 AS to_hour, 0.0 AS usd_per_gpu_hour"
        " FROM runs WHERE 1 = 0"
    )
    return "\nUNION ALL ".join(told) or nothing


def _overhead_table(cut: Cut) -> str:
    """Return the declared overheads in the window as a query."""
    told = []
    # Of a percentage the amount is worked out in the SQL.
    for line in overheads_of(cut, lambda _begin, _end: None):
        usd = None if line.nanousd is None else line.nanousd / NANOUSD_PER_USD
        amounts = [
            "CAST(NULL AS DOUBLE PRECISION)" if amount is None else repr(float(amount))
            for amount in (line.overhead.percent, usd)
        ]
        told.append(
            f"SELECT {line.from_hour} AS from_hour, {line.to_hour} AS to_hour,"
            f" {amounts[0]} AS percent, {amounts[1]} AS usd"
        )
    nothing = (
        "SELECT 0 AS from_hour, 0 AS to_hour, 0.0 AS percent, 0.0 AS usd FROM runs WHERE 1 = 0"
    )
    return "\nUNION ALL ".join(told) or nothing


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
