"""Checks after the demo's traffic: the clients' figures must equal the meter's, to the unit.

These pure functions take what the clients saw and what the side endpoint answered. Each yields one
line per problem, and nothing if all is well.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vllm_cost_meter.lab.demo.traffic import (
    BATCH,
    BATCH_INPUT_TOKENS,
    BATCH_REQUESTS,
    CHAT,
    COST_DETAILS,
    TENANTS,
    Sightings,
    Told,
)

GPU_HOUR_NS = 3600 * 10**9
TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens")
Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DemoFigures:
    """The meter's answers after all requests have ended."""

    tenants: Answer
    audit: Answer
    # All HTTP requests in the ledger.
    requests: Sequence[Answer]
    # The month's statement for all tenants.
    statement: Answer
    # The size of the ledger's file with its log, and how long the report by tenants took.
    ledger_bytes: int = 0
    report_s: float = 0.0


def problems(seen: Sightings, figures: DemoFigures) -> list[str]:
    """Return a line for everything that does not add up."""
    return [
        *rows_are_all_of_the_time(figures.tenants),
        *books_balance(figures.audit),
        *every_request_is_billed(seen.sent, figures.tenants),
        *replies_agree(seen.told, figures.requests),
        *tenants_agree(figures),
        *statement_is_wall_time_times_price(figures.statement),
        *batch_agrees(seen.batch, figures.tenants),
        *abandoned_is_billed(seen.abandoned_id, figures.requests),
        *something_was_shown(seen),
    ]


def rows_are_all_of_the_time(tenants: Answer) -> Iterator[str]:
    """Check that the rows of tenants and classes add up to wall x GPUs."""
    rows_ns = sum(row["gpu_time_ns"] for row in tenants["tenants"])
    if rows_ns != tenants["wall_gpu_ns"] or not tenants["adds_up"]:
        yield f"the rows add up to {rows_ns} ns, wall x GPUs is {tenants['wall_gpu_ns']} ns"


def books_balance(audit: Answer) -> Iterator[str]:
    """Check that the audit of every engine run balances, with no bill missing."""
    if not audit["runs"]:
        yield "the ledger has no engine run"
    if not audit["balanced"]:
        yield "the audit does not balance"
    for run in audit["runs"]:
        if run["difference_ns"]:
            yield f"run {run['run_id']}: {run['difference_ns']} ns too many or too few"
        if run["missing_bills"]:
            yield f"run {run['run_id']}: the bills {run['missing_bills']} are missing"


def every_request_is_billed(sent: Counter[str], tenants: Answer) -> Iterator[str]:
    """Check that each tenant is billed for the requests it sent, and nobody else for any."""
    billed = Counter({row["tenant"]: row["requests"] for row in tenants["tenants"]})
    for name in sorted(sent.keys() | +billed):
        if sent[name] != billed[name]:
            yield f"{name}: {sent[name]} requests sent, {billed[name]} billed"


def replies_agree(told: Sequence[Told], requests: Sequence[Answer]) -> Iterator[str]:
    """Check that tenant, tokens and cost in each reply equal those in the ledger."""
    rows = {row["response_id"]: row for row in requests}
    for reply in told:
        row = rows.get(reply.response_id)
        if row is None:
            yield f"{reply.response_id}: not in the ledger"
            continue
        expected: dict[str, object] = {
            "tenant": reply.tenant,
            "prompt_tokens": reply.prompt_tokens,
            "output_tokens": reply.output_tokens,
        }
        if reply.cached_tokens is not None:
            expected["cached_tokens"] = reply.cached_tokens
        if reply.cost_usd is not None:
            expected["cost_usd"] = reply.cost_usd
        for name, value in expected.items():
            if row[name] != value:
                yield f"{reply.response_id}: {name} told {value}, in the ledger {row[name]}"


def tenants_agree(figures: DemoFigures) -> Iterator[str]:
    """Check that a tenant's tokens are the sums over its requests."""
    sums: Counter[tuple[str, str]] = Counter()
    for row in figures.requests:
        for name in TOKENS:
            sums[row["tenant"], name] += row[name] or 0
    for row in figures.tenants["tenants"]:
        for name in TOKENS:
            if row["tenant"] in TENANTS and row[name] != sums[row["tenant"], name]:
                together = sums[row["tenant"], name]
                yield f"{row['tenant']}: {name} is {row[name]}, its requests have {together}"


def statement_is_wall_time_times_price(statement: Answer) -> Iterator[str]:
    """Check that a statement's lines add up to wall time x the only price, to the cent."""
    if not statement["adds_up"]:
        yield f"the statement misses {statement['difference_ns']} ns"
    (price,) = statement["prices"]
    wall_gpu_ns = statement["whole"]["wall_gpu_ns"]
    cents = round(wall_gpu_ns * Fraction(price["usd_per_gpu_hour"]) * 100 / GPU_HOUR_NS)
    lines = sum(line["amount_cents"] for line in statement["lines"])
    if lines != cents:
        yield f"the statement's lines add up to {lines} cents, wall time x price is {cents}"


def batch_agrees(batch: Answer, tenants: Answer) -> Iterator[str]:
    """Check that the tokens counted by `vllm bench serve` are those billed to its tenant."""
    row = next((row for row in tenants["tenants"] if row["tenant"] == BATCH), None)
    if batch["completed"] != BATCH_REQUESTS:
        yield f"{BATCH}: {batch['completed']} of {BATCH_REQUESTS} requests completed"
    if row is None:
        return
    if batch["total_output_tokens"] != row["output_tokens"]:
        counted = batch["total_output_tokens"]
        yield f"{BATCH}: {counted} output tokens told, {row['output_tokens']} in the ledger"
    # An older bench reports the prompt tokens that it asked for, not those that it was told.
    asked = BATCH_REQUESTS * BATCH_INPUT_TOKENS
    if batch["total_input_tokens"] not in (row["prompt_tokens"], asked):
        counted = batch["total_input_tokens"]
        yield f"{BATCH}: {counted} prompt tokens told, {row['prompt_tokens']} in the ledger"


def abandoned_is_billed(response_id: str, requests: Sequence[Answer]) -> Iterator[str]:
    """Check that the request whose client left has a row: aborted, with its GPU time."""
    row = next((row for row in requests if row["response_id"] == response_id), None)
    if row is None:
        yield f"the request whose client left in mid-stream ({response_id}) is missing"
    elif row["engine_status"] != "aborted" or not row["gpu_time_ns"] or row["tenant"] != CHAT:
        yield (
            f"the request whose client left in mid-stream ({response_id}): expected it aborted, at "
            f"{CHAT}, with GPU time, got it {row['engine_status']}, at {row['tenant']}, with "
            f"{row['gpu_time_ns']} ns"
        )


def something_was_shown(seen: Sightings) -> Iterator[str]:
    """Check that a complete reply and a stream carried their cost."""
    if not seen.headers:
        yield "no complete reply carried a cost"
    if COST_DETAILS not in seen.last_chunk:
        yield "the stream's last chunk carried no cost"
