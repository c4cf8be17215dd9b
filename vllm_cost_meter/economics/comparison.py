"""What the same requests would have cost at an API: each priced at its own time and size.

Prices of long contexts and times of day hold per request, so summed tokens cannot be priced. Sums
are compared, and a cost per token only with one of the same tokens: output with output, all with
all. An API's price buys no latency; what was measured here came with one.

Invariant: the mix is the same for every offer, so the totals compare.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal, NamedTuple

TOKENS_PER_M = 1_000_000
# What `compare` and `what_if` compute, as `compare --json` tells it; times and tiers of a price are
# in the `price` of each request.
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
    """A request that ended: when, and its tokens. Cached ones are among the prompt's."""

    at: datetime
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Offer:
    """An API's price of a model. `usd` returns what it takes for a request.

    `source` says where the price is from, `as_of` of when it is, None if nobody said.
    """

    provider: str
    model: str
    label: str
    source: str
    as_of: str | None
    usd: Callable[[Sent], Decimal]


@dataclass(frozen=True, slots=True)
class Mix:
    """What was sent in all."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, sent: Iterable[Sent]) -> "Mix":
        """Return the sums."""
        sums = [0, 0, 0, 0]
        for one in sent:
            for place, amount in enumerate((1, *one[1:])):
                sums[place] += amount
        return cls(*sums)

    def usd_per_m_output_tokens(self, usd: Decimal) -> Decimal | None:
        """Return a sum per million output tokens; None if there are none."""
        return usd * TOKENS_PER_M / self.output_tokens if self.output_tokens else None

    def usd_per_m_total_tokens(self, usd: Decimal) -> Decimal | None:
        """Return a sum per million prompt and output tokens; None if there are none."""
        tokens = self.prompt_tokens + self.output_tokens
        return usd * TOKENS_PER_M / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Compared:
    """What the mix costs at an offer, beside what it cost here: `usd` / here is `times`."""

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
    """Return what the same requests cost at each offer, in USD, the cheapest first.

    `self_hosted_usd` is all that the deployment cost meanwhile, idle included; None if a price
    misses: then nothing is judged.
    """
    found = []
    for offer in offers:
        usd = sum((offer.usd(one) for one in sent), Decimal(0))
        times = usd / self_hosted_usd if self_hosted_usd else None
        found.append(Compared(offer, usd, times, _cheaper(usd, self_hosted_usd)))
    return sorted(found, key=lambda one: (one.usd, one.offer.provider, one.offer.model))


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What a volume of tokens in a month would cost at an offer, and a fixed cost here."""

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
    """Return what volumes of prompt and output tokens in a ratio would cost at each offer.

    All requests have the same size, of which the ratio is as near as whole tokens allow; nothing is
    cached. Here a month costs the same at every volume; whether it could be served is not asked.
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
    """Return the tokens of "100M", or of "1M..1B" each ten times the one before.

    Raises ValueError for anything else.
    """
    low, dots, high = text.partition("..")
    volumes = [_volume(text, low)]
    if not dots:
        return volumes
    last = _volume(text, high)
    if last < volumes[0]:
        raise ValueError(f"volume: expected the smaller one first, got {text!r}")
    while volumes[-1] * 10 <= last:
        volumes.append(volumes[-1] * 10)
    return volumes if volumes[-1] == last else [*volumes, last]


def _volume(text: str, number: str) -> int:
    found = _VOLUME.match(number.strip())
    tokens = int(Decimal(found[1]) * _TIMES[found[2]]) if found else 0
    if not 0 < tokens <= 10**15:
        raise ValueError(f"volume: expected tokens such as 100M, or 1M..1B, got {text!r}")
    return tokens
