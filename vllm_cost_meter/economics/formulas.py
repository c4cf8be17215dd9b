"""Cost per token and per request at one operating point, from a price and rates.

Invariant: a result is None, never 0, if the rate that it needs was not given.
"""

from dataclasses import dataclass
from typing import ClassVar

from vllm_cost_meter.economics.numbers import (
    HOURS_PER_MONTH,
    S_PER_HOUR,
    not_negative,
    positive,
    share,
    usd_per_m,
)
from vllm_cost_meter.units.text import quoted


def usd_per_hour_of(
    usd_per_hour: float | None, usd_per_gpu_hour: float | None, gpus: int | None
) -> float:
    """Return the hourly price of the whole deployment, from its own price or a price per GPU.

    Raises ValueError unless exactly one of the two prices is given: to multiply a deployment's
    price by its GPUs would count the GPUs twice.
    """
    if (usd_per_hour is None) == (usd_per_gpu_hour is None):
        got = "neither" if usd_per_hour is None else "both"
        raise ValueError(f"usd_per_hour: expected either it or usd_per_gpu_hour, got {got}")
    if usd_per_hour is not None:
        if gpus is not None:
            raise ValueError(
                "gpus: expected with usd_per_gpu_hour only, as usd_per_hour is for the whole"
                f" deployment, got {quoted(gpus)}"
            )
        return positive("usd_per_hour", usd_per_hour)
    if gpus is None:
        raise ValueError("gpus: expected how many GPUs usd_per_gpu_hour is for, got none")
    return positive("usd_per_gpu_hour", usd_per_gpu_hour or 0) * positive("gpus", gpus)


@dataclass(frozen=True, slots=True)
class EffectiveCost:
    """The cost of tokens and requests at one throughput."""

    FORMULA: ClassVar = (
        "usd_per_m_output_tokens = usd_per_hour x 10^6 / (3600 x output_tokens_per_s); of total"
        " tokens likewise; usd_per_1k_requests = usd_per_hour x 1000 / (3600 x requests_per_s);"
        " usd_per_month = usd_per_hour x 730"
    )

    usd_per_hour: float
    """USD per hour: of the whole deployment."""
    usd_per_m_output_tokens: float | None
    """USD: the cost of a million output tokens."""
    usd_per_m_total_tokens: float | None
    """USD: the cost of a million tokens, input and output."""
    usd_per_1k_requests: float | None
    """USD: the cost of a thousand requests."""
    usd_per_month: float
    """USD: the cost of a month."""


