"""The list of economic figures: the unit, meaning and SQL expression of each.

`query.py` fills in a window and asks the ledger; here the list can be read as a list. SQLite and
PostgreSQL both take every expression.

Invariant: a figure names only figures and tables in this module. A table names only tables before
it.
"""

# ruff: noqa: S608 - nothing is written into the SQL here but names of this package
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vllm_cost_meter.economics.saturation import IDENTITY
from vllm_cost_meter.ledger.tables.replies import TOLD
from vllm_cost_meter.records.snapshot import BUSY, CLASSES

# Two sizes are about the same up to this factor, for prompts and replies each.
SIZE_FACTOR = 1.25


class Figure(NamedTuple):
    """One figure. `expression` is SQL: it has other figures in braces, and tables by name."""

    unit: str
    meaning: str
    expression: str


def _sum_of(names: Iterable[str]) -> str:
    return " + ".join(f"{name}_ns" for name in names)


def _same(one: str, other: str) -> str:
    return " AND ".join(f"{one}.{name} = {other}.{name}" for name in IDENTITY)


def _about(column: str, tokens: str) -> str:
    mean = f"(SELECT 1.0 * {column} / NULLIF(exchanges, 0) FROM ended_sums)"
    return f"{mean} BETWEEN {tokens} / {SIZE_FACTOR} AND {tokens} * {SIZE_FACTOR}"


def _told(tokens: str) -> str:
    """Return the SQL for the tokens that a reply told its client; NULL for none."""
    own, other = (
        f"CASE WHEN {bill}.reply_told & {TOLD[tokens]} <> 0 THEN {bill}.{tokens} END"
        for bill in ("r", "b")
    )
    return f"MAX(COALESCE({own}, h.{tokens}, {other})) AS told_{tokens}"


# Amounts of pieces, and with those of exchanges what the figures need of sums.
_USED = ("prefill_ns", "decode_ns", "prefill_tokens", "decode_tokens", "kv_block_ms")
_SUMMED = ", ".join((*_USED, "requests", "prompt_tokens", "output_tokens"))
# When the exchange of a bill ended.
ENDED_AT = "COALESCE(h.finished_at, b.ended_at, r.ended_at)"
# The exchange of a bill that has no reply beside it: of all others nothing is looked up.
_ID_OF_OTHER = "CASE WHEN r.reply_status IS NULL THEN r.http_request_id END"


