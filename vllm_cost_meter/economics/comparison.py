"""What the same requests would have cost at an API: each priced at its own time and size.

Prices of long contexts and times of day hold per request, so summed tokens cannot be priced. Sums
are compared, and a cost per token only with one of the same tokens: output with output, all with
all. An API's price buys no latency; what was measured here came with one.

Invariant: the mix is the same for every offer, so the totals compare.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal, NamedTuple

TOKENS_PER_M = 1_000_000


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
    cheaper: Literal["self-hosted", "api", "equal"] | None


def compare(
    sent: Sequence[Sent], self_hosted_usd: Decimal | None, offers: Iterable[Offer]
) -> list[Compared]:
    """Return what the same requests cost at each offer, the cheapest first.

    `self_hosted_usd` is all that the deployment cost meanwhile, idle included; None if a price
    misses: then nothing is judged.
    """
    found = []
    for offer in offers:
        usd = sum((offer.usd(one) for one in sent), Decimal(0))
        times = usd / self_hosted_usd if self_hosted_usd else None
        cheaper: Literal["self-hosted", "api", "equal"] | None = None
        if self_hosted_usd is not None:
            cheaper = "equal"
            if usd != self_hosted_usd:
                cheaper = "api" if usd < self_hosted_usd else "self-hosted"
        found.append(Compared(offer, usd, times, cheaper))
    return sorted(found, key=lambda one: (one.usd, one.offer.provider, one.offer.model))
