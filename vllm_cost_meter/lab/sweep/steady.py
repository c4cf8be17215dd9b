"""Figures of a steady window, out of what a client saw of each of its requests.

What came in before the window is warm-up. Latencies are of the requests that were sent in the
window, whenever they ended; tokens are those that arrived in it, whomever they belong to: a chunk
of a reply counts when it came, with its part of the reply's tokens, and a prompt with the first of
them. So neither end of the window makes a throughput too large or too small. Pure arithmetic:
standard library only.

Invariant: the tokens of windows side by side add up to those of the whole.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import ceil, sqrt
from typing import Any

# More requests left in the system than came, by this part of the arrivals: not served at this rate.
PILED_UP_SHARE = 0.05
# ... and by so many standard deviations of how many a steady system happens to hold.
DEVIATIONS = 3.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A request as its client saw it. Instants are of one monotonic clock, in seconds.

    `chunks_s` are the instants at which parts of the reply came, the first token among them; a
    request that failed has none.
    """

    sent_s: float
    ended_s: float
    input_tokens: int
    output_tokens: int
    chunks_s: Sequence[float]

    @classmethod
    def of(
        cls, sent_s: float, tokens: tuple[int, int], ttft_s: float, gaps_s: Sequence[float]
    ) -> "Reply":
        """Return a reply of its prompt's and its own tokens, time to the first, and gaps."""
        chunks = list(accumulate([sent_s + ttft_s, *gaps_s]))
        return cls(sent_s, chunks[-1], *tokens, chunks)

    @property
    def failed(self) -> bool:
        return not self.chunks_s

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for a reply of one."""
        if self.output_tokens < 2:
            return None
        return (self.ended_s - self.chunks_s[0]) / (self.output_tokens - 1)

    def tokens_between(self, from_s: float, to_s: float) -> float:
        """Return how many of its tokens came in [from_s, to_s)."""
        if self.failed:
            return 0.0
        came = bisect_left(self.chunks_s, to_s) - bisect_left(self.chunks_s, from_s)
        return self.output_tokens * came / len(self.chunks_s)


@dataclass(frozen=True, slots=True)
class Steady:
    """Figures of a window of `window_s` seconds; None where nothing can be divided.

    `sent` requests came in it, `failed` of them in vain, and `ended` ended in it. `concurrency` is
    the mean number in the system, `piled_up` how many more there were at its end than at its
    beginning; `saturated` says that this was too many to be chance: the rate is not served.
    """

    window_s: float
    sent: int
    failed: int
    ended: int
    arrivals_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    concurrency: float
    piled_up: int
    saturated: bool
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_ms: float | None
    tpot_p99_ms: float | None
    e2e_p99_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as a curve's file has it."""
        return asdict(self)


def steady(replies: Sequence[Reply], from_s: float, to_s: float) -> Steady:
    """Return the figures of the window [from_s, to_s). Raises ValueError for an empty one."""
    window_s = to_s - from_s
    if not window_s > 0:
        raise ValueError(f"window: expected one that ends after it begins, got {window_s:.3f} s")
    sent = [reply for reply in replies if from_s <= reply.sent_s < to_s]
    good = [reply for reply in sent if not reply.failed]
    begun = [reply for reply in replies if not reply.failed and from_s <= reply.chunks_s[0] < to_s]
    present_s = sum(
        max(0.0, min(reply.ended_s, to_s) - max(reply.sent_s, from_s)) for reply in replies
    )
    before, after = _present(replies, from_s), _present(replies, to_s)
    ttfts = [reply.ttft_s * 1e3 for reply in good]
    tpots = [tpot * 1e3 for reply in good if (tpot := reply.tpot_s) is not None]
    return Steady(
        window_s=window_s,
        sent=len(sent),
        failed=len(sent) - len(good),
        ended=sum(not r.failed and from_s <= r.ended_s < to_s for r in replies),
        arrivals_per_s=len(sent) / window_s,
        input_tokens_per_s=sum(reply.input_tokens for reply in begun) / window_s,
        output_tokens_per_s=sum(r.tokens_between(from_s, to_s) for r in replies) / window_s,
        concurrency=present_s / window_s,
        piled_up=after - before,
        saturated=is_too_many(after - before, before, len(sent)),
        ttft_p50_ms=nearest_rank(ttfts, 50),
        ttft_p99_ms=nearest_rank(ttfts, 99),
        tpot_ms=sum(tpots) / len(tpots) if tpots else None,
        tpot_p99_ms=nearest_rank(tpots, 99),
        e2e_p99_ms=nearest_rank([(r.ended_s - r.sent_s) * 1e3 for r in good], 99),
    )


def is_too_many(piled_up: int, before: int, arrived: int) -> bool:
    """Return whether requests piled up by more than a steady system would by chance.

    A steady system's number is taken to vary as a Poisson count does.
    """
    return piled_up > PILED_UP_SHARE * arrived + DEVIATIONS * sqrt(before + 1)


def nearest_rank(values: Sequence[float], percent: int) -> float | None:
    """Return the smallest value that so many percent do not exceed; None of no values."""
    if not values:
        return None
    return sorted(values)[max(ceil(percent * len(values) / 100), 1) - 1]


def _present(replies: Sequence[Reply], at_s: float) -> int:
    return sum(reply.sent_s <= at_s < reply.ended_s for reply in replies)
