"""Make the ledger's records from an engine request, its bill and its HTTP request.

Nothing here does I/O or keeps state.

Invariant: the records of one request name the same tenant, model and ids.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from vllm_cost_meter.api_server.reply_bytes import ReplyCost
from vllm_cost_meter.api_server.routes import response_id_of
from vllm_cost_meter.exchange import Birth, Exchange, RequestTimes
from vllm_cost_meter.metrics import series
from vllm_cost_meter.prices.book import (
    GpuHourPrice,
    PriceBook,
    RunFacts,
    by_price,
    label_pairs,
    terms,
    time_nanousd,
    total_nanousd,
)
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.client_text import stored, stored_or_none
from vllm_cost_meter.records.owner import NOBODY
from vllm_cost_meter.records.requests import (
    EngineRequest,
    HttpRequest,
    Latencies,
    OpenRequest,
    Price,
)
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.reports.coarse import coarse_amount, coarse_phases
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339


def open_request(birth: Birth, model: str | None) -> OpenRequest:
    """Return the record of an engine request that has no bill yet."""
    exchange = birth.exchange
    return OpenRequest(
        request_id=stored(birth.request_id),
        external_id=stored_or_none(birth.external_id),
        response_id=response_id(birth),
        http_request_id=exchange.http_request_id if exchange else None,
        x_request_id=exchange.x_request_id if exchange else None,
        prompt_group=stored(birth.prompt_group),
        owner=exchange.owner if exchange else NOBODY,
        model=model,
        lora=stored_or_none(birth.lora),
        route=exchange.route if exchange else None,
        started_at_ns=birth.arrived_at_ns,
        kv_role=birth.kv_role,
    )


def engine_request(
    bill: Bill, birth: Birth | None, run: RunFacts, book: PriceBook, *, announced: bool
) -> EngineRequest:
    """Return the record of a billed engine request; without a birth it belongs to no tenant."""
    finished_at_ns = time.time_ns()
    exchange = birth.exchange if birth is not None else None
    charged = [(p.hour, Quantities(p.gpu_time_ns, p.kv_block_ms)) for p in bill.pieces]
    # What a request added is time; the blocks that it held kept no GPU busy.
    added = [(p.hour, Quantities(p.marginal_ns)) for p in bill.pieces]
    at, added_at = (_by_price(spent, run, book) for spent in (charged, added))
    return EngineRequest(
        bill=bill,
        http_request_id=exchange.http_request_id if exchange else None,
        response_id=response_id(birth) if birth else None,
        external_id=stored_or_none(birth.external_id) if birth else None,
        prompt_group=stored(birth.prompt_group) if birth else bill.request_id,
        owner=exchange.owner if exchange else NOBODY,
        model=run.model,
        lora=stored_or_none(birth.lora) if birth else None,
        route=exchange.route if exchange else None,
        cost_nanousd=None if at is None else total_nanousd(at),
        marginal_cost_nanousd=None if added_at is None else time_nanousd(added_at),
        started_at_ns=birth.arrived_at_ns if birth else finished_at_ns,
        finished_at_ns=finished_at_ns,
        latencies=_latencies(birth, bill, finished_at_ns),
        announced=announced,
        kv_role=birth.kv_role if birth else None,
    )


def http_request(exchange: Exchange, model: str | None, *, told: bool) -> HttpRequest:
    """Return the record of an HTTP request now; `told` is True if its client is told the cost."""
    sent = exchange.sent
    return HttpRequest(
        http_request_id=exchange.http_request_id,
        response_id=exchange.response_id,
        x_request_id=exchange.x_request_id,
        owner=exchange.owner,
        model=model,
        route=exchange.route,
        status=sent.final_status(),
        streamed=sent.streamed,
        usage=sent.usage,
        gpu_time_ns=exchange.gpu_time_ns if told else None,
        cost_nanousd=exchange.cost_nanousd if told else None,
        started_at_ns=exchange.started_at_ns,
        finished_at_ns=time.time_ns(),
    )


def reply_cost(exchange: Exchange) -> ReplyCost:
    """Return the cost of an HTTP request from its bills so far, in the form for its reply."""
    return ReplyCost(
        gpu_time_ns=exchange.gpu_time_ns,
        prefill_ns=exchange.prefill_ns,
        decode_ns=exchange.decode_ns,
        cost_nanousd=exchange.cost_nanousd,
        marginal_ns=exchange.marginal_ns,
        marginal_cost_nanousd=exchange.marginal_cost_nanousd,
        http_request_id=exchange.http_request_id,
        tenant=exchange.owner.tenant,
        method=exchange.method,
    )


def coarse_cost(cost: ReplyCost) -> ReplyCost:
    """Return the cost as clients are told it where they see coarse figures only."""
    gpu_time_ns, prefill_ns, decode_ns = coarse_phases(cost.gpu_time_ns, cost.prefill_ns)
    return replace(
        cost,
        gpu_time_ns=gpu_time_ns,
        prefill_ns=prefill_ns,
        decode_ns=decode_ns,
        cost_nanousd=coarse_amount(cost.cost_nanousd, cost.gpu_time_ns, gpu_time_ns),
        marginal_ns=None,
        marginal_cost_nanousd=None,
    )


def response_id(birth: Birth) -> str | None:
    """Return the id of the reply that an engine request serves; None if it is unknown."""
    if birth.exchange is None or birth.external_id is None:
        return None
    return stored_or_none(response_id_of(birth.exchange.route, birth.external_id))


def facts_of_run(snapshot: Snapshot) -> RunFacts:
    """Return what the price of a run depends on, as the ledger keeps it."""
    engine = snapshot.engine
    labels = label_pairs(engine.labels)
    return RunFacts(engine.gpus, engine.model, engine.hardware, engine.host, labels)


def price_of_run(book: PriceBook, snapshot: Snapshot) -> Price | None:
    """Return the ledger's price record for a run in its first hour; None without a price."""
    price = book.price_at(facts_of_run(snapshot), snapshot.started_at_ns // NS_PER_HOUR)
    if price is None:
        return None
    entry, agreed = price.entry, terms(price.as_dict())
    source = entry.source if agreed == "gpu" else f"{entry.source}: {agreed}"
    if entry.effective_from_hour is None:
        since_ns, price_id = snapshot.started_at_ns, f"settings:{price.text}"
    else:
        amounts = price.text if price.kv_text is None else f"{price.text}+{price.kv_text}"
        since_ns = entry.effective_from_hour * NS_PER_HOUR
        # A price is written only once, so its key has all of its contents.
        price_id = f"book:{amounts}:{rfc3339(since_ns)}:{source}"
    return Price(price_id, price.text, source, since_ns, price.kv_text)


def latencies(times: RequestTimes, output_tokens: int, finished_at_ns: int) -> Latencies:
    """Return a request's latencies from vLLM's per-request statistics, where 0 means not yet.

    Those that vLLM takes from the wall clock are unknown if that was set back meanwhile.
    """
    first, last = times.first_token_ts, times.last_token_ts
    ttft_ms = times.first_token_latency * 1e3 if first else None
    e2e_ms = finished_at_ns / 1e6 - times.arrival_time * 1e3 if times.arrival_time else None
    return Latencies(
        queue_ms=(times.scheduled_ts - times.queued_ts) * 1e3 if times.scheduled_ts else None,
        ttft_ms=_possible(ttft_ms),
        tpot_ms=(last - first) / (output_tokens - 1) * 1e3 if output_tokens > 1 and last else None,
        e2e_ms=_possible(e2e_ms),
    )


def _possible(latency_ms: float | None) -> float | None:
    return None if latency_ms is None or latency_ms < 0 else latency_ms


def _latencies(birth: Birth | None, bill: Bill, finished_at_ns: int) -> Latencies:
    if birth is None or birth.times is None:
        return Latencies()
    try:
        return latencies(birth.times, bill.output_tokens, finished_at_ns)
    except (AttributeError, TypeError):  # Another vLLM's statistics must not cost us the bill.
        series.count_error("api")
        return Latencies()


def _by_price(
    spent: Sequence[tuple[int, Quantities]], run: RunFacts, book: PriceBook
) -> dict[GpuHourPrice, Quantities] | None:
    """Return what a bill used by price, each hour at its own; None if an hour has none."""
    # A bill without use has no hour. It costs 0 if the present hour has a price.
    now = time.time_ns() // NS_PER_HOUR
    # Where a fact of the run is unknown, a price that it might change would be a guess.
    return by_price(spent or [(now, NO_QUANTITIES)], partial(book.certain_price_at, run))
