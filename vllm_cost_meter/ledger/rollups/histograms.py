"""How long exchanges took, as histograms by hour that add up: percentiles within 1 %.

A time falls into the bucket whose bounds are a fixed ratio apart, and the bucket is named by the
one time that is within 1 % of all in it. This is the mapping of DDSketch (Masson, Rim and Lee,
VLDB 2019, section 2). Its buckets are kept as rows, so that a database adds them up, and so that an
exchange can be taken out again when a late part changes it.

Invariant: a percentile by nearest rank over the buckets is within RELATIVE_ERROR of the exact one.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.exchanges import PartFacts, ReplyFacts
from vllm_cost_meter.ledger.rollups.upserts import add_to
from vllm_cost_meter.ledger.schema import rollup_arrivals, rollup_latencies

RELATIVE_ERROR = 0.01
MEASURES = ("ttft", "tpot", "e2e")
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)


class Bucket(NamedTuple):
    """A row of `rollup_latencies`: times of about `about_us` in an hour."""

    hour: int
    measure: str
    about_us: int


class Counted(NamedTuple):
    """Changes of the histograms (exchanges and sum of us), and of arrivals by hour."""

    buckets: dict[Bucket, list[int]]
    arrivals: dict[int, int]

    @classmethod
    def nothing(cls) -> "Counted":
        return cls(defaultdict(lambda: [0, 0]), defaultdict(int))

    def add(self, reply: ReplyFacts | None, parts: Sequence[PartFacts], sign: int = 1) -> None:
        """Count an exchange, or take it out with a sign of -1; one without a part is nothing."""
        if not parts:
            return
        self.arrivals[min(part.started_hour for part in parts)] += sign
        hour = max(part.hour for part in parts) if reply is None else reply.hour
        for measure, us in _times_of(parts):
            known = self.buckets[Bucket(hour, measure, about(us))]
            known[0] += sign
            known[1] += sign * us


def about(us: int) -> int:
    """Return the time, in microseconds, that stands for the bucket of a time."""
    if us < 1:
        return 0
    power = math.ceil(math.log(us) / _LOG_GAMMA)
    return round(2 * _GAMMA**power / (_GAMMA + 1))


def us_of(ms: float | None) -> int | None:
    """Return a time in ms as whole microseconds."""
    return None if ms is None else max(round(ms * 1000), 0)


def _times_of(parts: Sequence[PartFacts]) -> Iterator[tuple[str, int]]:
    """Yield an exchange's times: its first token's, its slowest part's per token and to the end."""
    first = [part.ttft_us for part in parts if part.ttft_us is not None]
    each = [part.tpot_us for part in parts if part.tpot_us is not None]
    last = [part.e2e_us for part in parts if part.e2e_us is not None]
    if first:
        yield "ttft", min(first)
    if each:
        yield "tpot", max(each)
    if last:
        yield "e2e", max(last)


def write_counted(connection: Connection, counted: Counted) -> None:
    """Add changes to the histograms and arrivals."""
    buckets = [
        (*bucket, exchanges, sum_us)
        for bucket, (exchanges, sum_us) in sorted(counted.buckets.items())
        if exchanges or sum_us
    ]
    add_to(connection, rollup_latencies, buckets)
    arrivals = [(hour, count) for hour, count in sorted(counted.arrivals.items()) if count]
    add_to(connection, rollup_arrivals, arrivals)
