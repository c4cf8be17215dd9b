"""Requests for benchmarks: the bill and the HTTP request of one, as a server makes them.

vLLM's ids are as random as those of a server, and the meter's own in the order of time as there: it
is the indexes of random ids that take bytes and time.
"""

import hashlib
import time

from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Usage
from vllm_cost_meter.units.time import NS_PER_MS

TENANTS = 50


def records(run_id: str, number: int) -> tuple[EngineRequest, HttpRequest]:
    """Return an engine request with its bill, and its HTTP request."""
    now_ns = time.time_ns()
    digits = hashlib.blake2b(f"{run_id}/{number}".encode(), digest_size=22).hexdigest()
    chance = int(digits[:8], 16) / 2**32
    owner = Owner(f"tenant-{number % TENANTS:02d}", NamedBy("api_key"))
    http_id = f"cost-{now_ns // NS_PER_MS:012x}{digits[:20]}"
    response_id = f"cmpl-{digits[20:36]}"
    bill = Bill(
        run_id=run_id,
        seq=number + 1,
        request_id=f"{response_id}-0-{digits[36:]}",
        engine_status="length_capped",
        method="tokens",
        prompt_tokens=128,
        cached_tokens=0,
        output_tokens=128,
        preemptions=0,
        steps=128,
        batch=1280,
        first_model=3,
        last_model=4,
        pieces=(
            UsagePiece(
                *(500_000, 1_000_000, 80_000_000, 128, 127),
                marginal_ns=60_000_000,
                kv_block_ms=5_600,
                step_ns=900_000_000,
                charge_error_ns=3_240_000,
            ),
        ),
    )
    part = EngineRequest(
        bill=bill,
        http_request_id=http_id,
        response_id=response_id,
        external_id=f"{response_id}-0",
        prompt_group=bill.request_id,
        owner=owner,
        model="model",
        lora=None,
        route="/v1/completions",
        cost_nanousd=56_250,
        marginal_cost_nanousd=50_000,
        started_at_ns=now_ns - 700_000_000,
        finished_at_ns=now_ns,
        latencies=Latencies(chance, 10 + 20 * chance, 4 + 2 * chance, 600 + 200 * chance),
    )
    http = HttpRequest(
        http_request_id=http_id,
        response_id=response_id,
        x_request_id=None,
        owner=owner,
        model="model",
        route="/v1/completions",
        status=200,
        streamed=True,
        usage=Usage(128, 0, 128),
        gpu_time_ns=bill.gpu_time_ns,
        cost_nanousd=part.cost_nanousd,
        started_at_ns=now_ns - 700_000_000,
        finished_at_ns=now_ns,
    )
    return part, http