# Each table may name the tables before it. `query.py` replaces {hours}, {ended} and the like with
# conditions on the window, and {of_hours} and the like with conditions on the engines that are
# chosen: none for all engines.
TABLES: Mapping[str, str] = {
    # The runs of the engines that are chosen.
    "chosen": "{chosen}",
    # Each engine's hours: all GPU time, and the part in which the GPUs worked. Then what bills have
    # beyond: the last ones of dead engines, and those of runs without totals, whose GPUs are NULL.
    "hours": f"""SELECT engine_hours.run_id, hour, engine_index, gpus,
       1.0 * ({_sum_of(CLASSES)}) AS gpu_ns,
       1.0 * ({_sum_of(BUSY)}) AS busy_ns, 1.0 * startup_ns AS startup_ns
FROM engine_hours JOIN runs ON runs.run_id = engine_hours.run_id
WHERE {{hours}}{{of_hours}}
UNION ALL {{beyond}}""",
    # The time in each hour in which any engine ran.
    "observed": "{observed}",
    # USD per GPU-hour, and per KV block-hour, for each run in the hours [from_hour, to_hour).
    "price": "{price}",
    "priced": """SELECT hour, gpu_ns, startup_ns, usd_per_gpu_hour
FROM hours LEFT JOIN price
  ON price.price_run_id = run_id AND hour >= from_hour AND hour < to_hour""",
    # The provider's billed hours, without rows that have neither known time nor money.
    "billed": """SELECT hour, kind, 1.0 * nanousd AS nanousd, covered_ns FROM billed_hours
WHERE {hours} AND (covered_ns > 0 OR nanousd <> 0)""",
    # The billed part of each hour: the largest among the GPU resources.
    "covered": """SELECT hour AS covered_hour, MAX(covered_ns) / 3.6e12 AS share
FROM billed WHERE kind = 'gpu' GROUP BY hour""",
    "compared": """SELECT gpu_ns, usd_per_gpu_hour, COALESCE(share, 0.0) AS share
FROM priced LEFT JOIN covered ON covered_hour = hour
WHERE gpu_ns > 0""",
    # Declared overheads: a percentage of the cost of their hours, or an amount.
    "overhead": "{overhead}",
    "overheads": """SELECT CASE WHEN percent IS NULL THEN usd ELSE percent / 100.0 * (
  SELECT CASE WHEN COUNT(*) = COUNT(usd_per_gpu_hour)
    THEN COALESCE(SUM(gpu_ns * usd_per_gpu_hour), 0.0) / 3.6e12 END
  FROM priced WHERE gpu_ns > 0 AND hour >= from_hour AND hour < to_hour
) END AS usd FROM overhead""",
    # Sums of the window: of whole days where no price begins, ends or changes, else of hours.
    "sums": f"""SELECT group_id, first_hour AS hour, {_SUMMED}
FROM rollup_days WHERE {{whole_days}}{{of_groups}}
UNION ALL SELECT group_id, hour, {_SUMMED}
FROM rollup_hours WHERE {{other_hours}}{{of_groups}}""",
    # Prefill and decode: their time, and the tokens computed in it; and KV residency.
    "pieces": f"""SELECT 1.0 * prefill_ns AS prefill_ns, 1.0 * decode_ns AS decode_ns,
       prefill_tokens, decode_tokens, 1.0 * kv_block_ms AS kv_block_ms,
       usd_per_gpu_hour, usd_per_kv_block_hour
FROM sums JOIN rollup_groups ON rollup_groups.group_id = sums.group_id
LEFT JOIN price
  ON price.price_run_id = run_id AND hour >= from_hour AND hour < to_hour
WHERE {" OR ".join(f"{name} <> 0" for name in _USED)}""",
    # The parts of ended exchanges by prompt. A prompt counts once, even if several parts share it.
    # A reply is beside the bill itself, in a row of its own (h), or beside another bill (b).
    "prompts": f"""SELECT COALESCE(r.http_request_id, r.run_id || '/' || r.seq) AS id,
       MIN(r.run_id) AS run_id,
       MAX(CASE WHEN COALESCE(r.reply_status, h.status, b.reply_status) IS NULL
         THEN 0 ELSE 1 END) AS exchanges,
       MAX({ENDED_AT}) AS finished_at,
       {_told("prompt_tokens")}, {_told("cached_tokens")}, {_told("output_tokens")},
       MAX(r.cached_tokens) AS cached_tokens,
       COALESCE(MAX(r.external_tokens), 0) AS external_tokens,
       MAX(r.prompt_tokens) AS prompt_tokens, SUM(r.output_tokens) AS output_tokens,
       MIN(r.ttft_us) / 1e3 AS ttft_ms, MAX(r.tpot_us) / 1e3 AS tpot_ms,
       MAX(r.e2e_us) / 1e3 AS e2e_ms,
       1.0 * SUM(r.gpu_time_ns) AS gpu_time_ns
FROM requests AS r LEFT JOIN http_requests AS h ON h.http_request_id = {_ID_OF_OTHER}
LEFT JOIN requests AS b
  ON b.http_request_id = {_ID_OF_OTHER} AND b.reply_status IS NOT NULL
WHERE {{ended}}
GROUP BY COALESCE(r.http_request_id, r.run_id || '/' || r.seq),
         COALESCE(NULLIF(r.prompt_group, ''), r.request_id)""",
    # One row for each exchange that ended; it is of its parts' first run by name, as in the sums.
    "ended": """SELECT MAX(exchanges) AS exchanges, MAX(finished_at) AS finished_at,
       CASE WHEN SUM(external_tokens) > 0 THEN SUM(cached_tokens)
         ELSE COALESCE(MAX(told_cached_tokens), SUM(cached_tokens)) END AS cached_tokens,
       COALESCE(MAX(told_prompt_tokens), SUM(prompt_tokens)) AS prompt_tokens,
       COALESCE(MAX(told_output_tokens), SUM(output_tokens)) AS output_tokens,
       MIN(ttft_ms) AS ttft_ms, MAX(tpot_ms) AS tpot_ms, MAX(e2e_ms) AS e2e_ms,
       SUM(gpu_time_ns) AS gpu_time_ns
FROM prompts GROUP BY id{of_exchanges}""",
    # All of them, from the sums by hour.
    "ended_sums": """SELECT COALESCE(SUM(requests), 0) AS exchanges,
       COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens,
       COALESCE(SUM(output_tokens), 0) AS output_tokens
FROM sums""",
    # How long they took: histograms whose times are within 1 % of those that they stand for.
    "latencies": "{latencies}",
    # The deployments that ran in the window.
    "ran": """SELECT model, precision, vllm_version, hardware, gpus, parallelism FROM runs
WHERE run_id IN (SELECT run_id FROM hours WHERE gpu_ns > 0)
GROUP BY model, precision, vllm_version, hardware, gpus, parallelism""",
    # Full load as measured on the only deployment that ran, with requests of about the same size.
    "saturation": f"""SELECT s.measured_at, s.output_tokens_per_s
FROM saturation_points AS s JOIN ran ON {_same("s", "ran")}
WHERE (SELECT COUNT(*) FROM ran) = 1
  AND s.engines = {{engines}}
  AND {_about("prompt_tokens", "s.input_tokens")}
  AND {_about("output_tokens", "s.output_tokens")}""",
    # The engine runs that began in the window.
    "began": "SELECT run_id FROM runs WHERE {began}{of_runs}",
    # The exchanges that arrived in the window: those with a bill, and those without one yet.
    "arrived": "{arrived}",
}
# Histograms and arrivals are summed over all engines.
LATENCIES_OF_ALL = """SELECT measure, about_us, SUM(exchanges) AS exchanges, SUM(sum_us) AS sum_us
FROM rollup_latencies WHERE {hours} GROUP BY measure, about_us"""
ARRIVED_OF_ALL = """SELECT exchanges FROM rollup_arrivals WHERE {hours}
UNION ALL SELECT COUNT(*) FROM (
  SELECT COALESCE(http_request_id, request_id) AS id FROM open_requests AS o
  WHERE NOT EXISTS (SELECT 1 FROM requests AS r WHERE r.http_request_id = o.http_request_id)
  GROUP BY COALESCE(http_request_id, request_id) HAVING {came_first}
) AS waiting"""
# Of some engines the rows of requests tell them, and nobody where rows were dropped. What has no
# bill yet is of no engine.
LATENCIES_OF_SOME = "\nUNION ALL ".join(
    f"SELECT '{name}' AS measure, {name}_ms * 1e3 AS about_us, 1 AS exchanges,"
    f" {name}_ms * 1e3 AS sum_us FROM ended WHERE {name}_ms IS NOT NULL AND {{has_all_rows}}"
    for name in ("ttft", "tpot", "e2e")
)


