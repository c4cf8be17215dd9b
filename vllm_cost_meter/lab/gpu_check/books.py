"""What the run's ledger says of itself: audit, doctor, cost model; and whether replies told it.

Some requests are asked for, as complete replies and as streams, and what each was told of its cost
is compared with its row in the ledger. On a GPU vLLM schedules the next step before the last one
has ended, so this way of a bill differs from that on a CPU.

Invariant: nothing of the ledger is changed.
"""

import json
import random
import re
import subprocess
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_cost_meter.activation import NAME as NAMED
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.gpu_check.mixed import random_prompt
from vllm_cost_meter.lab.gpu_check.model import NAME
from vllm_cost_meter.lab.gpu_check.served import Checked, own_environment
from vllm_cost_meter.lab.server import command_path

REPLIES = 12
REPLY_TOKENS = 20
REPLY_TIMEOUT_S = 120
DOCTOR_TIMEOUT_S = 120
# The comment in front of a stream's end, which has decimals as text.
COMMENT = re.compile(r": cost-meter cost_usd=(\S+) gpu_seconds=(\S+)")
# Figures of an audited run that a page shows, all in GPU-ns or mJ.
DIFFERENCES = (
    *("difference_ns", "billed_difference_ns", "ledger_difference_ns", "sums_difference_ns"),
    *("hours_difference_ns", "in_flight_difference_ns", "energy_difference_mj"),
)


class ToldCost(NamedTuple):
    """What a reply said: GPU-seconds and USD as text, None where it said nothing."""

    gpu_seconds: str | None
    cost_usd: str | None

    def agrees(self, row: Mapping[str, Any]) -> bool:
        """Return whether a request's row has the same, to the nanosecond and the nano-dollar."""
        if self.gpu_seconds is None or self.cost_usd is None:
            return False
        ns, nanousd = (round(float(text) * 1e9) for text in self)  # type: ignore[arg-type]
        return bool(ns == row["gpu_time_ns"] and nanousd == row["cost_nanousd"])


def measure_books(checked: Checked, seed: int) -> dict[str, Any]:
    """Return what replies, audit, doctor and cost model say; ready for JSON. Raises ServerError."""
    replies = _replies(checked, seed)
    models = checked.judged.ask("models")["models"]
    return {
        "replies": replies,
        "audit": audited(checked),
        "doctor": _doctor(checked),
        "model": models[0] if models else None,
        "totals": {
            name: value
            for name, value in checked.judged.ask("summary").items()
            if name.endswith(("_ns", "_mj", "tokens", "_share")) or name == "requests"
        },
    }


def audited(checked: Checked) -> dict[str, Any]:
    """Return whether the books of a server balance, and by how much if not. Raises ServerError."""
    audit = checked.judged.ask("audit?full=true")
    return {
        "balanced": audit["balanced"],
        "reason": audit["reason"],
        "runs": [
            {"wall_ns": run["wall_ns"], **{name: run[name] for name in DIFFERENCES}}
            for run in audit["runs"]
        ],
    }


def _replies(checked: Checked, seed: int) -> dict[str, Any]:
    rng = random.Random(f"replies {seed}")  # noqa: S311 - no secret
    told = {}
    for number in range(REPLIES):
        name = f"gpu-check-reply-{number}"
        told[name] = _ask(checked, name, rng, is_stream=number % 2 == 1)
    different = []
    for name, cost in told.items():
        checked.judged.part_of(name)  # waits for the bill
        row = checked.judged.ask(f"requests/{name}")
        if not cost.agrees(row):
            ledger = {key: row[key] for key in ("gpu_time_ns", "cost_nanousd", "state")}
            different.append({"request": name, "told": cost._asdict(), "ledger": ledger})
    return {"asked": len(told), "different": different}


def _ask(checked: Checked, name: str, rng: random.Random, *, is_stream: bool) -> ToldCost:
    body = {
        "model": NAME,
        "prompt": random_prompt(rng, 50),
        "max_tokens": REPLY_TOKENS,
        "ignore_eos": True,
        **({"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}),
    }
    headers = {
        "content-type": "application/json",
        "x-request-id": name,
        "x-cost-meter-comment": "true",
    }
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{checked.server.url}/v1/completions", json.dumps(body).encode(), headers
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=REPLY_TIMEOUT_S) as reply:
            text = reply.read().decode()
            sent = reply.headers
    except OSError as error:
        raise ServerError(f"{checked.server.url} did not answer: {error}") from None
    if not is_stream:
        return ToldCost(sent.get("x-cost-meter-gpu-seconds"), sent.get("x-cost-meter-cost-usd"))
    found = COMMENT.search(text)
    return ToldCost(found[2], found[1]) if found else ToldCost(None, None)


def _doctor(checked: Checked) -> dict[str, Any]:
    """Run the doctor as a user would, on this server and its ledger."""
    command = [
        *(command_path("vllm-cost-meter"), "doctor", "--json"),
        *("--url", checked.server.side_url, "--ledger", f"sqlite:///{checked.ledger}"),
    ]
    # The check's servers name the plugin by an argument, which the doctor does not see.
    environment = own_environment() | {"VLLM_PLUGINS": NAMED}
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            command, env=environment, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_S
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"expected findings of the doctor, got {error!r}") from None
    return answer