def c_eff(
    *,
    usd_per_hour: float | None = None,
    usd_per_gpu_hour: float | None = None,
    gpus: int | None = None,
    output_tokens_per_s: float | None = None,
    total_tokens_per_s: float | None = None,
    requests_per_s: float | None = None,
) -> EffectiveCost:
    """Effective cost (C_eff) per token and request at a given throughput.

    The price is either for the whole deployment, or for one GPU together with `gpus`. Rates are for
    the whole deployment; a rate of None leaves the figures that need it undefined. Raises
    ValueError for an argument out of range.
    """
    price = usd_per_hour_of(usd_per_hour, usd_per_gpu_hour, gpus)

    def of(name: str, tokens_per_s: float | None) -> float | None:
        return None if tokens_per_s is None else usd_per_m(price, positive(name, tokens_per_s))

    per_1k = None
    if requests_per_s is not None:
        per_1k = price * 1000 / (S_PER_HOUR * positive("requests_per_s", requests_per_s))
    return EffectiveCost(
        usd_per_hour=price,
        usd_per_m_output_tokens=of("output_tokens_per_s", output_tokens_per_s),
        usd_per_m_total_tokens=of("total_tokens_per_s", total_tokens_per_s),
        usd_per_1k_requests=per_1k,
        usd_per_month=price * HOURS_PER_MONTH,
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """The cost of output tokens while arrivals, and not the GPUs, set the pace."""

    FORMULA: ClassVar = (
        "below saturation output_tokens_per_s = requests_per_s x output_tokens_per_request;"
        " usd_per_m_output_tokens = usd_per_hour x 10^6 / (3600 x output_tokens_per_s)"
    )

    output_tokens_per_s: float
    """Output tokens per second: of the whole deployment."""
    usd_per_m_output_tokens: float
    """USD: the cost of a million output tokens."""
    usd_per_request: float
    """USD: the cost of one request."""


def arrival(
    *, usd_per_hour: float, requests_per_s: float, output_tokens_per_request: float
) -> Arrival:
    """Cost at low load, where all arrivals are served and the GPUs idle otherwise.

    Raises ValueError for an argument that is not a number above 0.
    """
    price = positive("usd_per_hour", usd_per_hour)
    rate = positive("requests_per_s", requests_per_s)
    tokens_per_s = rate * positive("output_tokens_per_request", output_tokens_per_request)
    return Arrival(tokens_per_s, usd_per_m(price, tokens_per_s), price / (S_PER_HOUR * rate))


@dataclass(frozen=True, slots=True)
class Blended:
    """An API's price per million tokens in a mix of input and output."""

    FORMULA: ClassVar = (
        "usd_per_m_blended = (input_usd_per_m x I + output_usd_per_m x O) / (I + O);"
        " usd_per_month = usd_per_m_blended x m_tokens_per_day x days"
    )

    usd_per_m_blended: float
    """USD: the cost of a million tokens in this ratio."""
    usd_per_month: float | None
    """USD: the cost of a month."""


def blended(
    *,
    input_usd_per_m: float,
    output_usd_per_m: float,
    ratio: str,
    m_tokens_per_day: float | None = None,
    days: float = 30,
) -> Blended:
    """Blended price of input and output tokens in a ratio such as "3:1".

    Given `m_tokens_per_day` (millions, input and output together), the answer has the cost of that
    many `days` too. Compare a blended price with a cost per total tokens, never with a cost per
    output tokens. Raises ValueError for an argument out of range.
    """
    inputs, outputs = ratio_of(ratio)
    prices = (
        not_negative("input_usd_per_m", input_usd_per_m),
        not_negative("output_usd_per_m", output_usd_per_m),
    )
    mixed = (prices[0] * inputs + prices[1] * outputs) / (inputs + outputs)
    month = None
    if m_tokens_per_day is not None:
        month = mixed * positive("m_tokens_per_day", m_tokens_per_day) * positive("days", days)
    return Blended(mixed, month)


def ratio_of(text: str) -> tuple[float, float]:
    """Return the two sides of a ratio such as "3:1". Raises ValueError for any other text."""
    left, colon, right = text.partition(":")
    try:
        found = not_negative("", float(left)), not_negative("", float(right))
    except ValueError:
        found = (0.0, 0.0)
    if not colon or not sum(found):
        raise ValueError(f"ratio: expected INPUT:OUTPUT, such as 3:1, got {quoted(text)}")
    return found


@dataclass(frozen=True, slots=True)
class RequestCost:
    """The cost of one served request, failed attempts included."""

    FORMULA: ClassVar = (
        "usd_per_attempt = usd_per_hour / (3600 x requests_per_s); attempts_per_request ="
        " (1 - p^(n+1)) / (1 - p) of failure_share p and retries_max n; served_share = 1 - p^(n+1);"
        " usd_per_served_request = usd_per_attempt x attempts_per_request / served_share"
    )

    usd_per_attempt: float
    """USD: the cost of one attempt."""
    attempts_per_request: float
    """Attempts that one request takes on average."""
    served_share: float
    """0 to 1: requests that succeed in the end."""
    usd_per_served_request: float
    """USD: the cost of one request that succeeds."""
    usd_added_by_failures: float
    """USD: what failures add to it."""


def request(
    *,
    usd_per_hour: float,
    requests_per_s: float,
    failure_share: float = 0,
    retries_max: int = 0,
) -> RequestCost:
    """Cost of a served request, and the part that failures and retries add.

    `requests_per_s` counts attempts, as the server sees them. Attempts fail independently with the
    same chance. A failed attempt costs as much as a served one and is sent again at most
    `retries_max` times. Raises ValueError for an argument out of range.
    """
    attempt = positive("usd_per_hour", usd_per_hour) / (
        S_PER_HOUR * positive("requests_per_s", requests_per_s)
    )
    failed = share("failure_share", failure_share, may_be_0=True)
    if failed == 1:
        raise ValueError("failure_share: expected less than 1, got 1: nothing is ever served")
    if isinstance(retries_max, bool) or not 0 <= retries_max <= 1000 or retries_max % 1:
        raise ValueError(
            f"retries_max: expected a whole number, 0 to 1000, got {quoted(retries_max)}"
        )
    served = 1 - failed ** (retries_max + 1)
    attempts = served / (1 - failed)
    return RequestCost(
        usd_per_attempt=attempt,
        attempts_per_request=attempts,
        served_share=served,
        usd_per_served_request=attempt * attempts / served,
        usd_added_by_failures=attempt * attempts / served - attempt,
    )
