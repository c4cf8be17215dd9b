"""A step as a sum of kernels: its time by a curve.

This is the twin of `csrc/curve.pxd`. Both agree bit for bit, so a change to one must be made in the
other.

The kernels of a step run one after another, and each takes as long as the slower of its arithmetic
and its memory traffic. So a step is no maximum of two sums, but a sum over kernels. Most of them
(products, experts, norms, exchanges between GPUs) depend on the number of tokens alone, in a way
that bends both up (a product is flat until its arithmetic is the limit) and down (a second token
mostly chooses experts that were read before). Attention depends on each request: the arithmetic of
prefills goes on while the contexts of decodes are read. A step with only the requests S takes

    v(S) = f + p, if S has a prefill, + b for each of S + h(tokens of S) + attention(S)
    attention(S) = max(sum over S of (q * pairs + r * prefill read + u * decode read),
                       sum over S of k * read),           v of nobody = 0

`read` is a request's context, that of a prefill or of a decode, and `pairs` are the pairs of query
and key of a prefill, which is causal. (A prefill computes with its context also where a latent
cache must be unpacked.) Where layers see only a window of tokens, each counts what
its layers see. A server that runs decodes and prefills one after another has u = k. h is a broken
line with corners at `KNOTS`, and h(0) = 0. Where vLLM captured GPU graphs, a batch is computed as
the next captured size, so the tokens of h are padded.

What each request adds to h is in `growths_py.py`. Invariant: h is continuous, and h(0) = 0.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import (
    DECODE_COMPUTE,
    EXPERTS,
    KNOTS,
    PAIRS,
    PREFILL_COMPUTE,
    RAMPS,
    READ,
    SLOPES,
    Coefficients,
    Layers,
    ServedModel,
    TokenCurve,
)


@dataclass(slots=True, frozen=True)
class CurveWork:
    """What one or several requests of a step bring to the terms of a curve."""

    tokens: int = 0
    sequences: int = 0
    prefills: int = 0
    pairs: float = 0.0
    read: float = 0.0
    prefill_read: float = 0.0

    @classmethod
    def of(cls, tokens: int, context: int, is_prefill: bool, layers: Layers) -> "CurveWork":
        """Return the work of one request; `context` is its length at the end of the step."""
        seen = min(context, layers.window + tokens)
        read = float(layers.whole) * context + float(layers.windowed) * seen
        if not is_prefill:
            return cls(tokens, 1, 0, 0.0, read)
        number = float(tokens)
        # The last token sees `context` keys, the one before it one fewer, and so on.
        fewer = 0.5 * number * (number - 1.0)
        pairs = layers.whole * (number * context - fewer) + layers.windowed * (
            number * seen - fewer
        )
        return cls(tokens, 1, 1, pairs, 0.0, read)

    def plus(self, other: "CurveWork") -> "CurveWork":
        """Return this work and another."""
        return CurveWork(
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.prefills + other.prefills,
            self.pairs + other.pairs,
            self.read + other.read,
            self.prefill_read + other.prefill_read,
        )


def all_of(works: Sequence[CurveWork]) -> CurveWork:
    """Return the work of several requests together, added up in their order."""
    total = CurveWork()
    for work in works:
        total = total.plus(work)
    return total


def arithmetic_ns(curve: Sequence[float], work: CurveWork) -> float:
    """Return the time of attention's arithmetic."""
    return (
        curve[PAIRS] * work.pairs
        + curve[PREFILL_COMPUTE] * work.prefill_read
        + curve[DECODE_COMPUTE] * work.read
    )


def reading_ns(curve: Sequence[float], work: CurveWork) -> float:
    """Return the time in which attention reads contexts."""
    return curve[READ] * (work.read + work.prefill_read)


def height(curve: TokenCurve, tokens: float) -> float:
    """Return h at a number of tokens."""
    found = 0.0
    for place, knot in enumerate(KNOTS):
        if tokens <= knot:
            break
        end = KNOTS[place + 1] if place + 1 < len(KNOTS) else tokens
        found += curve[SLOPES + place] * (min(tokens, end) - knot)
    return found


def curve_of(coefficients: Coefficients, heights: Sequence[float]) -> TokenCurve:
    """Return the curve of a fit's coefficients. `heights` are the experts that corners choose."""
    slopes = []
    for place, knot in enumerate(KNOTS):
        ramp = sum(1 for begin in RAMPS if begin <= knot) - 1
        slope = coefficients[SLOPES + ramp]
        if place + 1 < len(KNOTS):
            chosen = heights[place + 1] - heights[place]
            slope += coefficients[EXPERTS] * chosen / (KNOTS[place + 1] - knot)
        slopes.append(slope)
    return (*coefficients[:SLOPES], *slopes)


def smoothed(curve: TokenCurve, served: ServedModel) -> TokenCurve:
    """Return the curve of the mean over the batch sizes around each corner, which are padded."""
    if not served.captured:
        return curve
    heights = [
        0.5 * height(curve, float(served.padded(knot)))
        + 0.5 * height(curve, float(served.padded(knot + 1)))
        for knot in KNOTS
    ]
    heights[0] = 0.0
    slopes = [
        (heights[place + 1] - heights[place]) / (KNOTS[place + 1] - KNOTS[place])
        for place in range(len(KNOTS) - 1)
    ]
    return (*curve[:SLOPES], *slopes, curve[-1])


def corner_below(tokens: float) -> int:
    """Return the last corner that is not beyond a number of tokens >= 0."""
    return bisect_right(KNOTS, tokens) - 1
