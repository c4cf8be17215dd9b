"""Checks of what is in the ledger: the books, the cost model, the price in force.

A server that runs is asked for them, because it knows which engines live and has its own prices.
Without one the ledger is read.

Invariant: a price of these settings is never shown as that of a server.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from vllm_cost_meter.attribution.cost_model import DECODE_KINDS
from vllm_cost_meter.cli.doctor.findings import Finding, Outcome, failed, fine
from vllm_cost_meter.cli.doctor.ledger import place_of
from vllm_cost_meter.cli.doctor.server import RunningServer
from vllm_cost_meter.endpoint.answers import CostModels
from vllm_cost_meter.ledger.queries.answers import Audit, CostModelRow
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, RunFacts, described
from vllm_cost_meter.reports.answers import Summary
from vllm_cost_meter.reports.charges import within
from vllm_cost_meter.units.time import NS_PER_HOUR

T = TypeVar("T")


def books_balance(url: str, server: RunningServer | None) -> Finding:
    """Audit the ledger."""
    if server is None:
        if (why := place_of(url).unread) is not None:
            return fine("books", why)
        answer: Audit = _read(url, LedgerReader.audit)
    else:
        answer = server.ask("/cost/audit", Audit)
    runs = answer["runs"]
    if answer["balanced"] is False:
        return failed("books", "they do not balance: vllm-cost-meter audit says where")
    engines_off = [run["run_id"][:8] for run in runs if run["alive"] and run["state"] == "off"]
    if engines_off:
        detail = f"the meter switched itself off in run {', '.join(engines_off)}: see the log"
        return failed("books", detail)
    known = f"{len(runs)} engine runs balance"
    if bare := len(answer["without_totals"]):
        # Theirs are bills that nothing holds against the time of the engine.
        detail = f"{known}; of {bare} more no totals are known: vllm-cost-meter audit says whose"
        return Finding("books", Outcome.WARN, detail)
    return fine("books", known if runs else "no engine run is in the ledger yet")


def cost_model(url: str, server: RunningServer | None) -> Finding:
    """Say how well the latest engine run knows what steps cost."""
    if server is None:
        if (why := place_of(url).unread) is not None:
            return fine("cost model", why)
        found: list[CostModelRow] = _read(url, LedgerReader.cost_models)
    else:
        found = server.ask("/cost/models", CostModels)["models"]
    if not found:
        return fine("cost model", "no engine has run with this ledger yet")
    latest = found[0]
    if not latest["steps"]:
        return fine("cost model", f"no step learnt from yet; prior: {latest['prior']}")
    return fine(
        "cost model",
        f"{latest['form']}, version {latest['version']}, {latest['steps']} steps of"
        f" {latest['model']}: mean error {latest['error']:.1%},"
        f" {latest['explained']:.1%} of the variance explained; {charges_known(latest)}",
    )


def charges_known(model: CostModelRow) -> str:
    """Say how well charges are known, of the kinds that usually have most of the GPU time."""
    errors = model["charge_errors"] or {}
    kinds = {"prompts": "prefill_beyond", "decodes": f"decode_to_{DECODE_KINDS[0]}_context"}
    known = [
        f"{within(errors[kind])} ({name})"
        for name, kind in kinds.items()
        if errors.get(kind, 1.0) < 1.0
    ]
    if not known:
        return "how far charges may be off is not known yet"
    return f"charges are known to within {', '.join(known)}"


def price(url: str, book: PriceBook, server: RunningServer | None) -> Finding:
    """Find the present price: that of the server, or else of these settings."""
    own = _own_price(url, book)
    return own if server is None else _servers_price(server, own)


def _servers_price(server: RunningServer, own: Finding) -> Finding:
    summary = server.ask("/cost/summary?window=1h", Summary)
    if not summary["wall_gpu_ns"]:
        detail = f"{server.url}: no engine has run in this hour; by these settings {own.detail}"
        return Finding("price", own.outcome, detail)
    if summary["prices"]:
        theirs = f"now {described(summary['prices'][-1])}"
    else:
        theirs = f"none now, so cost is null: {summary['cost_reason']}"
    found = fine("price", f"{theirs}, by {server.url}")
    if own.detail.startswith(theirs):
        return found
    # Settings without any price are those of another shell; another price may be an error.
    is_other = own.detail.startswith("now ")
    health = Outcome.WARN if is_other else Outcome.OK
    return found.and_also(health, f"these settings differ: {own.detail}")


def _own_price(url: str, book: PriceBook) -> Finding:
    """Find the price that these settings have for the latest run.

    Without any price the check passes, because prices are optional. It also passes if all prices
    are for certain runs only and no run is known yet.
    """
    is_read = place_of(url).unread is None
    run: RunFacts | None = _read(url, LedgerReader.latest_run) if is_read else None
    hour = time.time_ns() // NS_PER_HOUR
    facts = RunFacts() if run is None else run
    found = book.price_at(facts, hour)
    if found is not None:
        return fine("price", f"now {described(found.as_dict())}, by {found.key}")
    is_meant = run is None or not book.listed()["prices"]
    detail = f"none now, so cost is null: {book.why_no_price(facts, hour)}"
    return Finding("price", Outcome.OK if is_meant else Outcome.FAIL, detail)


def _read(url: str, question: Callable[[LedgerReader], T]) -> T:
    with LedgerReader(url) as reader:
        return question(reader)
