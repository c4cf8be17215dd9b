"""Compare the cost of a window's requests here with the prices of APIs.

The command `compare` and `GET /cost/compare` both answer with `compared`, so that they agree.

Invariant: every request is priced by itself at the price of its time; unknown is null.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import cast

from vllm_cost_meter.economics import (
    Compared,
    Declared,
    Mix,
    Offer,
    WhatIf,
    compare,
    ratio_of,
    volumes_of,
    what_if,
)
from vllm_cost_meter.economics.comparison import FORMULA
from vllm_cost_meter.economics.numbers import HOURS_PER_MONTH, S_PER_HOUR, not_negative
from vllm_cost_meter.ledger.economics.answers import (
    Comparison,
    ComparisonInputs,
    Found,
    MixRow,
    OfferRow,
    Sums,
    SupposedRow,
)
from vllm_cost_meter.ledger.economics.query import read_figures, read_mix
from vllm_cost_meter.ledger.queries.cut import AsOf, Window
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.reports.engine_labels import EngineFilter
from vllm_cost_meter.reports.grammar import engines_named
from vllm_cost_meter.units.calendar import WEEK, hours_of_window, zone_of

NO_PROMISE = (
    "note: an API's price promises no latency; what was measured here came with the one that"
    " `economics` shows"
)
# A supposed ratio of prompt to output tokens, and supposed volumes per month.
Supposition = tuple[tuple[float, float], list[int]]
# The size of a supposed request if the window has no measured one.
TOKENS_PER_REQUEST = 1_000
# Limit on requests x offers, because each pair is priced by itself.
PRICED_MAX = 20_000_000
# Limit on offers x volumes, because the side endpoint holds the whole answer in memory.
SUPPOSED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class ComparisonQuestion:
    """The question of a comparison: a window, offers, and supposed volumes."""

    window: str = WEEK
    model: tuple[str, ...] = ()
    provider: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    max_usd_per_m_output: float | None = None
    ratio: str | None = None
    volume: tuple[str, ...] = ()
    accept_no_latency_promise: bool = False
    # The zone of days in words such as `today`; the answer has the window in UTC.
    tz: str | None = None
    # Which engines, by their labels; None for all.
    filter: str | None = None

    def check(self) -> None:
        """Raise ValueError for what can be refused before offers are read."""
        if self.max_usd_per_m_output is not None:
            not_negative("max_usd_per_m_output", self.max_usd_per_m_output)
        engines_named(self.filter)

    def inputs(self, prices: str | None) -> ComparisonInputs:
        """Return the question as its answer repeats it; `prices` is the price file."""
        return {
            "window": self.window,
            "model": list(self.model) or None,
            "provider": list(self.provider) or None,
            "prices": prices,
            "label": list(self.label) or None,
            "max_usd_per_m_output": self.max_usd_per_m_output,
            "ratio": self.ratio,
            "volume": list(self.volume) or None,
            "filter": self.filter,
            "accept_no_latency_promise": self.accept_no_latency_promise,
        }


def compared(
    reader: LedgerReader, question: ComparisonQuestion, offers: Sequence[Offer], prices: str | None
) -> Comparison:
    """Return the comparison. Raises ValueError for a question that is wrong or too large."""
    asked = _supposition(question.ratio, question.volume)
    hours = hours_of_window(question.window, zone=zone_of(question.tz))
    engines = engines_named(question.filter)
    found = _answer(reader, (hours, engines), offers, asked, question.max_usd_per_m_output)
    note = None if question.accept_no_latency_promise else NO_PROMISE
    return {"inputs": question.inputs(prices), "formula": FORMULA, **found, "note": note}


def _supposition(ratio: str | None, volumes: Sequence[str]) -> Supposition | None:
    if bool(ratio) != bool(volumes):
        raise ValueError("ratio: expected it and volume together, got one of them")
    if not ratio:
        return None
    return ratio_of(ratio), [tokens for each in volumes for tokens in volumes_of(each)]


def _answer(
    reader: LedgerReader,
    of: tuple[tuple[int | None, int | None], EngineFilter],
    offers: Sequence[Offer],
    asked: Supposition | None,
    limit: float | None,
) -> Found:
    hours, engines = of
    with reader.at_cut(Window(*hours), AsOf(settle_s=0), engines) as (connection, cut):
        figures = read_figures(connection, cut, Declared(), ("cost_usd", "observed_seconds"))
        sent = list(read_mix(connection, cut))
    if len(sent) * len(offers) > PRICED_MAX:
        raise ValueError(
            f"expected at most {PRICED_MAX} requests x offers, got {len(sent)} x {len(offers)}:"
            " name fewer, or a shorter window"
        )
    if asked is not None and len(asked[1]) * len(offers) > SUPPOSED_MAX:
        raise ValueError(
            f"volume: expected at most {SUPPOSED_MAX} offers x volumes, got {len(offers)} x"
            f" {len(asked[1])}"
        )
    mix = Mix.of(sent)
    here = None if figures["cost_usd"] is None else Decimal(repr(figures["cost_usd"]))
    compared = [one for one in compare(sent, here, offers) if _at_most(mix, one.usd, limit)]
    answer: Found = {
        "window": cut.window.as_dict(),
        "mix": cast("MixRow", asdict(mix)),
        "self_hosted": {
            "provider": "self-hosted",
            "model": engines.text or "all of this ledger",
            **_usd(mix, here),
            "source": "measured, idle included",
            "as_of": cut.at(),
        },
        "offers": [_row(one, mix) for one in compared],
        "what_if": None,
    }
    if asked is not None:
        month, size = _usd_per_month(here, figures["observed_seconds"]), _mean_size(mix)
        rows = what_if(
            [one.offer for one in compared],
            ratio=asked[0],
            volumes=asked[1],
            tokens_per_request=size,
            at=datetime.now(UTC),
            self_hosted_usd_per_month=month,
        )
        answer["what_if"] = {
            "tokens_per_request": size,
            "self_hosted_usd_per_month": _text(month),
            "offers": [_supposed(one) for one in rows],
        }
    return answer


def _mean_size(mix: Mix) -> int:
    """Return the mean number of tokens in a request."""
    if not mix.requests:
        return TOKENS_PER_REQUEST
    return max(round((mix.prompt_tokens + mix.output_tokens) / mix.requests), 2)


def _usd_per_month(usd: Decimal | None, observed_s: float | None) -> Decimal | None:
    """Return the cost of a month, at the rate of the observed time."""
    if usd is None or not observed_s:
        return None
    return usd / Decimal(repr(observed_s)) * int(S_PER_HOUR * HOURS_PER_MONTH)


def _supposed(one: WhatIf) -> SupposedRow:
    return {
        "provider": one.offer.provider,
        "model": one.offer.model,
        "tokens_per_month": one.tokens_per_month,
        "usd": f"{one.usd:f}",
        "cheaper": one.cheaper,
    }


def _row(compared: Compared, mix: Mix) -> OfferRow:
    offer = compared.offer
    return {
        "provider": offer.provider,
        "model": offer.model,
        **_usd(mix, compared.usd),
        "times": _text(compared.times),
        "cheaper": compared.cheaper,
        "label": offer.label,
        "source": offer.source,
        "as_of": offer.as_of,
    }


def _usd(mix: Mix, usd: Decimal | None) -> Sums:
    """Return a cost, in all and per million tokens, as decimal text; None if unknown."""
    per_m_output = None if usd is None else mix.usd_per_m_output_tokens(usd)
    per_m_total = None if usd is None else mix.usd_per_m_total_tokens(usd)
    return {
        "usd": _text(usd),
        "usd_per_m_output_tokens": _text(per_m_output),
        "usd_per_m_total_tokens": _text(per_m_total),
    }


def _text(value: Decimal | None) -> str | None:
    return None if value is None else f"{value:f}"


def _at_most(mix: Mix, usd: Decimal, limit: float | None) -> bool:
    if limit is None:
        return True
    per_m = mix.usd_per_m_output_tokens(usd)
    return per_m is not None and per_m <= Decimal(repr(limit))
