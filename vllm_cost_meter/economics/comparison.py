"""The cost of the same requests at an API.

Each request is priced at its own time and size, because prices for long contexts and times of day
hold per request: summed tokens cannot be priced. A cost per token is compared only with a cost for
the same kind of tokens: output with output, all with all. An API's price promises no latency, but
the cost measured here came with one.

Invariant: the mix is the same for every offer, so the totals compare.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal, NamedTuple

from vllm_cost_meter.units.text import quoted

TOKENS_PER_M = 1_000_000
# `compare --json` shows this text. The price of a request depends on its time and size.
FORMULA = (
    "usd of an offer = sum over the requests of its price of (time, prompt_tokens, cached_tokens,"
    " output_tokens); usd here = wall time x price, idle included; times = usd / usd here;"
    " usd_per_m_output_tokens = usd x 10^6 / output_tokens; usd_per_m_total_tokens = usd x 10^6 /"
    " (prompt_tokens + output_tokens); what_if: usd = price of a request of tokens_per_request in"
    " the ratio / tokens_per_request x tokens_per_month; self_hosted_usd_per_month = usd here /"
    " observed_seconds x 3600 x 730"
)
_VOLUME = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([kMBT]?)\Z", re.ASCII)
_TIMES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
Cheaper = Literal["self-hosted", "api", "equal"]


class Sent(NamedTuple):
    """A request that ended: its time and its tokens. `prompt_tokens` include the cached ones."""

    at: datetime
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Offer:
    """An API's price for a model. `usd(request)` is the price of one request in USD.

    `source` says where the price comes from. `as_of` is its date, None if nobody declared one.
    """

    provider: str
    model: str
    label: str
    source: str
    as_of: str | None
    usd: Callable[[Sent], Decimal]


@dataclass(frozen=True, slots=True)
class Mix:
    """All requests that were sent: their number and the sums of their tokens."""

    requests: int
    """How many."""
    prompt_tokens: int
    """Tokens: of all requests, cached ones included."""
    cached_tokens: int
    """Tokens: of those, found in the prefix cache."""
    output_tokens: int
    """Tokens: of all requests."""

    @classmethod
    def of(cls, sent: Iterable[Sent]) -> "Mix":
        """Return the sums over requests."""
        sums = [0, 0, 0, 0]
        for one in sent:
            for place, amount in enumerate((1, *one[1:])):
                sums[place] += amount
        return cls(*sums)

    def usd_per_m_output_tokens(self, usd: Decimal) -> Decimal | None:
        """Return USD per million output tokens; None without output tokens."""
        return usd * TOKENS_PER_M / self.output_tokens if self.output_tokens else None

    def usd_per_m_total_tokens(self, usd: Decimal) -> Decimal | None:
        """Return USD per million prompt and output tokens; None without any."""
        tokens = self.prompt_tokens + self.output_tokens
        return usd * TOKENS_PER_M / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Compared:
    """The mix's cost at one offer in USD; `times` is that cost / the deployment's own cost."""

    offer: Offer
    usd: Decimal
    times: Decimal | None
    cheaper: Cheaper | None


def _cheaper(api_usd: Decimal, self_hosted_usd: Decimal | None) -> Cheaper | None:
    if self_hosted_usd is None:
        return None
    if api_usd == self_hosted_usd:
        return "equal"
    return "api" if api_usd < self_hosted_usd else "self-hosted"


def compare(
    sent: Sequence[Sent], self_hosted_usd: Decimal | None, offers: Iterable[Offer]
) -> list[Compared]:
    """Return the cost of the same requests at each offer in USD, the cheapest first.

    `self_hosted_usd` is the deployment's whole cost in that time, idle included. It is None if a
    price is missing; then `times` and `cheaper` are None too.
    """
    found = []
    for offer in offers:
        usd = sum((offer.usd(one) for one in sent), Decimal(0))
        times = usd / self_hosted_usd if self_hosted_usd else None
        found.append(Compared(offer, usd, times, _cheaper(usd, self_hosted_usd)))
    return sorted(found, key=lambda one: (one.usd, one.offer.provider, one.offer.model))


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The price in USD that an offer asks for a month's volume of tokens."""

    offer: Offer
    tokens_per_month: int
    usd: Decimal
    cheaper: Cheaper | None


def what_if(
    offers: Iterable[Offer],
    *,
    ratio: tuple[float, float],
    volumes: Sequence[int],
    tokens_per_request: int,
    at: datetime,
    self_hosted_usd_per_month: Decimal | None,
) -> list[WhatIf]:
    """Return the price that each offer asks for each monthly volume of tokens.

    `ratio` is prompt : output tokens. All requests have the same size, and whole tokens come as
    near to the ratio as they can. No token is cached. The deployment costs the same at every
    volume; this function does not check whether the deployment could serve it.
    """
    prompt = round(tokens_per_request * ratio[0] / sum(ratio))
    one = Sent(at, prompt, 0, tokens_per_request - prompt)
    found = []
    for offer in offers:
        usd_per_token = offer.usd(one) / tokens_per_request
        for volume in volumes:
            usd = usd_per_token * volume
            found.append(WhatIf(offer, volume, usd, _cheaper(usd, self_hosted_usd_per_month)))
    return found


def volumes_of(text: str) -> list[int]:
    """Return volumes in tokens: "100M" is one volume, "1M..1B" goes from 1M to 1B in tenfold steps.

    Raises ValueError for any other text.
    """
    low, dots, high = text.partition("..")
    volumes = [_volume(text, low)]
    if not dots:
        return volumes
    last = _volume(text, high)
    if last < volumes[0]:
        raise ValueError(f"volume: expected the smaller one first, got {quoted(text)}")
    while volumes[-1] * 10 <= last:
        volumes.append(volumes[-1] * 10)
    return volumes if volumes[-1] == last else [*volumes, last]


def _volume(text: str, number: str) -> int:
    found = _VOLUME.match(number.strip())
    tokens = int(Decimal(found[1]) * _TIMES[found[2]]) if found else 0
    if not 0 < tokens <= 10**15:
        raise ValueError(f"volume: expected tokens such as 100M, or 1M..1B, got {quoted(text)}")
    return tokens