def _of_exchange(column: str) -> str:
    parts = f"SELECT MIN(b.{column}) FROM requests AS b WHERE b.http_request_id = r.http_request_id"
    return f"COALESCE(({parts}), r.{column})"


ARRIVED_OF_SOME = f"""SELECT CASE WHEN {{has_all_rows}}
  THEN COUNT(DISTINCT COALESCE(r.http_request_id, r.run_id || '/' || r.seq)) END AS exchanges
FROM requests AS r WHERE {{came}}
  AND {_of_exchange("started_at")} = r.started_at
  AND {_of_exchange("run_id")} IN (SELECT chosen_run_id FROM chosen)"""


# A percentile of more exchanges is read from the histograms, and one of a window whose rows were
# dropped.
EXACT_MAX = 50_000
_WITHIN = f"; within 1 % of more than {EXACT_MAX:,} requests, and where rows were dropped"
_IF_ROWS = "; null where rows were dropped"


def _percentile(measure: str, percent: int) -> str:
    is_small = f"{{has_all_rows}} AND (SELECT exchanges FROM ended_sums) <= {EXACT_MAX}"
    exact, near = exact_percentile(measure, percent), near_percentile(measure, percent)
    return f"CASE WHEN {is_small} THEN ({exact}) ELSE ({near}) END"


