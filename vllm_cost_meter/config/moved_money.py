"""What another price book would change in costs that were reported already.

Reports price the past by the book at hand. So a price that begins before now, or an end of one that
held, moves money that somebody may have billed. Each line of a book (the entries with the same
matches, or an overhead's name) is compared hour by hour, up to the end of the present hour, of
which bills were told.

Invariant: a change of which this module says nothing changes no price of an hour that began, to 18
decimal places.
"""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.units.time import hour_of, hour_text


class MovedMoney(NamedTuple):
    """Hours that began already, and what their price was and would be; None is that none held."""

    section: str
    line: str
    from_hour: int | None
    until_hour: int
    before: str | None
    after: str | None

    @property
    def text(self) -> str:
        """The same as a line for people."""
        begins = "ever" if self.from_hour is None else hour_text(self.from_hour)
        return (
            f"{self.section} for {self.line}, from {begins} to {hour_text(self.until_hour)}:"
            f" {self.before or 'nothing'} becomes {self.after or 'nothing'}"
        )


class _Held(NamedTuple):
    """Terms that hold in the hours [start, end); None is no bound."""

    start: int | None
    end: int | None
    terms: str


_Line = tuple[str, str]
# Before every hour.
_EVER = -1


def moved_money(before: PriceBook, after: PriceBook, now_hour: int) -> list[MovedMoney]:
    """Return the hours up to the end of `now_hour` that would have other prices, line by line."""
    old, new = _lines(before), _lines(after)
    return [
        moved
        for line in sorted(old.keys() | new.keys())
        for moved in _moved(line, old.get(line, []), new.get(line, []), now_hour + 1)
    ]


def _moved(
    line: _Line, old: list[_Held], new: list[_Held], until_hour: int
) -> Iterator[MovedMoney]:
    bounds = {each for held in (*old, *new) for each in held[:2] if each is not None}
    starts = [_EVER, *sorted(bound for bound in bounds if bound < until_hour)]
    for start, end in zip(starts, [*starts[1:], until_hour], strict=True):
        was, becomes = _at(old, start), _at(new, start)
        if was != becomes:
            yield MovedMoney(*line, None if start == _EVER else start, end, was, becomes)


def _at(held: list[_Held], hour: int) -> str | None:
    for each in held:
        is_begun = each.start is None or (hour != _EVER and each.start <= hour)
        if is_begun and (each.end is None or hour < each.end):
            return each.terms
    return None


def _lines(book: PriceBook) -> dict[_Line, list[_Held]]:
    lines: dict[_Line, list[_Held]] = {}
    for section, entries in book.listed().items():
        for entry in entries:
            start, end = (
                None if entry[key] is None else hour_of(entry[key])
                for key in ("effective_from", "effective_until")
            )
            line = section, _line_of(section, entry)
            lines.setdefault(line, []).append(_Held(start, end, _terms(section, entry)))
    return lines


def _line_of(section: str, entry: dict[str, Any]) -> str:
    if section == "overheads":
        return repr(entry["name"])
    names = [
        f"{key} {str(entry[key]).casefold()!r}"
        for key in ("model", "gpu_name", "host")
        if entry.get(key) is not None
    ]
    names += [
        f"label {name} {pattern.casefold()!r}"
        for name, pattern in sorted((entry.get("labels") or {}).items())
    ]
    return ", ".join(names) or "every run"


def _terms(section: str, entry: dict[str, Any]) -> str:
    if section == "overheads":
        if entry["percent"] is not None:
            return f"{_number(entry['percent'])} %"
        return f"{_number(entry['usd_per_month'])} USD per month"
    if section == "energy_prices":
        return f"{_number(entry['usd_per_kwh'])} USD per kWh"
    blocks = entry["usd_per_kv_block_hour"]
    of_blocks = "" if blocks is None else f" and {_number(blocks)} USD per KV block-hour"
    return f"{_number(entry['usd_per_gpu_hour'])} USD per GPU-hour{of_blocks}"


def _number(text: str) -> str:
    """Return a decimal as it is written for the same value, so that 2.10 is 2.1."""
    return format(Decimal(text).normalize(), "f")
