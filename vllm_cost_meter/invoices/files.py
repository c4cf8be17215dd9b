"""Read a provider's bill file: counter readings, CSV invoices, and FOCUS.

`snapshots` and `focus` are built-in formats. A layout in the settings (`[[invoices]]`) describes
any other CSV: it names the column for each field. Invoice rows that differ only in their amount are
one charge, so the file adds up to the billed total however its provider cuts rows.

Invariant: a file is read as a whole or refused with one line. The order of its rows means nothing.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from vllm_cost_meter.invoices import focus as invoice_focus
from vllm_cost_meter.invoices.rows import USD_MAX, FileRow, csv_rows, json_rows, read_text
from vllm_cost_meter.invoices.timeline import (
    CHARGE_CLASSES,
    GPU,
    KINDS,
    InvoiceLine,
    Reading,
    ResourceKind,
)
from vllm_cost_meter.prices.book import USD, is_like
from vllm_cost_meter.units.money import NANOUSD_PER_USD, format_amount
from vllm_cost_meter.units.time import NS_PER_HOUR

FOCUS, SNAPSHOTS = "focus", "snapshots"
BUILT_IN = (FOCUS, SNAPSHOTS)
# The kind for resources that belong to another deployment.
IGNORE = "ignore"
NEEDED = ("resource", "from", "to", "amount")
FIELDS = (*NEEDED, "currency", "kind", "item", "invoice", "charge_class")
# The fields that may have one value for all rows.
CONSTANTS = ("resource", "currency", "kind", "invoice")
GAP_HOURS = 24.0
KEY_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class Layout:
    """The column of a CSV file for each of FIELDS, and the fields that are the same in all rows."""

    columns: Mapping[str, str]
    constants: Mapping[str, str] = field(default_factory=dict)
    time_format: str | None = None
    zone: tzinfo = UTC
    delimiter: str = ","


@dataclass(frozen=True, slots=True)
class InvoiceRules:
    """Rules for reading files: layouts by name, kinds by resource pattern, USD per currency.

    The first of the `kinds` whose pattern fits holds. Two readings further apart than `gap_ns`
    leave a gap.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    kinds: Sequence[tuple[str, str]] = ()
    usd_rates: Mapping[str, Decimal] = field(default_factory=dict)
    gap_ns: int = int(GAP_HOURS * NS_PER_HOUR)

    def kind_of(self, resource: str) -> str | None:
        """Return the kind declared for a resource, or IGNORE; None if none is declared."""
        name = resource.casefold()
        return next((kind for like, kind in self.kinds if is_like(name, like.casefold())), None)


@dataclass(frozen=True, slots=True)
class InvoiceFile:
    """The facts in a file, each with its place as "file:line" (the first row's if it has more).

    `ignored` counts rows for resources of the kind IGNORE.
    """

    name: str
    readings: Mapping[Reading, str]
    lines: Mapping[InvoiceLine, str]
    ignored: int


class _Charge(NamedTuple):
    """One charge: its first row's place, its line with a 0 amount, and its exact amount so far."""

    where: str
    line: InvoiceLine
    nanousd: Fraction


def read_invoice(path: Path, format: str, rules: InvoiceRules) -> InvoiceFile:
    """Return the facts in a file of a format: `snapshots`, `focus` or a layout's name.

    Raises ValueError with one line (file, place, column, expected, got) for the first fault.
    """
    text = read_text(path)
    if format == SNAPSHOTS:
        found = _readings(path, text, rules)
    elif format == FOCUS:
        found = _invoice(path, text, rules, Layout(invoice_focus.COLUMNS), is_focus=True)
    elif format in rules.layouts:
        found = _invoice(path, text, rules, rules.layouts[format])
    else:
        known = ", ".join((*BUILT_IN, *rules.layouts))
        expected = f"{known} (or the name of a layout in [[invoices]])"
        raise ValueError(f"--format: expected {expected}, got {format!r}")
    if not found.readings and not found.lines and not found.ignored:
        raise ValueError(f"{path}: expected at least one row, got none")
    return found


def _invoice(
    path: Path, text: str, rules: InvoiceRules, layout: Layout, *, is_focus: bool = False
) -> InvoiceFile:
    needed = tuple(layout.columns.values())
    found: dict[tuple[object, ...], _Charge] = {}
    ignored = 0
    for row in csv_rows(path, text, needed, layout.delimiter):
        charge = _focus(row, rules, layout) if is_focus else _mapped(row, rules, layout)
        if charge is None:
            ignored += 1
            continue
        known = found.setdefault(charge.line.key, charge)
        if known.line.kind != charge.line.kind:
            raise row.wrong("kind", f"{known.line.kind}, as in {known.where}", charge.line.kind)
        if known is not charge:
            nanousd = known.nanousd + charge.nanousd
            found[charge.line.key] = known._replace(nanousd=nanousd)
    lines = {_rounded(charge): charge.where for charge in found.values()}
    return InvoiceFile(path.name, {}, lines, ignored)


def _rounded(charge: _Charge) -> InvoiceLine:
    if abs(charge.nanousd) > USD_MAX * NANOUSD_PER_USD:
        got = format_amount(float(charge.nanousd / NANOUSD_PER_USD))
        raise ValueError(
            f"{charge.where}: amount: expected at most {USD_MAX:,} USD per resource, got {got}"
        )
    return replace(charge.line, nanousd=round(charge.nanousd))


