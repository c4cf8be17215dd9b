"""The price book: dated prices for GPU-hours and kilowatt-hours, and which one holds for a run.

The API server prices a bill by the hours in which it ran. Reports price every hour of every run
anew, so a price that is declared late changes reports on the past, and changes no record.

An entry holds from its hour until the next entry with the same matches. Among the entries in force
for a run, the most specific wins: first the one with the most matches, then the one with the most
plain names among them. Two equally specific entries give no price, because to pick one would be to
guess money. There is no default price.

An entry may also price KV residency, on top of GPU time: blocks of the KV cache x hours. It holds
for the runs and the time of its entry, so one without such a price charges nothing for blocks.

Invariant: the order of the entries changes no choice. A price is an exact fraction of USD per
GPU-hour, whatever its currency and however many GPUs it pays for.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

from vllm_cost_meter.prices.cost import (
    NO_QUANTITIES,
    Quantities,
    Rates,
    cost_nanousd,
    kv_cost_nanousd,
)
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.units.money import decimal_text
from vllm_cost_meter.units.time import hour_text, instant_of

# Labels, or patterns of labels, by name and in the order of the names.
LabelPairs = tuple[tuple[str, str], ...]
Scope = Literal["gpu", "node", "deployment"]
PurchaseKind = Literal["on_demand", "reserved", "spot"]
USD = "USD"
ALWAYS = -sys.maxsize  # An hour before all others.


def label_pairs(labels: Mapping[str, str]) -> LabelPairs:
    """Return labels, or patterns of labels, as facts and matches have them."""
    return tuple(sorted(labels.items()))


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The facts about an engine run on which its price may depend; None if not known.

    As a text it has no label: labels tell of the operator's machines, and tenants see such texts.
    """

    gpus: int | None = None
    model: str | None = None
    gpu_name: str | None = None
    host: str | None = None
    labels: LabelPairs | None = None

    def __str__(self) -> str:
        about = (("model", self.model), ("GPU", self.gpu_name), ("host", self.host))
        return ", ".join(f"{what} {name or 'unknown'!r}" for what, name in about)

    @property
    def is_known(self) -> bool:
        """Whether all facts are known that may choose a price."""
        return None not in (self.model, self.gpu_name, self.host, self.labels)


@dataclass(frozen=True, slots=True)
class RunMatch:
    """The runs that an entry prices. A match is a name or glob in any case; None fits any run.

    Each of the `labels` is a match of its own. A run without a label of that name fits it not.
    """

    model: str | None = None
    gpu_name: str | None = None
    host: str | None = None
    labels: LabelPairs = ()

    def folded(self) -> tuple[str | None, str | None, str | None, LabelPairs]:
        """Return the matches in one case: equal for two entries that match the same runs."""
        labels = tuple(sorted((name, pattern.casefold()) for name, pattern in self.labels))
        return _folded(self.model), _folded(self.gpu_name), _folded(self.host), labels

    def may_fit(self, run: RunFacts) -> bool:
        """Return whether the entry may price a run, whatever the facts are that are unknown."""
        known = RunMatch(
            None if run.model is None else self.model,
            None if run.gpu_name is None else self.gpu_name,
            None if run.host is None else self.host,
            () if run.labels is None else self.labels,
        )
        return known.fit(run)

    def specificity(self) -> tuple[int, int]:
        """Return how many matches there are, and how many of them are plain names."""
        *names, labels = self.folded()
        given = [pattern for pattern in names if pattern is not None]
        given += [pattern for _, pattern in labels]
        return len(given), sum(not any(c in pattern for c in "*?[") for pattern in given)

    def fit(self, run: RunFacts) -> bool:
        """Return whether the entry prices a run. An unknown fact fits no match."""
        *patterns, labels = self.folded()
        names: list[str | None] = [run.model, run.gpu_name, run.host]
        known = dict(run.labels or ())
        names += [known.get(name) for name, _ in labels]
        patterns += [pattern for _, pattern in labels]
        return all(
            pattern is None or (name is not None and is_like(name.casefold(), pattern))
            for name, pattern in zip(names, patterns, strict=True)
        )


ANY_RUN = RunMatch()


