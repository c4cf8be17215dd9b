"""How long exchanges took, as histograms by hour that add up: percentiles within 1 %.

A time falls into the bucket whose bounds are a fixed ratio apart, and the bucket is named by the
one time that is within 1 % of all in it. This is the mapping of DDSketch (Masson, Rim and Lee,
VLDB 2019, section 2). Its buckets are kept as rows, so that a database adds them up, and so that an
exchange can be taken out again when a late part changes it.

Invariant: a percentile by nearest rank over the buckets is within RELATIVE_ERROR of the exact one.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.exchanges import PartFacts, ReplyFacts
from vllm_cost_meter.ledger.rollups.upserts import add_to
from vllm_cost_meter.ledger.schema import rollup_arrivals, rollup_latencies

RELATIVE_ERROR = 0.01
MEASURES = ("ttft", "tpot", "e2e")
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)
_TIMES_AT_ONCE = 10_000


class Bucket(NamedTuple):
    """A row of `rollup_latencies`: times of about `about_us` in an hour."""

    hour: int
    measure: str
    about_us: int


class Counted:
    """Changes of the histograms, and of arrivals by hour."""

    def __init__(self) -> None:
        self.arrivals: dict[int, int] = defaultdict(int)
        self._buckets: dict[Bucket, tuple[int, int]] = {}
        # Times in microseconds by hour, measure and sign that are in no bucket yet: many at once
        # cost less.
        self._times: dict[tuple[int, str, int], list[int]] = defaultdict(list)

    def add(self, reply: ReplyFacts | None, parts: Sequence[PartFacts], sign: int = 1) -> None:
        """Count an exchange, or take it out with a sign of -1; one without a part is nothing."""
        if not parts:
            return
        came_in = parts[0].started_hour if len(parts) == 1 else min(p.started_hour for p in parts)
        self.arrivals[came_in] += sign
        hour = max(part.hour for part in parts) if reply is None else reply.hour
        for measure, us in zip(MEASURES, _times_of(parts), strict=True):
            if us is not None:
                self.add_time(hour, measure, us, sign)

    def add_time(self, hour: int, measure: str, us: int, sign: int = 1) -> None:
        """Count one time of an exchange that ended in an hour, or take it out."""
        times = self._times[hour, measure, sign]
        times.append(us)
        if len(times) >= _TIMES_AT_ONCE:
            self._fill_buckets()

    def add_bucket(self, bucket: Bucket, exchanges: int, sum_us: int) -> None:
        """Count times that are in a bucket already, or take them out."""
        known = self._buckets.get(bucket, (0, 0))
        self._buckets[bucket] = known[0] + exchanges, known[1] + sum_us

    def buckets(self) -> dict[Bucket, tuple[int, int]]:
        """Return the changes of each bucket: exchanges, and the sum of their times."""
        self._fill_buckets()
        return self._buckets

    def _fill_buckets(self) -> None:
        for (hour, measure, sign), times in self._times.items():
            by_about: dict[int, list[int]] = defaultdict(list)
            for us in times:
                by_about[about(us)].append(us)
            for about_us, some in by_about.items():
                bucket = Bucket(hour, measure, about_us)
                self.add_bucket(bucket, sign * len(some), sign * sum(some))
        self._times.clear()


def about(us: int) -> int:
    """Return the time, in microseconds, that stands for the bucket of a time."""
    if us < 1:
        return 0
    return _middle_of(math.ceil(math.log(us) / _LOG_GAMMA))


@cache
def _middle_of(power: int) -> int:
    """Return the time that stands for a bucket. There are some thousand for 64-bit times."""
    return round(2 * _GAMMA**power / (_GAMMA + 1))


def _times_of(parts: Sequence[PartFacts]) -> Sequence[int | None]:
    """Return an exchange's times in the order of MEASURES; None where no part knows one.

    They are its first token's, its slowest part's per token, and that to the end.
    """
    if len(parts) == 1:  # as most have
        return parts[0].ttft_us, parts[0].tpot_us, parts[0].e2e_us
    return (
        min((part.ttft_us for part in parts if part.ttft_us is not None), default=None),
        max((part.tpot_us for part in parts if part.tpot_us is not None), default=None),
        max((part.e2e_us for part in parts if part.e2e_us is not None), default=None),
    )


def write_counted(connection: Connection, counted: Counted) -> None:
    """Add changes to the histograms and arrivals."""
    buckets = [
        (*bucket, exchanges, sum_us)
        for bucket, (exchanges, sum_us) in sorted(counted.buckets().items())
        if exchanges or sum_us
    ]
    add_to(connection, rollup_latencies, buckets)
    arrivals = [(hour, count) for hour, count in sorted(counted.arrivals.items()) if count]
    add_to(connection, rollup_arrivals, arrivals)
