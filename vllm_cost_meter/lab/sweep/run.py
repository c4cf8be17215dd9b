"""Drives one deployment through rates of arrivals, and measures each in a steady window.

Without rates of the user's, a burst of requests says first about how many the deployment can serve;
the rates are parts of that, and the last ones are raised until one is more than it serves. Only
then is the largest throughput of the sweep that of full load. A deployment is taken to be steady
once requests have come for a few times as long as one of them takes; each point says whether they
had.

Invariant: a sweep that is interrupted has all the rates that were measured before.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.sweep.bench import Shape, Target, bench_command, now_s, replies_of, running
from vllm_cost_meter.lab.sweep.side_client import Sample, SideClient, busy_share
from vllm_cost_meter.lab.sweep.steady import Reply, Steady, steady

# Warm-up is so many times as long as requests took at the rate before, if not longer.
RESIDENCES = 3
# The rates to measure, as parts of the rate that the deployment seems to serve.
PARTS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.2)
# The factor that raises the last rate while all of it is served, and how often at most.
RAISE, RAISES_MAX = 1.4, 4
SAMPLE_EVERY_S = 1.0
# A guess, for the time left: until the client's Python has vLLM, and for the last replies.
CLIENT_START_S, DRAIN_S = 20.0, 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How a shape is measured. `rates` are requests per second; empty: found by a burst.

    Of each rate `warmup_s` seconds are left out and `window_s` count, `repeats` times over.
    """

    shape: Shape
    rates: tuple[float, ...] = ()
    window_s: float = 120.0
    warmup_s: float = 30.0
    repeats: int = 1
    burstiness: float = 1.0
    seed: int = 0
    burst_requests: int = 256
    parts: tuple[float, ...] = PARTS

    def as_dict(self) -> dict[str, Any]:
        """Return it as a curve's protocol has it."""
        return {**asdict(self), "shape": str(self.shape), **asdict(self.shape)}


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of one run of the client at one rate; `settled` says that it was steady.

    `other_requests` came to the server from elsewhere meanwhile; None if that is unknown.
    """

    requests_per_s: float
    repeat: int
    seed: int
    requests: int
    warmup_s: float
    steady: Steady
    settled: bool
    utilization: float | None
    other_requests: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as a curve's file has it."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "steady"}
        return {**own, **self.steady.as_dict()}


class Watcher(Protocol):
    """An observer of the sweep's progress. Seconds are estimates for the coming step."""

    def plan(self, left_s: float) -> None:
        """The sweep has so many seconds to go, about."""

    def doing(self, what: str) -> None:
        """This is being done now."""

    def tick(self) -> None:
        """Still at it."""

    def measured(self, point: Measured) -> None:
        """A rate was measured."""