@dataclass(frozen=True, slots=True)
class PriceEntry:
    """The declared price of `gpus` GPUs for an hour: `amount` in `currency`.

    One unit of the currency is worth `usd_rate` USD. `key` names the entry in messages.
    `effective_from_hour` counts hours since the epoch; None means always, and an entry with a date
    goes before one without. `kind` is None if it is not known. `usd_per_kv_block_hour` prices one
    block of the KV cache for an hour, in USD whatever the currency; None if blocks cost nothing.
    """

    key: str
    amount: Decimal
    source: str
    effective_from_hour: int | None
    scope: Scope = "gpu"
    gpus: int = 1
    kind: PurchaseKind | None = None
    currency: str = USD
    usd_rate: Decimal = Decimal(1)
    matches: RunMatch = ANY_RUN
    usd_per_kv_block_hour: Decimal | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GpuHourPrice:
    """The price of one GPU for one hour, from an entry. A book has one such object per entry.

    `rates` are exact. `text` shows the price of the GPU-hour as a decimal with at most 18 places.
    """

    rates: Rates
    text: str
    entry: PriceEntry

    @classmethod
    def of(cls, entry: PriceEntry) -> Self:
        """Return the price that an entry declares."""
        usd = Fraction(entry.amount) * Fraction(entry.usd_rate) / entry.gpus
        is_as_given = entry.currency == USD and entry.gpus == 1
        text = format(entry.amount, "f") if is_as_given else decimal_text(usd)
        return cls(Rates(usd, Fraction(entry.usd_per_kv_block_hour or 0)), text, entry)

    @property
    def usd_per_gpu_hour(self) -> Fraction:
        """The price of the GPU-hour, exact."""
        return self.rates.usd_per_gpu_hour

    @property
    def kv_text(self) -> str | None:
        """The USD per KV block-hour as a decimal; None without such a price."""
        usd = self.entry.usd_per_kv_block_hour
        return None if usd is None else format(usd, "f")

    @property
    def key(self) -> str:
        """The entry's name in messages."""
        return self.entry.key

    @property
    def matches(self) -> RunMatch:
        """The runs that the entry prices."""
        return self.entry.matches

    @property
    def effective_from_hour(self) -> int | None:
        """The hour since the epoch from which the entry holds; None means always."""
        return self.entry.effective_from_hour

    def as_dict(self) -> dict[str, Any]:
        """Return the price as reports and the command line list it."""
        entry = self.entry
        return {
            "usd_per_gpu_hour": self.text,
            "usd_per_kv_block_hour": self.kv_text,
            "amount": format(entry.amount, "f"),
            "currency": entry.currency,
            "usd_rate": format(entry.usd_rate, "f"),
            "scope": entry.scope,
            "gpus": entry.gpus,
            "kind": entry.kind,
            "source": entry.source,
            "effective_from": instant_of(entry.effective_from_hour),
            **asdict(entry.matches),
            "labels": dict(entry.matches.labels) or None,
        }


@dataclass(frozen=True, slots=True)
class EnergyPrice:
    """The price of a kilowatt-hour from an hour on; fields as in `PriceEntry`."""

    key: str
    usd_per_kwh: Decimal
    source: str
    effective_from_hour: int | None
    matches: RunMatch = ANY_RUN

    def as_dict(self) -> dict[str, Any]:
        """Return the price as reports and the command line list it."""
        return {
            "usd_per_kwh": format(self.usd_per_kwh, "f"),
            "source": self.source,
            "effective_from": instant_of(self.effective_from_hour),
            "host": self.matches.host,
        }


