"""Reports, summary and statement at a cut: read the facts, and let `reports` make the answers.

Invariant: all parts of an answer come from one cut and one transaction.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.billing.comparison import bill_lines, billed_summary
from vllm_cost_meter.ledger.queries.costs import CutCosts, declared_overheads
from vllm_cost_meter.ledger.queries.cut import Cut
from vllm_cost_meter.ledger.queries.energy import class_mj, energy_state, total_mj
from vllm_cost_meter.ledger.queries.seen import unseen
from vllm_cost_meter.ledger.queries.tenants import after_cut
from vllm_cost_meter.ledger.queries.usage import read_facts
from vllm_cost_meter.records.snapshot import OTHER_ROWS, WORK
from vllm_cost_meter.reports.allocation import report
from vllm_cost_meter.reports.answers import EnginesPart, Report, ReportRow, Summary, TenantsReport
from vllm_cost_meter.reports.facts import COUNTS
from vllm_cost_meter.reports.grammar import Question
from vllm_cost_meter.reports.price_answers import without_labels
from vllm_cost_meter.reports.statement import OverheadCost, statement
from vllm_cost_meter.reports.statement_answers import TenantStatement


def report_at(connection: Connection, cut: Cut, question: Question) -> Report:
    """Return the report for a question at a cut."""
    costs = CutCosts.of(cut)
    facts = read_facts(connection, cut, question)
    answer = {
        "window": {**cut.window.as_dict(), "tz": str(question.zone)},
        "taken_at": cut.at(),
        "prices": _listed(costs, is_for_tenant=question.only is not None),
        **report(facts, question, costs.price_of, costs.why_none),
        "idle_unseen": unseen(connection, question.idle.declared),
    }
    return cast("Report", answer)


def tenants_at(connection: Connection, cut: Cut, question: Question) -> TenantsReport:
    """Return the report by tenant, with the engines' totals and the keys of its old form."""
    answer = report_at(connection, cut, question)
    return {**answer, "tenants": rows_of(answer), **_engines(connection, cut, answer)}


def summary_at(connection: Connection, cut: Cut, question: Question) -> Summary:
    """Return the totals of everything: requests, tokens, time by class, cost, own time."""
    answer = report_at(connection, cut, question)
    rows = rows_of(answer)
    tenants, others = rows[: -len(OTHER_ROWS)], rows[-len(OTHER_ROWS) :]
    by_class = dict(zip(OTHER_ROWS, others, strict=True))
    requests_ns = sum(row["gpu_time_ns"] for row in tenants)
    worked_ns = requests_ns + sum(by_class[name]["gpu_time_ns"] for name in WORK)
    totals = {
        **{name: value for name, value in answer.items() if name not in _OF_ROWS},
        **_engines(connection, cut, answer),
        **_counts(tenants),
        "requests_ns": requests_ns,
        **{f"{name}_ns": row["gpu_time_ns"] for name, row in by_class.items()},
        **{f"{name}_mj": row["energy_mj"] for name, row in by_class.items()},
        "utilization": _utilization(worked_ns, answer),
    }
    return cast("Summary", totals)


def statement_at(
    connection: Connection,
    cut: Cut,
    asked: Question,
    *,
    month: str,
    now_ns: int,
) -> TenantStatement:
    """Return the statement of a month, for the tenant that is asked for or for all.

    Raises ValueError for a tenant without a line.
    """
    costs = CutCosts.of(cut)
    facts = read_facts(connection, cut, asked)
    overhead, billed = _costs_beside(connection, cut)
    found = statement(
        facts,
        asked,
        costs.price_of,
        overhead=overhead,
        why=costs.why_none,
        now_ns=now_ns,
    )
    answer = {
        "month": month,
        "window": {**cut.window.as_dict(), "tz": str(asked.zone)},
        "taken_at": cut.at(),
        "methods": sorted(
            {
                *(run.row["method"] for run in cut.runs if run.total_ns()),
                *(run.billed.method for run in cut.without_totals if run.total_ns()),
            }
        ),
        "preemption_paid_by": sorted(
            {run.row["preemption_paid_by"] for run in cut.runs if run.total_ns()}
        ),
        "prices": _listed(costs, is_for_tenant=asked.names_tenants),
        "billed": billed,
        **found,
        "idle_unseen": unseen(connection, asked.idle.declared),
    }
    return cast("TenantStatement", answer)


def _costs_beside(
    connection: Connection, cut: Cut
) -> tuple[list[OverheadCost], dict[str, Any] | None]:
    """Return the costs beside those of the engines' time, and what bills of the provider cover.

    They are of all engines together. To give a part of them to some engines would be to guess.
    """
    if not cut.engines.is_all:
        return [], None
    lines, billed = bill_lines(connection, cut)
    declared = declared_overheads(cut)
    lines += [OverheadCost(of.overhead.name, of.overhead.source, of.nanousd) for of in declared]
    return lines, billed


def _listed(costs: CutCosts, *, is_for_tenant: bool) -> list[dict[str, Any]]:
    """Return the prices as their reader may see them."""
    prices = costs.cost.listed()
    return without_labels(prices) if is_for_tenant else prices


# A summary leaves out these keys of a report by tenant.
_OF_ROWS = (
    *("aggregate", "covers", "engines", "idle", "idle_unseen", "what_if_usd_per_gpu_hour"),
    "series",
)


def rows_of(answer: Report) -> list[ReportRow]:
    """Return the rows of a report by tenant without steps."""
    (piece,) = answer["series"]
    return piece["rows"]


def _utilization(worked_ns: int, answer: Report) -> float | None:
    """Return the share of all time in which the GPUs worked; None if some time is unknown."""
    if answer["without_totals_ns"] or not answer["wall_gpu_ns"]:
        return None
    return worked_ns / answer["wall_gpu_ns"]


def _counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    totals = dict.fromkeys(COUNTS, 0)
    for row in rows:
        for name in COUNTS:
            totals[name] += row[name]
    return totals


def _engines(connection: Connection, cut: Cut, answer: Report) -> EnginesPart:
    """Return the totals of the engines, which stand beside a report by tenant."""
    costs = CutCosts.of(cut)
    prices = {price["usd_per_gpu_hour"] for price in answer["prices"]}
    said = {
        "gpus": cut.gpus(),
        "after_cut": after_cut(connection, cut),
        "cost_nanousd": answer["wall_cost_nanousd"],
        "cost_usd": answer["wall_cost_usd"],
        "cost_reason": costs.cost.reason,
        "usd_per_gpu_hour": prices.pop() if len(prices) == 1 else None,
        **costs.energy_fields(),
        "overheads": [line.as_dict() for line in declared_overheads(cut)],
        "billed": billed_summary(connection, cut),
        **cut.own_time(),
        "energy_mj": total_mj(cut),
        **{f"{name}_mj": class_mj(cut, name) for name in ("requests", "unattributed")},
        "runs": [{**run.state(), **energy_state(run)} for run in cut.runs],
    }
    return cast("EnginesPart", said)