def exact_percentile(measure: str, percent: int) -> str:
    """Return the SQL for a percentile by nearest rank over every exchange.

    That is the smallest time that at least so many percent of the times do not exceed.
    """
    column = f"{measure}_ms"
    rank = f"SELECT ({percent} * COUNT({column}) + 99) / 100 - 1 FROM ended"
    return (
        f"SELECT {column} FROM ended WHERE {column} IS NOT NULL ORDER BY {column} LIMIT 1"
        f" OFFSET (SELECT CASE WHEN COUNT({column}) = 0 THEN 0 ELSE ({rank}) END FROM ended)"
    )


def near_percentile(measure: str, percent: int) -> str:
    """Return the SQL for the same over histograms: within 1 %, whatever the number of exchanges."""
    of_measure = f"FROM latencies WHERE measure = '{measure}'"
    ranked = f"SELECT about_us, SUM(exchanges) OVER (ORDER BY about_us) AS upto {of_measure}"
    return (
        f"SELECT about_us / 1e3 FROM ({ranked}) AS ranked"
        f" WHERE 100 * upto >= {percent} * (SELECT SUM(exchanges) {of_measure})"
        " ORDER BY about_us LIMIT 1"
    )


def _of_rows(query: str) -> str:
    """Return the SQL for a figure that only rows of requests tell."""
    return f"(CASE WHEN {{has_all_rows}} THEN ({query}) END)"