class _Dated(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def matches(self) -> RunMatch: ...
    @property
    def effective_from_hour(self) -> int | None: ...


E = TypeVar("E", bound=_Dated)


class _Line(Generic[E]):
    """Entries with the same matches, one after the other in time."""

    def __init__(self, entries: Sequence[E]) -> None:
        self.entries = sorted(entries, key=_start)
        self.starts = [_start(entry) for entry in self.entries]
        first = self.entries[0]
        self.matches = first.matches
        self.specificity = (first.effective_from_hour is not None, *first.matches.specificity())

    def at(self, hour: int) -> E | None:
        place = bisect_right(self.starts, hour)
        return self.entries[place - 1] if place else None

    def until(self, place: int) -> int | None:
        return self.starts[place + 1] if place + 1 < len(self.starts) else None


class _Timetable(Generic[E]):
    """A book's entries, and which of them are in force for a run at an hour."""

    def __init__(self, entries: Sequence[E]) -> None:
        if (twice := same_start(entries)) is not None:
            keys = " and ".join(entries[place].key for place in twice)
            raise ValueError(f"expected one price at a time for the same matches, got {keys}")
        lines: dict[tuple[object, ...], list[E]] = {}
        for entry in entries:
            kind = (entry.effective_from_hour is None, *entry.matches.folded())
            lines.setdefault(kind, []).append(entry)
        self.lines = sorted(
            (_Line(line) for line in lines.values()),
            key=lambda line: (*line.specificity, str(line.matches.folded())),
            reverse=True,
        )
        # Reports ask for each hour of a run, so its lines are looked up once.
        self._of_run: dict[RunFacts, list[_Line[E]]] = {}

    def of(self, run: RunFacts) -> list[_Line[E]]:
        """Return the lines whose matches fit a run, the most specific first."""
        found = self._of_run.get(run)
        if found is None:
            found = self._of_run[run] = [line for line in self.lines if line.matches.fit(run)]
        return found

    def at(self, run: RunFacts, hour: int) -> list[E]:
        """Return the most specific entries in force: one, none, or several equally specific."""
        found: list[E] = []
        specificity = None
        for line in self.of(run):
            if found and line.specificity != specificity:
                break
            if (entry := line.at(hour)) is not None:
                found.append(entry)
                specificity = line.specificity
        return found

    def why_none(self, run: RunFacts, hour: int, settings: str) -> str:
        """Return the reason why a run has no single entry at an hour."""
        if len(found := self.at(run, hour)) > 1:
            keys = " and ".join(sorted(entry.key for entry in found))
            return f"{keys} are equally specific for {run}: give one of them more matches"
        if not self.lines:
            return f"none is set by {settings}"
        if later := [line.entries[0] for line in self.of(run)]:
            first = min(later, key=_start)
            return f"{first.key}, the first for {run}, is effective from {hour_text(_start(first))}"
        labels = " and its labels" if any(line.matches.labels for line in self.lines) else ""
        return f"no entry matches {run}{labels}"


class PriceBook:
    """All declared prices, and the declared overheads, which are in no price."""

    def __init__(
        self,
        prices: Iterable[PriceEntry] = (),
        energy_prices: Iterable[EnergyPrice] = (),
        overheads: Sequence[Overhead] = (),
    ) -> None:
        """Raises ValueError for two entries with the same matches from the same hour."""
        self.entries = tuple(prices)
        self._prices = _Timetable([GpuHourPrice.of(entry) for entry in self.entries])
        self._energy = _Timetable(list(energy_prices))
        self.overheads = overheads

    def price_at(self, run: RunFacts, hour: int) -> GpuHourPrice | None:
        """Return a run's price in an hour since the epoch; None without a single best entry."""
        found = self._prices.at(run, hour)
        return found[0] if len(found) == 1 else None

    def certain_price_at(self, run: RunFacts, hour: int) -> GpuHourPrice | None:
        """Return a run's price in an hour; None if a fact that is unknown may choose another."""
        found = self.price_at(run, hour)
        if found is None or run.is_known:
            return found
        in_force = [line for line in self._prices.lines if line.at(hour) is not None]
        best = max(line.specificity for line in in_force if line.matches.fit(run))
        rivals = (line for line in in_force if line.specificity >= best)
        certain = all(line.matches.fit(run) or not line.matches.may_fit(run) for line in rivals)
        return found if certain else None

    def may_have_price(self, run: RunFacts, hour: int) -> bool:
        """Return whether a run may have a price in an hour, whatever its unknown facts are."""
        if run.is_known:
            return self.price_at(run, hour) is not None
        return any(
            line.matches.may_fit(run) and line.at(hour) is not None for line in self._prices.lines
        )

    def energy_price_at(self, run: RunFacts, hour: int) -> EnergyPrice | None:
        """Return a run's energy price in an hour; None without a single best entry."""
        found = self._energy.at(run, hour)
        return found[0] if len(found) == 1 else None

    def why_no_price(self, run: RunFacts, hour: int) -> str:
        """Return the reason why `certain_price_at` returns None."""
        if (found := self.price_at(run, hour)) is not None:
            return f"{found.entry.key} is in force, but another entry may hold for {run}"
        return self._prices.why_none(run, hour, "COST_METER_GPU_HOUR_USD or [[prices]]")

    def why_no_energy_price(self, run: RunFacts, hour: int) -> str:
        """Return the reason why `energy_price_at` returns None."""
        return self._energy.why_none(run, hour, "[[energy_prices]]")

    def prices_in_force(self, hour: int) -> list[GpuHourPrice]:
        """Return all runs' prices in an hour since the epoch, the most specific first."""
        found = (line.at(hour) for line in self._prices.lines)
        return [price for price in found if price is not None]

    def price_changes(self) -> list[int]:
        """Return the hours at which a price may change, in order: no price changes between two."""
        return _changes(self._prices)

    def energy_price_changes(self) -> list[int]:
        """Return the hours at which an energy price may change, in order."""
        return _changes(self._energy)

    def listed(self) -> dict[str, list[dict[str, Any]]]:
        """Return all entries, the most specific first, each with its `effective_until`."""
        return {
            "prices": _listed(self._prices),
            "energy_prices": _listed(self._energy),
            "overheads": [overhead.as_dict() for overhead in self.overheads],
        }


def same_start(entries: Sequence[_Dated]) -> tuple[int, int] | None:
    """Return the places of the first two entries with the same hour and matches; None if none."""
    seen: dict[tuple[object, ...], int] = {}
    for place, entry in enumerate(entries):
        earlier = seen.setdefault((_start(entry), *entry.matches.folded()), place)
        if earlier != place:
            return earlier, place
    return None


def by_price(
    spent: Iterable[tuple[int, Quantities]], price_at: Callable[[int], GpuHourPrice | None]
) -> dict[GpuHourPrice, Quantities] | None:
    """Return quantities by price, from those by hour; None if any hour has no price."""
    found: dict[GpuHourPrice, Quantities] = {}
    for hour, used in spent:
        price = price_at(hour)
        if price is None:
            return None
        found[price] = found.get(price, NO_QUANTITIES) + used
    return found


def time_nanousd(spent: Mapping[GpuHourPrice, Quantities]) -> int:
    """Return the cost of GPU time by price, in nano-USD, rounded once for each price."""
    return sum(
        cost_nanousd(used.gpu_time_ns, price.usd_per_gpu_hour) or 0 for price, used in spent.items()
    )


def kv_nanousd(spent: Mapping[GpuHourPrice, Quantities]) -> int:
    """Return the cost of KV residency by price, in nano-USD, rounded once for each price."""
    return sum(
        kv_cost_nanousd(used.kv_block_ms, price.rates.usd_per_kv_block_hour)
        for price, used in spent.items()
    )


def total_nanousd(spent: Mapping[GpuHourPrice, Quantities]) -> int:
    """Return what a bill costs, in nano-USD: its GPU time and its KV residency, by price."""
    return time_nanousd(spent) + kv_nanousd(spent)


def described(price: Mapping[str, Any]) -> str:
    """Return a price from `GpuHourPrice.as_dict` in words: amount, scope and source."""
    since = f"from {price['effective_from'][:13]}Z" if price["effective_from"] else None
    about = (terms(price), price["kind"], since, price["source"])
    amounts = f"{price['usd_per_gpu_hour']} USD per GPU-hour"
    if (of_blocks := price["usd_per_kv_block_hour"]) is not None:
        amounts += f" and {of_blocks} USD per KV block-hour"
    return f"{amounts} ({', '.join(filter(None, about))})"


def terms(price: Mapping[str, Any]) -> str:
    """Return a price's terms, e.g. "98.32 USD per node of 8 GPUs"; "gpu" for USD per GPU."""
    scope, currency = price["scope"], price["currency"]
    if scope == "gpu" and currency == USD:
        return "gpu"
    of = "" if scope == "gpu" else f" of {price['gpus']} GPUs"
    rate = "" if currency == USD else f", {price['usd_rate']} USD per {currency}"
    return f"{price['amount']} {currency} per {scope}{of}{rate}"


def _changes(table: _Timetable[Any]) -> list[int]:
    return sorted({start for line in table.lines for start in line.starts} - {ALWAYS})


def _listed(table: _Timetable[Any]) -> list[dict[str, Any]]:
    return [
        {"key": entry.key, **entry.as_dict(), "effective_until": instant_of(line.until(place))}
        for line in table.lines
        for place, entry in enumerate(line.entries)
    ]


def _start(entry: _Dated) -> int:
    return ALWAYS if entry.effective_from_hour is None else entry.effective_from_hour


def _folded(pattern: str | None) -> str | None:
    return None if pattern is None else pattern.casefold()


def is_like(name: str, pattern: str) -> bool:
    """Return whether a name equals a pattern or fits it as a glob. Both must be in one case."""
    # The name may hold brackets, which a glob reads as a class of characters.
    return name == pattern or fnmatchcase(name, pattern)


NO_PRICES = PriceBook()