def _mapped(row: FileRow, rules: InvoiceRules, layout: Layout) -> _Charge | None:
    """Return the charge in a row, read by a layout; None if its resource is ignored."""

    def text(name: str) -> str:
        column = layout.columns.get(name)
        return layout.constants.get(name, "") if column is None else row.get(column)

    column = layout.columns.get("resource")
    resource = layout.constants["resource"] if column is None else row.name(column)
    kind = rules.kind_of(resource) or text("kind").casefold()
    if kind == IGNORE:
        return None
    charge_class = text("charge_class").capitalize()
    if charge_class and charge_class not in CHARGE_CLASSES:
        expected = f"nothing, or {', '.join(CHARGE_CLASSES)}"
        raise row.wrong(layout.columns["charge_class"], expected, text("charge_class"))
    names = (text("invoice"), text("item"), charge_class)
    return _charge(row, layout, rules, resource, _kind(row, layout.columns, kind), names)


def _focus(row: FileRow, rules: InvoiceRules, layout: Layout) -> _Charge | None:
    """Return the charge in a FOCUS row; None if its resource is ignored."""
    # Support and taxes name no resource.
    column = layout.columns["resource"]
    resource = row.name(column if row.get(column) else invoice_focus.SERVICE)
    kind = rules.kind_of(resource) or invoice_focus.kind_of(row)
    if kind == IGNORE:
        return None
    names = (
        invoice_focus.invoice_of(row),
        invoice_focus.item_of(row),
        invoice_focus.charge_class_of(row),
    )
    return _charge(row, layout, rules, resource, _kind(row, {}, kind), names)


def _charge(
    row: FileRow,
    layout: Layout,
    rules: InvoiceRules,
    resource: str,
    kind: ResourceKind,
    names: tuple[str, str, str],
) -> _Charge:
    """Return a charge with its time and its amount; `names` are invoice, item and class."""
    columns = layout.columns
    from_ns, to_ns = (
        row.instant_ns(columns[name], layout.time_format, layout.zone) for name in ("from", "to")
    )
    if to_ns <= from_ns:
        begin, end = row.get(columns["from"]), row.get(columns["to"])
        raise row.wrong(columns["to"], f"an instant after {columns['from']} {begin}", end)
    invoice, item = map(_short, names[:2])
    charge_class = names[2]
    amount = row.number(columns["amount"])
    if amount < 0 and not charge_class:
        expected = f"at least 0 unless the charge is a {' or '.join(CHARGE_CLASSES)}"
        raise row.wrong(columns["amount"], expected, row.get(columns["amount"]))
    nanousd = amount * _usd_rate(row, layout, rules) * NANOUSD_PER_USD
    line = InvoiceLine(resource, kind, from_ns, to_ns, 0, invoice, item, charge_class)
    return _Charge(row.where, line, nanousd)


def _short(text: str) -> str:
    """Return a text short enough for a ledger key; different texts stay different."""
    if len(text) <= KEY_CHARS_MAX:
        return text
    return f"{text[:KEY_CHARS_MAX]}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _usd_rate(row: FileRow, layout: Layout, rules: InvoiceRules) -> Fraction:
    """Return the worth of one unit in the row's currency, in USD."""
    column = layout.columns.get("currency")
    currency = layout.constants.get("currency", USD) if column is None else row.get(column)
    if currency == USD:
        return Fraction(1)
    if currency not in rules.usd_rates:
        expected = f"{', '.join((USD, *rules.usd_rates))} (or one of [[invoice_rates]])"
        raise row.wrong(column or "currency", expected, currency)
    return Fraction(rules.usd_rates[currency])


def _kind(row: FileRow, columns: Mapping[str, str], text: str) -> ResourceKind:
    for kind in KINDS:
        if text == kind:
            return kind
    expected = f"{', '.join(KINDS)} (or a kind by [[invoice_resources]])"
    raise row.wrong(columns.get("kind", "kind"), expected, text)


def _readings(path: Path, text: str, rules: InvoiceRules) -> InvoiceFile:
    is_json = text.lstrip()[:1] in ("[", "{")
    found: dict[tuple[str, int], Reading] = {}
    kinds: dict[str, ResourceKind] = {}
    where: dict[Reading, str] = {}
    ignored = 0
    for row in json_rows(path, text) if is_json else _reading_rows(path, text):
        reading = _reading(row, rules)
        if reading is None:
            ignored += 1
            continue
        if (kind := kinds.setdefault(reading.resource, reading.kind)) != reading.kind:
            raise row.wrong("kind", f"{kind}, as in an earlier row", reading.kind)
        if (known := found.setdefault(reading.key, reading)) != reading:
            expected = f"one reading of {reading.resource!r} at an instant, as in {where[known]}"
            raise row.wrong("timestamp", expected, row.get("timestamp"))
        where.setdefault(reading, row.where)
    return InvoiceFile(path.name, where, {}, ignored)


def _reading_rows(path: Path, text: str) -> Iterator[FileRow]:
    return csv_rows(path, text, ("resource", "timestamp"))


def _reading(row: FileRow, rules: InvoiceRules) -> Reading | None:
    resource = row.name("resource")
    kind = rules.kind_of(resource) or row.get("kind").casefold() or GPU
    if kind == IGNORE:
        return None
    given = [name for name in ("cumulative_usd", "usd_per_hour") if row.get(name)]
    if len(given) != 1:
        got = "both" if given else "neither"
        raise row.wrong("cumulative_usd", "an amount either here or in usd_per_hour", got)
    usd = row.number(given[0])
    if not 0 <= usd <= USD_MAX:
        raise row.wrong(given[0], f"a decimal number from 0 to {USD_MAX:,}", row.get(given[0]))
    amounts: list[int | None] = [None, None]
    amounts[given[0] == "usd_per_hour"] = round(usd * NANOUSD_PER_USD)
    at_ns = row.instant_ns("timestamp")
    return Reading(resource, _kind(row, {}, kind), at_ns, *amounts)