_MEAN_E2E = (
    "(SELECT SUM(sum_us) / 1e6 / NULLIF(SUM(exchanges), 0) FROM latencies WHERE measure = 'e2e')"
)
_COST = (
    "SELECT CASE WHEN COUNT(*) = COUNT(usd_per_gpu_hour)"
    " THEN SUM({ns} * usd_per_gpu_hour) / 3.6e12 END FROM {table}"
)
# The cost of hours that no bill covers; null without hours, and if one has no price.
_UNBILLED = (
    "SELECT CASE WHEN COUNT(*) = COUNT(CASE WHEN share >= 1 THEN 1.0 ELSE usd_per_gpu_hour END)"
    " THEN SUM(CASE WHEN share >= 1 THEN 0.0 ELSE gpu_ns * usd_per_gpu_hour * (1 - share) END)"
    " / 3.6e12 END FROM compared"
)
_UNKNOWN = (
    "SELECT COUNT(*) FROM compared WHERE share < 1 AND usd_per_gpu_hour IS NULL",
    "SELECT COUNT(*) FROM overheads WHERE usd IS NULL",
)
_BLENDED = ("{unbilled_usd}", "{billed_gpu_usd}", "{billed_other_usd}", "{overhead_usd}")
FIGURES: Mapping[str, Figure] = {
    "cost_usd": Figure(
        "USD", "wall time x price of all GPUs", f"({_COST.format(ns='gpu_ns', table='priced')})"
    ),
    "billed_gpu_usd": Figure(
        "USD",
        "the amount billed for GPUs; null if no bill was imported for the window",
        "(SELECT SUM(nanousd) / 1e9 FROM billed WHERE kind = 'gpu')",
    ),
    "metered_while_billed_usd": Figure(
        "USD",
        "wall time x price, for the time that GPU bills cover",
        "CASE WHEN {billed_gpu_usd} IS NOT NULL THEN (SELECT CASE WHEN COUNT(*) ="
        " COUNT(usd_per_gpu_hour) THEN COALESCE(SUM(gpu_ns * usd_per_gpu_hour * share), 0.0)"
        " / 3.6e12 END FROM compared WHERE share > 0) END",
    ),
    "billed_difference_usd": Figure(
        "USD",
        "billed for GPUs - metered while billed",
        "{billed_gpu_usd} - {metered_while_billed_usd}",
    ),
    "capture_rate": Figure(
        "",
        "metered while billed / billed for GPUs",
        "CASE WHEN {billed_gpu_usd} > 0 THEN {metered_while_billed_usd} / {billed_gpu_usd} END",
    ),
    "unbilled_usd": Figure(
        "USD", "wall time x price, for the time that no bill covers", f"({_UNBILLED})"
    ),
    "billed_other_usd": Figure(
        "USD",
        "the amount billed for anything but GPUs: disks, network and other",
        "(SELECT SUM(nanousd) / 1e9 FROM billed WHERE kind <> 'gpu')",
    ),
    "overhead_usd": Figure(
        "USD",
        "declared overheads",
        "(SELECT CASE WHEN COUNT(*) = COUNT(usd) THEN SUM(usd) END FROM overheads)",
    ),
    "blended_cost_usd": Figure(
        "USD",
        "everything: billed amounts, wall time x price without a bill, and overheads",
        f"CASE WHEN ({_UNKNOWN[0]}) = 0 AND ({_UNKNOWN[1]}) = 0"
        f" AND COALESCE({', '.join(_BLENDED)}) IS NOT NULL"
        f" THEN {' + '.join(f'COALESCE({name}, 0.0)' for name in _BLENDED)} END",
    ),
    "blended_usd_per_m_output_tokens": Figure(
        "USD",
        "everything / output tokens",
        "1e6 * {blended_cost_usd} / NULLIF({output_tokens}, 0)",
    ),
    "blended_usd_per_m_total_tokens": Figure(
        "USD",
        "everything / prompt and output tokens",
        "1e6 * {blended_cost_usd} / NULLIF({prompt_tokens} + {output_tokens}, 0)",
    ),
    "wall_gpu_seconds": Figure(
        "GPU-s", "wall time x GPUs", "(SELECT SUM(gpu_ns) / 1e9 FROM hours)"
    ),
    "utilization": Figure(
        "",
        "busy / wall: the part of the wall time in which the GPUs worked; null if only bills are"
        " known of a run",
        "(SELECT CASE WHEN COUNT(*) = COUNT(gpus)"
        " THEN SUM(busy_ns) / NULLIF(SUM(gpu_ns), 0) END FROM hours)",
    ),
    "observed_seconds": Figure(
        "s",
        "the time in which any engine ran: two at once count once; null if only bills are known of"
        " a run in the window",
        "(SELECT CASE WHEN COUNT(*) = COUNT(ns) THEN SUM(ns) / 1e9 END FROM observed)",
    ),
    "cold_starts": Figure("", "engine runs that began", "(SELECT COUNT(*) FROM began)"),
    "cold_start_gpu_seconds": Figure(
        "GPU-s",
        "time from an engine's start until it was ready, summed over cold starts",
        "(SELECT SUM(startup_ns) / 1e9 FROM hours)",
    ),
    "cold_start_usd": Figure(
        "USD",
        "cost of the time in cold starts",
        f"({_COST.format(ns='startup_ns', table='priced')})",
    ),
    "requests": Figure("", "exchanges that ended", "(SELECT exchanges FROM ended_sums)"),
    "arrivals": Figure(
        "",
        "exchanges that arrived, ended or not",
        "(SELECT CASE WHEN COUNT(*) = COUNT(exchanges) THEN COALESCE(SUM(exchanges), 0) END"
        " FROM arrived)",
    ),
    "prompt_tokens": Figure(
        "",
        "prompt tokens of exchanges that ended",
        "(SELECT prompt_tokens FROM ended_sums)",
    ),
    "output_tokens": Figure(
        "",
        "output tokens of exchanges that ended",
        "(SELECT output_tokens FROM ended_sums)",
    ),
    "arrivals_per_s": Figure(
        "1/s",
        "lambda: arrivals / observed time",
        "1.0 * {arrivals} / NULLIF({observed_seconds}, 0)",
    ),
    "output_tokens_per_s": Figure(
        "1/s",
        "theta: output tokens / observed time",
        "1.0 * {output_tokens} / NULLIF({observed_seconds}, 0)",
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
        "measured input price: cost of prefill time / computed prompt tokens, without idle time",
        f"1e6 * ({_COST.format(ns='prefill_ns', table='pieces')})"
        " / NULLIF((SELECT SUM(prefill_tokens) FROM pieces), 0)",
    ),
    "usd_per_m_decoded_tokens": Figure(
        "USD",
        "measured output price: cost of decode time / decoded tokens, without idle time",
        f"1e6 * ({_COST.format(ns='decode_ns', table='pieces')})"
        " / NULLIF((SELECT SUM(decode_tokens) FROM pieces), 0)",
    ),
    "kv_cost_usd": Figure(
        "USD",
        "charged for KV residency, on top of GPU time; no part of `cost_usd`, which is what the"
        " GPUs cost",
        "(SELECT CASE WHEN COUNT(*) = COUNT(usd_per_kv_block_hour)"
        " THEN COALESCE(SUM(kv_block_ms * usd_per_kv_block_hour), 0.0) / 3.6e6 END FROM pieces)",
    ),
    "charged_usd": Figure(
        "USD",
        "what requests are charged without idle time: GPU time x price, and KV residency x price",
        f"({_COST.format(ns='(prefill_ns + decode_ns)', table='pieces')}) + {{kv_cost_usd}}",
    ),
    "recovered_share": Figure(
        "",
        "charged / cost of all GPUs: above 1, requests are charged more than the GPUs cost",
        "{charged_usd} / NULLIF({cost_usd}, 0)",
    ),
    "mean_e2e_seconds": Figure("s", "W: mean time from arrival to end", _MEAN_E2E),
    "concurrency": Figure(
        "",
        "L: time in the system, summed over exchanges that ended / observed time",
        "(SELECT SUM(sum_us) / 1e6 FROM latencies WHERE measure = 'e2e')"
        " / NULLIF({observed_seconds}, 0)",
    ),
    "littles_law": Figure(
        "",
        "lambda x W: near L if as many exchanges arrived as ended",
        "{arrivals_per_s} * {mean_e2e_seconds}",
    ),
    **{
        f"{name}_p{percent}_ms": Figure(
            "ms",
            f"{percent}th percentile of {meaning}, by nearest rank{_WITHIN}",
            _percentile(name, percent),
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
        f"exchanges that ended within all declared bounds{_IF_ROWS}",
        _of_rows("SELECT COALESCE(SUM(exchanges), 0) FROM ended WHERE {slo}"),
    ),
    "good_output_tokens": Figure(
        "",
        f"goodput: output tokens of good requests{_IF_ROWS}",
        _of_rows("SELECT COALESCE(SUM(output_tokens), 0) FROM ended WHERE {slo}"),
    ),
    "good_requests_share": Figure(
        "", "good requests / exchanges that ended", "1.0 * {good_requests} / NULLIF({requests}, 0)"
    ),
    "usd_per_m_good_output_tokens": Figure(
        "USD",
        "all costs / goodput",
        "1e6 * {cost_usd} / NULLIF({good_output_tokens}, 0)",
    ),
    "missed_spend_share": Figure(
        "",
        f"share of the GPU time that went into ended requests outside a bound{_IF_ROWS}",
        _of_rows(
            "SELECT SUM(CASE WHEN {slo} THEN 0.0 ELSE gpu_time_ns END)"
            " / NULLIF(SUM(gpu_time_ns), 0) FROM ended"
        ),
    ),
}
# Answers have these figures only if latency bounds are declared.
OF_SLO = tuple(name for name in FIGURES if "good" in name or "missed" in name)
# Bills of the provider and declared overheads are of all engines: of some nobody knows these.
OF_ALL_ENGINES = tuple(
    name for name in FIGURES if "billed" in name or "blended" in name or "overhead" in name
) + ("capture_rate",)
