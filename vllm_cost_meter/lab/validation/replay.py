"""Replay a recorded step log through every attribution method, and compare the methods.

A log has no truth, so this shows how much the methods differ. Each method's StepMeter sees the
steps as the engine's meter did: a request is opened and placed at its first step, and placed again
when it resumes after a preemption.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_cost_meter.attribution import METHODS, StepMeter
from vllm_cost_meter.engine.step_log import (
    LoggedPart,
    LoggedStep,
    StepLogHeader,
    files_of,
    read_header,
)
from vllm_cost_meter.engine.step_log import read_steps as read_file
from vllm_cost_meter.errors import StepLogError
from vllm_cost_meter.lab.validation.percentiles import Percentiles

# The answer lists so many requests, those with the largest differences.
LISTED_MAX = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of one method from another, as fractions.

    `request_difference` is |GPU time / the other method's GPU time - 1| over requests.
    `moved_share` is half the sum of |GPU time - the other's| over requests, as a fraction of all
    GPU time.
    """

    request_difference: Percentiles
    moved_share: float


@dataclass(frozen=True, slots=True)
class Replay:
    """The contents of a log, and each method's charges for it in GPU-ns.

    `charged_ns` has the total charge by method. `differences[a][b]` is the difference of a from b.
    `requests` has, by id and method, the charges with the largest differences.
    """

    header: StepLogHeader
    steps: int
    requests_seen: int
    gpu_time_ns: int
    charged_ns: dict[str, int]
    differences: dict[str, dict[str, Difference]]
    requests: dict[str, dict[str, int]]


def replay(path: Path, on_step: Callable[[], None] = lambda: None) -> Replay:
    """Drive every method of the meter over a log, FILE.1 first. Raises StepLogError."""
    steps, gpu_time_ns, by_method = charges_of_log(path, on_step)
    return Replay(
        header=read_header(path),
        steps=steps,
        requests_seen=len(by_method[METHODS[0]]),
        gpu_time_ns=gpu_time_ns,
        charged_ns={method: sum(totals.values()) for method, totals in by_method.items()},
        differences={
            method: {
                other: _difference(totals, by_method[other], gpu_time_ns)
                for other in METHODS
                if other != method
            }
            for method, totals in by_method.items()
        },
        requests=_most_different(by_method),
    )


def charges_of_log(
    path: Path, on_step: Callable[[], None] = lambda: None
) -> tuple[int, int, dict[str, dict[str, int]]]:
    """Return a log's number of steps, its GPU-ns, and each request's GPU-ns by method and id.

    Raises StepLogError for a log without steps.
    """
    drivers = {method: _Driver(method) for method in METHODS}
    steps = gpu_time_ns = 0
    for step in read_log(path):
        steps += 1
        gpu_time_ns += step.gpu_time_ns
        for driver in drivers.values():
            driver.settle(step)
        on_step()
    if not steps:
        raise StepLogError(
            f"step log {path}: expected at least one step, got none; let the server work, then"
            " read it"
        )
    return steps, gpu_time_ns, {method: driver.totals() for method, driver in drivers.items()}


def read_log(path: Path) -> Iterator[LoggedStep]:
    """Yield the steps of a log's files, the older file first."""
    for file in files_of(path):
        yield from read_file(file)


class _Driver:
    """One method's meter, and the position of each request."""

    def __init__(self, method: str) -> None:
        self._meter = StepMeter(method)
        # The prompt tokens of each request, and the position at which its last step began.
        self._known: dict[str, tuple[int, int]] = {}
        self._closed_ns: dict[str, int] = {}

    def settle(self, step: LoggedStep) -> None:
        for part in step.parts:
            self._place(part)
        encoded = {part.request_id: part.encoder_tokens for part in step.parts}
        tokens = {part.request_id: part.tokens for part in step.parts}
        begun = self._meter.begin(tokens, 0, None, encoded)
        self._meter.settle(begun, step.gpu_time_ns)

    def totals(self) -> dict[str, int]:
        """Close all requests; return GPU-ns by request id."""
        for request_id in list(self._known):
            self._close(request_id)
        return self._closed_ns

    def _place(self, part: LoggedPart) -> None:
        known = self._known.get(part.request_id)
        if known is not None and known[0] != part.prompt_tokens:
            # Another request uses the same id.
            self._close(part.request_id)
            known = None
        if known is None:
            self._meter.open(part.request_id, part.prompt_tokens, part.has_lora, part.is_guided)
            self._meter.position(part.request_id, part.position, False)
        elif part.position <= known[1]:
            # Rejected drafts take back some tokens of a step; only a preemption takes back all.
            self._meter.position(part.request_id, part.position, True)
        self._known[part.request_id] = (part.prompt_tokens, part.position)

    def _close(self, request_id: str) -> None:
        del self._known[request_id]
        prefill_ns, decode_ns, *_ = self._meter.close(request_id, 0)
        before_ns = self._closed_ns.get(request_id, 0)
        self._closed_ns[request_id] = before_ns + prefill_ns + decode_ns


def _difference(one: dict[str, int], other: dict[str, int], gpu_time_ns: int) -> Difference:
    moved_ns = sum(abs(one[request] - ns) for request, ns in other.items()) / 2
    relative = (abs(one[request] / ns - 1) for request, ns in other.items() if ns)
    return Difference(Percentiles.of(relative), moved_ns / max(1, gpu_time_ns))


def _most_different(by_method: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return, by id and method, the GPU-ns with the widest range, the widest first."""

    def range_ns(request_id: str) -> int:
        values = [totals[request_id] for totals in by_method.values()]
        return max(values) - min(values)

    requests = sorted(by_method[METHODS[0]], key=range_ns, reverse=True)[:LISTED_MAX]
    return {
        request_id: {method: totals[request_id] for method, totals in by_method.items()}
        for request_id in requests
    }
