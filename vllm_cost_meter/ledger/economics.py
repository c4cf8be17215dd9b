"""What a deployment's tokens cost in a window, with the SQL behind each figure.

A figure is an expression over scalar subqueries on a few named tables (`TABLES`), which are the
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.engine import Connection

from vllm_cost_meter.economics import Declared, Sent
from vllm_cost_meter.economics.saturation import IDENTITY
from vllm_cost_meter.ledger.cut import Cut, Window
from vllm_cost_meter.ledger.reader import SETTLE_S, WORK, LedgerReader
from vllm_cost_meter.ledger.tenants import Totals
from vllm_cost_meter.records import CLASSES, NS_PER_HOUR, rfc3339

# Requests are of about the same size up to this factor, prompts and replies each.
SIZE_FACTOR = 1.25
# Classes in which the GPUs worked.
BUSY = ("requests", *WORK)


class Figure(NamedTuple):
    """What a figure is. `expression` names others in braces, and tables by themselves."""

    unit: str
    meaning: str
    expression: str


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


def _sum_of(names: Iterable[str]) -> str:
    return " + ".join(f"{name}_ns" for name in names)


def _same(one: str, other: str) -> str:
    return " AND ".join(f"{one}.{name} = {other}.{name}" for name in IDENTITY)


def _about(column: str, tokens: str) -> str:
    mean = f"(SELECT 1.0 * SUM({column}) / NULLIF(SUM(exchanges), 0) FROM ended)"
    return f"{mean} BETWEEN {tokens} / {SIZE_FACTOR} AND {tokens} * {SIZE_FACTOR}"


# In the order in which one may name another. {hours}, {ended} ... are conditions on the window.
TABLES: Mapping[str, str] = {
    # Every engine's hours: GPU time in all and while the GPUs worked.
    "hours": f"""SELECT engine_hours.run_id, hour, engine_index, gpus,
       1.0 * ({_sum_of(CLASSES)}) AS gpu_ns,
       1.0 * ({_sum_of(BUSY)}) AS busy_ns, 1.0 * startup_ns AS startup_ns
FROM engine_hours JOIN runs ON runs.run_id = engine_hours.run_id
WHERE {{hours}}""",
    # USD per GPU-hour of each run, from an hour on and until before another.
    "price": "{price}",
    "priced": """SELECT gpu_ns, startup_ns, usd_per_gpu_hour
FROM hours LEFT JOIN price
  ON price.price_run_id = run_id AND hour >= from_hour AND hour < to_hour""",
    # Prefill and decode by hour: time, and the tokens that were computed in it.
    "pieces": """SELECT 1.0 * prefill_ns AS prefill_ns, 1.0 * decode_ns AS decode_ns,
       prefill_tokens, decode_tokens, usd_per_gpu_hour
FROM usage_pieces LEFT JOIN price
  ON price.price_run_id = run_id AND hour >= from_hour AND hour < to_hour
WHERE {hours}""",
    # Parts of exchanges that ended, by prompt, which counts once however many parts share it.
    "prompts": """SELECT COALESCE(r.http_request_id, r.run_id || '/' || r.seq) AS id,
       MAX(CASE WHEN h.http_request_id IS NULL THEN 0 ELSE 1 END) AS exchanges,
       MAX(COALESCE(h.finished_at, r.finished_at)) AS finished_at,
       MAX(h.prompt_tokens) AS told_prompt_tokens, MAX(h.output_tokens) AS told_output_tokens,
       MAX(h.cached_tokens) AS told_cached_tokens, MAX(r.cached_tokens) AS cached_tokens,
       MAX(r.prompt_tokens) AS prompt_tokens, SUM(r.output_tokens) AS output_tokens,
       MIN(r.ttft_ms) AS ttft_ms, MAX(r.tpot_ms) AS tpot_ms, MAX(r.e2e_ms) AS e2e_ms,
       1.0 * SUM(r.gpu_time_ns) AS gpu_time_ns