class Sweep:
    """Measures one shape on one deployment."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        side: SideClient,
        folder: Path,
        environment: Mapping[str, str],
        watcher: Watcher,
    ) -> None:
        self._plan, self._target, self._side = plan, target, side
        self._folder, self._environment, self._watcher = folder, environment, watcher
        self._runs = 0
        # The time that a request was in the system at the previous rate.
        self._residence_s = 0.0
        self.served_per_s: float | None = None

    def points(self) -> Iterator[Measured]:
        """Yield what each rate gave. Raises ServerError where the client or the meter fails."""
        plan = self._plan
        rates = list(plan.rates) or self._rates_found()
        self._watcher.plan(self._left_s(rates))
        raised = 0
        while rates:
            rate = rates.pop(0)
            points = [self._measure(rate, repeat) for repeat in range(plan.repeats)]
            for point in points:
                self._watcher.measured(point)
                yield point
            is_served = not any(point.steady.saturated for point in points)
            if not rates and not plan.rates and is_served and raised < RAISES_MAX:
                raised += 1
                rates.append(_rounded(rate * RAISE))
                self._watcher.plan(self._left_s(rates))

    def _left_s(self, rates: Sequence[float]) -> float:
        """Return about how long these rates take: the rest of a backlog is served at the end."""
        span_s = self._plan.warmup_s + self._plan.window_s
        backlog = [
            max(rate / self.served_per_s - 1, 0) if self.served_per_s else 0 for rate in rates
        ]
        each_s = [CLIENT_START_S + span_s * (1 + more) + DRAIN_S for more in backlog]
        return self._plan.repeats * sum(each_s)

    def _rates_found(self) -> list[float]:
        """Return the rates that are parts of what a burst of requests was served with."""
        plan = self._plan
        self._watcher.plan(
            CLIENT_START_S + len(plan.parts) * (CLIENT_START_S + plan.warmup_s + plan.window_s)
        )
        self._watcher.doing(f"{plan.shape}: a burst, to find the rates")
        replies, _ = self._send(None, plan.burst_requests)
        replies = [reply for reply in replies if not reply.failed]
        if not replies:
            raise ServerError("expected replies to a burst of requests, none came")
        begin, end = min(r.sent_s for r in replies), max(r.ended_s for r in replies)
        # Neither the first prompts nor the last stragglers.
        low, high = begin + 0.2 * (end - begin), begin + 0.8 * (end - begin)
        middle = sum(reply.tokens_between(low, high) for reply in replies) / (high - low)
        whole = sum(reply.output_tokens for reply in replies) / (end - begin)
        self.served_per_s = max(middle, whole) / plan.shape.output_tokens
        return [_rounded(part * self.served_per_s) for part in plan.parts]

    def _measure(self, rate: float, repeat: int) -> Measured:
        plan = self._plan
        warmup_s = max(plan.warmup_s, RESIDENCES * self._residence_s)
        span_s = warmup_s + plan.window_s
        requests = max(ceil(rate * span_s), 2)
        again = f", repeat {repeat + 1} of {plan.repeats}" if plan.repeats > 1 else ""
        self._watcher.doing(f"{plan.shape} at {rate:g} requests/s{again}")
        seed = plan.seed + self._runs
        replies, samples = self._send(rate, requests)
        begin, end = min(r.sent_s for r in replies), max(r.sent_s for r in replies)
        low = begin + warmup_s
        high = min(low + plan.window_s, end)
        if all(reply.failed for reply in replies) or not low < high:
            raise ServerError(
                f"expected replies over {span_s:g} s at {rate:g} requests/s,"
                f" got {sum(not reply.failed for reply in replies)} of {requests}"
            )
        found = steady(replies, low, high)
        # Little's law.
        took_s = found.concurrency / found.arrivals_per_s if found.sent else 0.0
        if not found.saturated:
            self._residence_s = took_s
        return Measured(
            requests_per_s=rate,
            repeat=repeat,
            seed=seed,
            requests=requests,
            warmup_s=warmup_s,
            steady=found,
            settled=not found.saturated and warmup_s >= RESIDENCES * took_s,
            utilization=busy_share(samples, low, high),
            other_requests=_others(samples, replies),
        )

    def _send(self, rate: float | None, requests: int) -> tuple[list[Reply], list[Sample]]:
        """Run the client; return what it saw, and what the engines did meanwhile."""
        name = f"{self._plan.shape}-{self._runs}".replace(":", "x")
        result = self._folder / f"bench-{name}.json"
        arguments = bench_command(
            self._target,
            self._plan.shape,
            requests=requests,
            requests_per_s=rate,
            burstiness=self._plan.burstiness,
            seed=self._plan.seed + self._runs,
            result=result,
        )
        self._runs += 1
        samples = []
        with running(arguments, self._environment, result.with_suffix(".log")) as bench:
            while bench.is_running():
                samples.append(self._side.sample(now_s()))
                self._watcher.tick()
                time.sleep(SAMPLE_EVERY_S)
        # The gauges are of the latest poll.
        time.sleep(SAMPLE_EVERY_S)
        samples.append(self._side.sample(now_s()))
        return replies_of(result), samples


def _others(samples: Sequence[Sample], replies: Sequence[Reply]) -> int | None:
    """Return the number of bills for other clients; each request of ours has one at most."""
    if len(samples) < 2:
        return None
    return max(round(samples[-1].bills - samples[0].bills) - len(replies), 0)


def _rounded(rate: float) -> float:
    """Return a rate as one would write it."""
    return float(f"{rate:.2g}")
