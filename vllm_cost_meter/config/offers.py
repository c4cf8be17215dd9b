"""API prices for `compare`: from the optional package genai-prices, and from the user's file.

genai-prices is an extra (`pip install genai-prices`). It works offline and knows price
history and tiers. Importing it takes seconds and tens of megabytes, so it happens on demand. A
price file is TOML; an entry holds from `effective_from` until the next one for the same model.

Invariant: every offer says where its price comes from. A request before its model's first entry
gets no price.
"""

import tomllib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_cost_meter.economics import Offer, Sent
from vllm_cost_meter.economics.comparison import TOKENS_PER_M

FROM_PACKAGE = "genai-prices"
FILE_BYTES_MAX = 10_000_000


def _text_of_number(value: object) -> object:
    # `str` gives a float's digits as they were written, not its binary expansion.
    return str(value) if isinstance(value, float) else value


Usd = Annotated[Decimal, BeforeValidator(_text_of_number), Field(ge=0, le=10**9)]


class ApiPrice(BaseModel):
    """One `[[api_prices]]` entry of a price file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: str = Field(min_length=1, max_length=128)
    model: str = Field(min_length=1, max_length=128)
    label: str = "file"
    input_usd_per_m: Usd
    output_usd_per_m: Usd
    cached_usd_per_m: Usd | None = None
    source: str = Field(min_length=1, max_length=500)
    effective_from: datetime | None = None

    def usd(self, sent: Sent) -> Decimal:
        """Return the price of a request in USD."""
        cached = self.input_usd_per_m if self.cached_usd_per_m is None else self.cached_usd_per_m
        computed = sent.prompt_tokens - sent.cached_tokens
        return (
            computed * self.input_usd_per_m
            + sent.cached_tokens * cached
            + sent.output_tokens * self.output_usd_per_m
        ) / TOKENS_PER_M


def offers_of_file(path: Path) -> list[Offer]:
    """Return the offers in a price file. Raises ValueError with one line for a faulty file."""
    try:
        if (size := path.stat().st_size) > FILE_BYTES_MAX:
            raise ValueError(f"{path}: expected at most {FILE_BYTES_MAX:,} bytes, got {size:,}")
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML: {error}") from None
    entries = found.get("api_prices")
    if set(found) != {"api_prices"} or not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected [[api_prices]] entries and nothing else")
    by_model: dict[tuple[str, str, str], list[ApiPrice]] = {}
    for number, entry in enumerate(entries):
        try:
            price = ApiPrice.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (f"api_prices[{number}]", *first["loc"])))
            raise ValueError(f"{path}: {where}: {first['msg']}") from None
        by_model.setdefault((price.provider, price.model, price.label), []).append(price)
    return [_dated(prices) for prices in by_model.values()]


def _dated(prices: Sequence[ApiPrice]) -> Offer:
    """Return the offer for one model's entries. Raises ValueError for two with the same date."""
    first = datetime.min.replace(tzinfo=UTC)
    dated = {}
    for price in prices:
        since = price.effective_from or first
        since = since if since.tzinfo else since.replace(tzinfo=UTC)
        if since in dated:
            raise ValueError(
                f"api_prices: expected one price of {price.provider}/{price.model} at a time, got"
                f" two from {price.effective_from or 'the beginning'}"
            )
        dated[since] = price
    starts = sorted(dated)

    def usd(sent: Sent) -> Decimal:
        held = [start for start in starts if start <= sent.at]
        if not held:
            raise ValueError(
                f"api_prices: no price of {prices[0].provider}/{prices[0].model} at {sent.at}"
            )
        return dated[held[-1]].usd(sent)

    latest = dated[starts[-1]]
    as_of = None if latest.effective_from is None else starts[-1].date().isoformat()
    return Offer(latest.provider, latest.model, latest.label, latest.source, as_of, usd)


def offers_of_package(models: Sequence[str], providers: Sequence[str]) -> Iterator[Offer]:
    """Yield offers from genai-prices whose "provider/model" and provider match a pattern.

    An empty list of patterns matches all. Raises ValueError if the package is not installed, and if
    nothing matches.
    """
    try:
        from genai_prices import data_snapshot  # noqa: PLC0415 - an extra, and heavy
    except ImportError:
        raise ValueError(
            "model: expected genai-prices to be installed: pip install genai-prices"
        ) from None
    found = False
    for provider in data_snapshot.get_snapshot().providers:
        if providers and not matches(provider.id, providers):
            continue
        for model in provider.models:
            if models and not matches(f"{provider.id}/{model.id}", models):
                continue
            if not _is_by_token(model):
                continue
            found = True
            urls = provider.pricing_urls or ()
            source = f"{FROM_PACKAGE} {version(FROM_PACKAGE)}"
            yield Offer(
                provider.id,
                model.id,
                FROM_PACKAGE,
                f"{source}, {urls[0]}" if urls else source,
                _held_since(model),
                _package_usd(model, provider),
            )
    if not found:
        raise ValueError(
            "model: expected PROVIDER/MODEL as genai-prices knows them, such as openai/gpt-4o*,"
            " got none that matches and has a price per token"
        )


def _prices_of(model: Any) -> list[tuple[date | None, Any]]:
    """Return a model's prices, each with the day from which it holds; None means always."""
    if not isinstance(model.prices, list):
        return [(None, model.prices)]
    return [(getattr(one.constraint, "start_date", None), one.prices) for one in model.prices]


def _is_by_token(model: Any) -> bool:
    # Models in a subscription, or no longer sold, have no price per token and would seem free.
    return all(
        price.input_mtok is not None or price.output_mtok is not None
        for _, price in _prices_of(model)
    )


def _held_since(model: Any) -> str | None:
    """Return the day since which a model has today's price; None if the package does not say."""
    today = datetime.now(UTC).date()
    days = [day for day, _ in _prices_of(model) if day is not None and day <= today]
    return max(days).isoformat() if days else None


def _package_usd(model: Any, provider: Any) -> Callable[[Sent], Decimal]:
    from genai_prices import Usage  # noqa: PLC0415 - see above

    def usd(sent: Sent) -> Decimal:
        usage = Usage(
            input_tokens=sent.prompt_tokens,
            cache_read_tokens=sent.cached_tokens,
            output_tokens=sent.output_tokens,
        )
        priced = model.calc_price(usage, provider, genai_request_timestamp=sent.at)
        return Decimal(priced.total_price)

    return usd


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name fits one of the glob patterns, in any case."""
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)


def offers_for(
    models: Sequence[str], providers: Sequence[str], prices: Path | None, labels: Sequence[str]
) -> list[Offer]:
    """Return the offers of a price file and of genai-prices that are asked for.

    Raises ValueError where there is none.
    """
    found = [] if prices is None else offers_of_file(prices)
    found = [one for one in found if not providers or matches(one.provider, providers)]
    if models or (providers and not found):
        found += offers_of_package(models, providers)
    found = [one for one in found if not labels or one.label in labels]
    if not found:
        raise ValueError("offers: expected some, by model, provider or prices, got none")
    return found
