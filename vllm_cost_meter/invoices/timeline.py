"""Billed amounts over time: a provider's readings and invoice lines, spread over hours.

A *meter* is one resource billed for one kind of thing. A provider's counter is read now and then.
The increment between two readings is spread evenly, so windows that split it add up.

A counter that fell was reset, or its resource was created anew. The spend before that is unknown:
nothing is counted, and the time is *unobserved*. Time between two readings further apart than the
gap is unobserved too. There the money is real, but nobody knows when it was spent.

A rate holds until the next reading, but no longer than the gap. An invoice line is spread over its
period. It replaces the counter's figures for the same meter and time. Credits and corrections are
added. Nothing is claimed before the first reading and after the last.

Invariant: a counter never makes a spend negative. The spends in a window's parts add up exactly to
the window's. The hours of a stretch add up to its amount, to the nano-USD.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice, pairwise
from typing import Literal, NamedTuple, get_args

from vllm_cost_meter.units.rounding import half_even
from vllm_cost_meter.units.time import NS_PER_HOUR

ResourceKind = Literal["gpu", "disk", "network", "other"]
KINDS: tuple[ResourceKind, ...] = get_args(ResourceKind)
GPU: ResourceKind = "gpu"
# The basis of an amount: where it is known from.
COUNTER, RATE, INVOICE = "counter", "rate", "invoice"
# The reasons for unobserved time.
RESET, GAP = "reset", "gap"
# Charges in these classes are added to a bill, and only they may be negative.
CHARGE_CLASSES = ("Correction", "Credit", "Adjustment")


@dataclass(frozen=True, slots=True)
class Reading:
    """A provider's counter or rate at an instant: the spend so far, or the price of an hour.

    One of the two is None.
    """

    resource: str
    kind: ResourceKind
    at_ns: int
    cumulative_nanousd: int | None = None
    nanousd_per_hour: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The key of a reading: there is one per resource and instant."""
        return self.resource, self.at_ns


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """One charge on an invoice for the time [from_ns, to_ns).

    `invoice` and `item` distinguish lines for the same resource and time. A line with a
    `charge_class` adds to other lines, and does not make its time billed time.
    """

    resource: str
    kind: ResourceKind
    from_ns: int
    to_ns: int
    nanousd: int
    invoice: str = ""
    item: str = ""
    charge_class: str = ""

    @property
    def key(self) -> tuple[str, int, int, str, str, str]:
        """The key of a line: a ledger holds one line per key."""
        return (
            *(self.resource, self.from_ns, self.to_ns),
            *(self.invoice, self.item, self.charge_class),
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """An amount spread evenly over [from_ns, to_ns); None if it is unknown.

    `unobserved` is the reason why the time is unobserved, if it is. `covers` says that the time is
    billed time. `resets` counts how often the counter fell at its end.
    """

    from_ns: int
    to_ns: int
    nanousd: Fraction | None
    basis: str
    unobserved: str | None = None
    covers: bool = True
    resets: int = 0

    def before(self, at_ns: int) -> Fraction:
        """Return the part spent before an instant, in nano-USD, exact; 0 if unknown."""
        if self.nanousd is None:
            return Fraction(0)
        passed_ns = min(max(at_ns, self.from_ns), self.to_ns) - self.from_ns
        return self.nanousd * Fraction(passed_ns, self.to_ns - self.from_ns)


class BilledHour(NamedTuple):
    """A meter's bill for one hour; `hour` counts since the epoch.

    The spend is known for `covered_ns` of the hour. `unobserved_ns` lie in a gap or before a reset.
    """

    hour: int
    nanousd: int
    covered_ns: int
    unobserved_ns: int
    resets: int
    basis: str


def stretches(
    readings: Iterable[Reading], lines: Iterable[InvoiceLine], gap_ns: int
) -> list[Stretch]:
    """Return the stretches of one meter, from its readings and lines in any order.

    Two readings further apart than `gap_ns` leave a gap.
    """
    lines = sorted(lines, key=lambda line: line.key)
    invoiced = _union((line.from_ns, line.to_ns) for line in lines if not line.charge_class)
    read = [
        piece
        for one, two in pairwise(sorted(readings, key=lambda reading: reading.at_ns))
        for stretch in _between(one, two, gap_ns)
        for piece in _outside(stretch, invoiced)
    ]
    # Two lines may share a time, which is covered once.
    covered = [Stretch(low, high, Fraction(0), INVOICE) for low, high in invoiced]
    charged = [
        Stretch(line.from_ns, line.to_ns, Fraction(line.nanousd), INVOICE, covers=False)
        for line in lines
    ]
    return [*read, *covered, *charged]


def hours_between(from_ns: int, to_ns: int) -> range:
    """Return the hours since the epoch that [from_ns, to_ns) touches."""
    return range(from_ns // NS_PER_HOUR, -(-to_ns // NS_PER_HOUR))


def hours_of(stretch: Stretch, within: range | None = None) -> range:
    """Return the hours that a stretch touches; `within` limits them."""
    hours = hours_between(stretch.from_ns, stretch.to_ns)
    if within is None:
        return hours
    return range(max(hours.start, within.start), min(hours.stop, within.stop))


def billed_hours(found: Iterable[Stretch], within: range | None = None) -> list[BilledHour]:
    """Return the billed hours that a meter's stretches touch; `within` limits them.

    Each stretch is rounded cumulatively, half to even, so its hours add up to it.
    """
    # Each list holds nano-USD, covered ns, unobserved ns and resets.
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    bases: dict[int, set[str]] = defaultdict(set)
    for stretch in found:
        spent, length_ns = None, stretch.to_ns - stretch.from_ns
        # Integers are four times as fast as fractions here.
        amount, parts = (stretch.nanousd or Fraction(0)).as_integer_ratio()
        for hour in hours_of(stretch, within):
            end_ns = (hour + 1) * NS_PER_HOUR
            low, high = max(stretch.from_ns, end_ns - NS_PER_HOUR), min(stretch.to_ns, end_ns)
            if spent is None:
                spent = half_even(amount * (low - stretch.from_ns), parts * length_ns)
            so_far = half_even(amount * (high - stretch.from_ns), parts * length_ns)
            known = sums[hour]
            known[0] += so_far - spent
            known[1] += (high - low) * (stretch.covers and stretch.nanousd is not None)
            known[2] += (high - low) * (stretch.unobserved is not None)
            known[3] += stretch.resets * (high == stretch.to_ns)
            bases[hour].add(stretch.basis)
            spent = so_far
    return [
        BilledHour(hour, known[0], known[1], known[2], known[3], "+".join(sorted(bases[hour])))
        for hour, known in sorted(sums.items())
    ]


def _between(one: Reading, two: Reading, gap_ns: int) -> Iterator[Stretch]:
    """Yield the stretches between two readings, one after the other."""
    begin, end = one.at_ns, two.at_ns
    if one.nanousd_per_hour is not None:
        held = min(end, begin + gap_ns)
        nanousd = Fraction(one.nanousd_per_hour * (held - begin), NS_PER_HOUR)
        yield Stretch(begin, held, nanousd, RATE)
        if held < end:
            yield Stretch(held, end, None, RATE, GAP)
    elif one.cumulative_nanousd is None or two.cumulative_nanousd is None:
        yield Stretch(begin, end, None, COUNTER, GAP)  # The counter became a rate.
    elif two.cumulative_nanousd < one.cumulative_nanousd:
        yield Stretch(begin, end, None, COUNTER, RESET, resets=1)
    else:
        increment = Fraction(two.cumulative_nanousd - one.cumulative_nanousd)
        yield Stretch(begin, end, increment, COUNTER, GAP if end - begin > gap_ns else None)


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def _outside(stretch: Stretch, spans: Sequence[tuple[int, int]]) -> Iterator[Stretch]:
    """Yield the pieces of a stretch outside the spans, each with its part of the amount."""
    begin = stretch.from_ns
    first = bisect_right(spans, begin, key=lambda span: span[1])
    for low, high in chain(islice(spans, first, None), [(stretch.to_ns, stretch.to_ns)]):
        end = min(low, stretch.to_ns)
        if begin < end:
            nanousd = stretch.nanousd
            if nanousd is not None:
                nanousd *= Fraction(end - begin, stretch.to_ns - stretch.from_ns)
            resets = stretch.resets if end == stretch.to_ns else 0
            yield replace(stretch, from_ns=begin, to_ns=end, nanousd=nanousd, resets=resets)
        begin = max(begin, high)
        if begin >= stretch.to_ns:
            return
