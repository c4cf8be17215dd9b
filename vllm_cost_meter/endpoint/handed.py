"""What an API server hands to the process of the side endpoint: settings, and budgets' figures.

The process never reads the settings file: a faulty edit can neither stop nor change it. It gets
what the API server took over, at its start and after each change.

Invariant: what comes back from the process is typed messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.owner import WITH_CHILDREN, Covers

# What the process asks the API server.
REFRESH, ALIVE, BUDGETS, HEALTH, METRICS = "refresh", "alive", "budgets", "health", "metrics"
# What the API server asks the process, and its news.
OWN_FIGURES, SETTINGS = "own figures", "settings"


@dataclass(frozen=True, slots=True)
class Handed:
    """Of the settings, what the side endpoint needs."""

    host: str
    port: int | None
    admin_sha256: str | None
    tenant_keys: Mapping[str, str]
    price_book: PriceBook
    declared: Declared
    public_economics: bool
    is_coarse: bool
    api_prices: str | None
    questions_at_once: int
    question_timeout_s: float

    @classmethod
    def of(cls, settings: Settings) -> "Handed":
        """Return what is needed of these settings."""
        return cls(
            host=settings.host,
            port=settings.port,
            admin_sha256=settings.admin_sha256(),
            tenant_keys=settings.tenant_keys,
            price_book=settings.price_book,
            declared=settings.declared,
            public_economics=settings.public_economics,
            is_coarse=settings.is_coarse,
            api_prices=settings.api_prices,
            questions_at_once=settings.questions_at_once,
            question_timeout_s=settings.question_timeout_s,
        )


class EndpointHello(msgspec.Struct, frozen=True):
    """What the process is told first.

    `port` is where it listens, None for nowhere: with several API servers only the first listens.
    """

    settings: bytes
    ledger_url: str
    port: int | None


class Listening(msgspec.Struct, frozen=True):
    """What the process says when it begins to work: its port, None if it has none."""

    port: int | None


class Refreshed(msgspec.Struct, frozen=True):
    """The answer to a refresh: the runs that live, and why the ledger is behind its journals.

    `behind` is None if the ledger has all that was journaled before the question.
    """

    alive: list[str]
    behind: str | None


class OwnQuestion(msgspec.Struct, frozen=True):
    """What a tenant asks on vLLM's port: of one of its requests, or of itself without an id."""

    tenant: str
    request_id: str | None = None
    window: str | None = None
    covers: Covers = WITH_CHILDREN


class OwnAnswer(msgspec.Struct, frozen=True):
    """The answer: JSON, or with an error's status what is wrong."""

    status: int
    body: bytes = b""
    detail: str = ""
    retry_after: str | None = None
