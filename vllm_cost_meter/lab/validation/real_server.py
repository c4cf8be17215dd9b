"""Measure attribution on a real vLLM server: each tenant alone, then both together.

The requests are the same in all phases. Tenant A added the time of both together minus the time of
B alone. The time of A alone was measured too. A fair charge lies between the two. (If both together
take longer than apart, the added time is the larger one.) The server logs its steps, and every
method replays that log, so all methods are judged on the same steps. Rounds take turns at which
phase goes first. A phase's noise is half the range of its time over the rounds.

Invariant: every method charges exactly the measured time, in every phase.
"""

import http.client
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.server import (
    CPU_ARGUMENTS,
    LOOPBACK,
    Server,
    environment_of,
    is_cpu_build,
    meter_arguments,
)
from vllm_cost_meter.lab.validation.replay import charges_of_log

# Every language model's tokenizer has these ids, and none of them ends the text.
TOKEN_IDS = range(100, 400)
REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class TenantTraffic:
    """A tenant's requests, sent all at once: their number, prompt tokens and output tokens."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int


TENANTS = (TenantTraffic("documents", 8, 1_000, 120), TenantTraffic("chat", 24, 40, 160))
BOTH = "both"
WARM_UP = "warm-up"
WARM_UP_ROUNDS = 2


def measure(model: str, rounds: int, on_phase: Callable[[str], None]) -> dict[str, Any]:
    """Run all phases on a new server and return each method's charges, ready for JSON.

    `on_phase` is called with a text for each phase. Raises ServerError if the server or a request
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-cost-meter-validate-") as name:
        folder = Path(name)
        log = folder / "steps.jsonl"
        environment = environment_of(folder, offline=Path(model).is_dir())
        environment |= {
            "COST_METER_STEP_LOG": str(log),
            "COST_METER_LEDGER": f"sqlite:///{folder / 'ledger.db'}",
        }
        arguments = [
            *(*meter_arguments(), "--served-model-name", "model"),
            "--no-enable-prefix-caching",
            *(CPU_ARGUMENTS if is_cpu_build() else ()),
        ]
        server = Server(model, arguments, environment, folder / "vllm.log")
        try:
            server.launch()
            server.wait(on_phase)
            for number in range(-WARM_UP_ROUNDS, rounds):
                for phase in phases_of(number):
                    on_phase(f"round {number + 1} of {rounds}: {phase}")
                    _run(server.port, f"{WARM_UP if number < 0 else number}.{phase}", phase)
            server.cost("audit")  # This takes a snapshot, which writes the rest of the log.
        finally:
            server.stop()
        _, _, by_method = charges_of_log(log)
    return judge(by_method, rounds)


def phases_of(number: int) -> list[str]:
    """Return the phases of a round; the first one changes from round to round."""
    phases = [*(tenant.name for tenant in TENANTS), BOTH]
    first = number % len(phases)
    return phases[first:] + phases[:first]


def judge(by_method: Mapping[str, Mapping[str, int]], rounds: int) -> dict[str, Any]:
    """Compare each tenant's charge with the time that it added and the time that it took alone.

    `by_method` has each request's GPU-ns by its id, "...<round>.<phase>.<tenant>.<number>...".
    """
    ns = {method: _by_phase(charges, rounds) for method, charges in by_method.items()}
    measured = next(iter(ns.values()))
    together = [sum(measured[BOTH, tenant.name, r] for tenant in TENANTS) for r in range(rounds)]
    alone = {
        tenant.name: [measured[tenant.name, tenant.name, r] for r in range(rounds)]
        for tenant in TENANTS
    }
    tenants = {}
    for tenant in TENANTS:
        others = [one.name for one in TENANTS if one is not tenant]
        added = fmean(together) - sum(fmean(alone[other]) for other in others)
        noise = _half_range(together) + sum(_half_range(alone[other]) for other in others)
        tenants[tenant.name] = {
            "added_ns": round(added),
            "added_noise_ns": round(noise),
            "alone_ns": round(fmean(alone[tenant.name])),
            "alone_noise_ns": round(_half_range(alone[tenant.name])),
            "charged_ns": {
                method: round(fmean([found[BOTH, tenant.name, r] for r in range(rounds)]))
                for method, found in ns.items()
            },
        }
    outside = {method: sum(_outside(found, method) for found in tenants.values()) for method in ns}
    return {
        "rounds": rounds,
        "together_ns": round(fmean(together)),
        "together_noise_ns": round(_half_range(together)),
        "tenants": tenants,
        "methods": {
            method: {"outside_interval_share": ns_outside / fmean(together)}
            for method, ns_outside in outside.items()
        },
    }


def _outside(found: Mapping[str, Any], method: str) -> float:
    """Return the ns by which a charge lies outside its interval, widened by its ends' noise."""
    ends = [(found[f"{end}_ns"], found[f"{end}_noise_ns"]) for end in ("added", "alone")]
    least = min(ns - noise for ns, noise in ends)
    most = max(ns + noise for ns, noise in ends)
    charged = found["charged_ns"][method]
    return float(max(0, least - charged, charged - most))


def _by_phase(charges: Mapping[str, int], rounds: int) -> dict[tuple[str, str, int], int]:
    """Return GPU-ns by (phase, tenant, round)."""
    found = {
        (phase, tenant.name, number): 0
        for phase in phases_of(0)
        for tenant in TENANTS
        for number in range(rounds)
    }
    for request_id, ns in charges.items():
        if not request_id.startswith("cmpl-"):
            continue  # The server's own warm-up, or a step after its request had ended.
        number, phase, tenant, _ = request_id.removeprefix("cmpl-").split(".", 3)
        if number != WARM_UP:
            found[phase, tenant, int(number)] += ns
    return found


def _run(port: int, label: str, phase: str) -> None:
    """Send all requests in a phase at once, and wait for them."""
    sent = [
        (tenant, number)
        for tenant in TENANTS
        if phase in (tenant.name, BOTH)
        for number in range(tenant.requests)
    ]
    with ThreadPoolExecutor(len(sent)) as pool:
        list(pool.map(lambda one: _ask(port, f"{label}.{one[0].name}.{one[1]}", *one), sent))


def _ask(port: int, request_id: str, tenant: TenantTraffic, number: int) -> None:
    # The seed makes the prompts the same in every phase.
    rng = random.Random(f"{tenant.name} {number}")  # noqa: S311 - no secret
    body = {
        "model": "model",
        "prompt": rng.choices(TOKEN_IDS, k=tenant.prompt_tokens),
        "max_tokens": tenant.output_tokens,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=REQUEST_TIMEOUT_S)
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"a request to the server failed: {error!r}") from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise ServerError(f"expected status 200 for a request, got {answer.status}: {text[:200]!r}")


def _half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2