FROM requests AS r LEFT JOIN http_requests AS h ON h.http_request_id = r.http_request_id
WHERE {ended}
GROUP BY COALESCE(r.http_request_id, r.run_id || '/' || r.seq), r.prompt_group""",
    # Exchanges that ended, a row each.
    "ended": """SELECT MAX(exchanges) AS exchanges, MAX(finished_at) AS finished_at,
       COALESCE(MAX(told_cached_tokens), SUM(cached_tokens)) AS cached_tokens,
       COALESCE(MAX(told_prompt_tokens), SUM(prompt_tokens)) AS prompt_tokens,
       COALESCE(MAX(told_output_tokens), SUM(output_tokens)) AS output_tokens,
       MIN(ttft_ms) AS ttft_ms, MAX(tpot_ms) AS tpot_ms, MAX(e2e_ms) AS e2e_ms,
       SUM(gpu_time_ns) AS gpu_time_ns
FROM prompts GROUP BY id""",
    # What ran in the window.
    "ran": """SELECT model, precision, vllm_version, hardware, gpus, parallelism FROM runs
WHERE run_id IN (SELECT run_id FROM hours WHERE gpu_ns > 0)
GROUP BY model, precision, vllm_version, hardware, gpus, parallelism""",
    # Full load that was measured on the one deployment that ran, with requests of such a size.
    "saturation": f"""SELECT s.measured_at, s.output_tokens_per_s
FROM saturation_points AS s JOIN ran ON {_same("s", "ran")}
WHERE (SELECT COUNT(*) FROM ran) = 1
  AND s.engines = (SELECT COUNT(DISTINCT engine_index) FROM hours)
  AND {_about("prompt_tokens", "s.input_tokens")}
  AND {_about("output_tokens", "s.output_tokens")}""",
    # Engine runs that began.
    "began": "SELECT run_id FROM runs WHERE {began}",
    # Exchanges that came, finished or not.
    "arrived": """SELECT id FROM (
  SELECT COALESCE(http_request_id, request_id) AS id, started_at FROM requests
  UNION ALL SELECT COALESCE(http_request_id, request_id), started_at FROM open_requests
) AS births GROUP BY id HAVING {arrived}""",
}


def _percentile(column: str, percent: int) -> str:
    # Nearest rank: the smallest value that so many percent do not exceed.
    rank = f"SELECT ({percent} * COUNT({column}) + 99) / 100 - 1 FROM ended"
    return (
        f"SELECT {column} FROM ended WHERE {column} IS NOT NULL ORDER BY {column} LIMIT 1"
        f" OFFSET (SELECT CASE WHEN COUNT({column}) = 0 THEN 0 ELSE ({rank}) END FROM ended)"
    )


_COST = (
    "SELECT CASE WHEN COUNT(*) = COUNT(usd_per_gpu_hour)"
    " THEN SUM({ns} * usd_per_gpu_hour) / 3.6e12 END FROM {table}"
)
FIGURES: Mapping[str, Figure] = {
    "cost_usd": Figure(
        "USD", "wall time x price of all GPUs", f"({_COST.format(ns='gpu_ns', table='priced')})"
    ),
    "wall_gpu_seconds": Figure(
        "GPU-s", "wall time x GPUs", "(SELECT SUM(gpu_ns) / 1e9 FROM hours)"
    ),
    "utilization": Figure(
        "",
        "busy / wall: the part of it in which the GPUs worked",
        "(SELECT SUM(busy_ns) / NULLIF(SUM(gpu_ns), 0) FROM hours)",
    ),
    "observed_seconds": Figure(
        "s",
        "wall time of the first engine",
        "(SELECT SUM(gpu_ns / gpus) / 1e9 FROM hours WHERE engine_index = 0)",
    ),
    "cold_starts": Figure("", "engine runs that began", "(SELECT COUNT(*) FROM began)"),
    "cold_start_gpu_seconds": Figure(
        "GPU-s",
        "from the start of an engine's process until it was ready, of all",
        "(SELECT SUM(startup_ns) / 1e9 FROM hours)",
    ),
    "cold_start_usd": Figure(
        "USD", "what that cost", f"({_COST.format(ns='startup_ns', table='priced')})"
    ),
    "requests": Figure(
        "", "exchanges that ended", "(SELECT COALESCE(SUM(exchanges), 0) FROM ended)"
    ),
    "arrivals": Figure("", "exchanges that came, ended or not", "(SELECT COUNT(*) FROM arrived)"),
    "prompt_tokens": Figure(
        "", "of what ended", "(SELECT COALESCE(SUM(prompt_tokens), 0) FROM ended)"
    ),
    "output_tokens": Figure(
        "", "of what ended", "(SELECT COALESCE(SUM(output_tokens), 0) FROM ended)"
    ),
    "arrivals_per_s": Figure("1/s", "lambda", "1.0 * {arrivals} / NULLIF({observed_seconds}, 0)"),
    "output_tokens_per_s": Figure(
        "1/s", "theta", "1.0 * {output_tokens} / NULLIF({observed_seconds}, 0)"
    ),
    "usd_per_m_output_tokens": Figure(
        "USD",
        "C_eff: all costs / output tokens",
        "1e6 * {cost_usd} / NULLIF({output_tokens}, 0)",
    ),
    "saturation_output_tokens_per_s": Figure(
        "1/s",
        "theta_max: full load as declared, or as a sweep measured it on this very deployment with"
        " requests of about this size; else null",
        "COALESCE({theta_max}, (SELECT output_tokens_per_s FROM saturation"
        " ORDER BY measured_at DESC LIMIT 1))",
    ),
    "penalty": Figure(
        "",
        "theta_max / theta: how many times the cost at full load",
        "{saturation_output_tokens_per_s} / NULLIF({output_tokens_per_s}, 0)",
    ),
    "usd_per_m_total_tokens": Figure(
        "USD",
        "all costs / prompt and output tokens",
        "1e6 * {cost_usd} / NULLIF({prompt_tokens} + {output_tokens}, 0)",
    ),
    "usd_per_request": Figure("USD", "all costs / requests", "{cost_usd} / NULLIF({requests}, 0)"),
    "usd_per_m_computed_prompt_tokens": Figure(
        "USD",
        "measured input price: prefill time, per prompt token that was computed; idle is not in it",
        f"1e6 * ({_COST.format(ns='prefill_ns', table='pieces')})"
        " / NULLIF((SELECT SUM(prefill_tokens) FROM pieces), 0)",
    ),
    "usd_per_m_decoded_tokens": Figure(
        "USD",
        "measured output price: decode time, per token decoded; idle is not in it",
        f"1e6 * ({_COST.format(ns='decode_ns', table='pieces')})"
        " / NULLIF((SELECT SUM(decode_tokens) FROM pieces), 0)",
    ),
    "mean_e2e_seconds": Figure(
        "s", "W: from arrival to end", "(SELECT AVG(e2e_ms) / 1e3 FROM ended)"
    ),
    "concurrency": Figure(
        "",
        "L: time in the system of what ended / observed time",
        "(SELECT SUM(e2e_ms) / 1e3 FROM ended) / NULLIF({observed_seconds}, 0)",
    ),
    "littles_law": Figure(
        "",
        "lambda x W: near L if as many came as ended",
        "{arrivals_per_s} * {mean_e2e_seconds}",
    ),
    **{
        f"{name}_p{percent}_ms": Figure(
            "ms",
            f"{percent}th percentile of {meaning}, by nearest rank",
            f"({_percentile(f'{name}_ms', percent)})",
        )
        for name, meaning in (
            ("ttft", "time to first token"),
            ("tpot", "time per output token"),
            ("e2e", "time from arrival to end"),
        )
        for percent in (50, 99)
    },
    "good_requests": Figure(
        "",
        "exchanges that ended within all declared bounds",
        "(SELECT COALESCE(SUM(exchanges), 0) FROM ended WHERE {slo})",
    ),
    "good_output_tokens": Figure(
        "",
        "goodput: output tokens of those",
        "(SELECT COALESCE(SUM(output_tokens), 0) FROM ended WHERE {slo})",
    ),
    "good_requests_share": Figure(
        "", "of all that ended", "1.0 * {good_requests} / NULLIF({requests}, 0)"
    ),
    "usd_per_m_good_output_tokens": Figure(
        "USD",
        "all costs / goodput",
        "1e6 * {cost_usd} / NULLIF({good_output_tokens}, 0)",
    ),
    "missed_spend_share": Figure(
        "",
        "part of the GPU time of what ended that went into requests outside a bound",
        "(SELECT SUM(CASE WHEN {slo} THEN 0.0 ELSE gpu_time_ns END)"
        " / NULLIF(SUM(gpu_time_ns), 0) FROM ended)",
    ),
}
# Told only where bounds were declared.
OF_SLO = tuple(name for name in FIGURES if "good" in name or "missed" in name)
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


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
