"""Files of bills: readings of a provider's counters, invoices as CSV, and FOCUS.

`snapshots` and `focus` are formats of their own; any other CSV is read by a layout of the settings
(`[[invoices]]`), which says in which column what stands. Rows of an invoice that differ in nothing
but the amount are one charge, so that a file adds up to what is billed however it is cut.

Invariant: a file is read as a whole or refused with one line; the order of its rows means nothing.
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
from vllm_cost_meter.invoices.rows import USD_MAX, Row, csv_rows, json_rows, read_text
from vllm_cost_meter.invoices.timeline import (
    CHARGE_CLASSES,
    GPU,
    KINDS,
    BillingSnapshot,
    InvoiceLine,
    Kind,
)
from vllm_cost_meter.prices.book import USD, is_like
from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.time import NS_PER_HOUR

FOCUS, SNAPSHOTS = "focus", "snapshots"
BUILT_IN = (FOCUS, SNAPSHOTS)
# What is not of this deployment.
IGNORE = "ignore"
NEEDED = ("resource", "from", "to", "amount")
FIELDS = (*NEEDED, "currency", "kind", "item", "invoice", "charge_class")
# What may be the same in all rows.
CONSTANTS = ("resource", "currency", "kind", "invoice")
GAP_HOURS = 24.0
KEY_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class Layout:
    """In which column of a CSV file each of FIELDS stands, and what is the same in all rows."""

    columns: Mapping[str, str]
    constants: Mapping[str, str] = field(default_factory=dict)
    time_format: str | None = None
    zone: tzinfo = UTC
    delimiter: str = ","


@dataclass(frozen=True, slots=True)
class InvoiceRules:
    """How files are read: layouts by name, kinds by pattern of resource, USD per currency.

    Of the `kinds` the first that fits holds; `gap_ns` is for how long nobody needs to look.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    kinds: Sequence[tuple[str, str]] = ()
    usd_rates: Mapping[str, Decimal] = field(default_factory=dict)
    gap_ns: int = int(GAP_HOURS * NS_PER_HOUR)

    def kind_of(self, resource: str) -> str | None:
        """Return the kind that was declared of a resource, or IGNORE; None if none was."""
        name = resource.casefold()
        return next((kind for like, kind in self.kinds if is_like(name, like.casefold())), None)


@dataclass(frozen=True, slots=True)
class InvoiceFile:
    """What a file holds, each fact with the place where it (or its first row) stands."""

    name: str
    snapshots: Mapping[BillingSnapshot, str]
    lines: Mapping[InvoiceLine, str]
    ignored: int


class _Charge(NamedTuple):
    """A row of an invoice; of the line the amount is still to come."""

    where: str
    line: InvoiceLine
    nanousd: Fraction


def read_invoice(path: Path, format: str, rules: InvoiceRules) -> InvoiceFile:
    """Return what a file of a format holds. Raises ValueError with one line for what is wrong."""
    text = read_text(path)
    if format == SNAPSHOTS:
        found = _snapshots(path, text, rules)
    elif format == FOCUS:
        found = _invoice(path, text, rules, Layout(invoice_focus.COLUMNS), is_focus=True)
    elif format in rules.layouts:
        found = _invoice(path, text, rules, rules.layouts[format])
    else:
        known = ", ".join((*BUILT_IN, *rules.layouts))
        raise ValueError(f"--format: expected {known} (or a name of [[invoices]]), got {format!r}")
    if not found.snapshots and not found.lines and not found.ignored:
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
        got = f"{float(charge.nanousd / NANOUSD_PER_USD):.6g}"
        raise ValueError(
            f"{charge.where}: amount: expected at most {USD_MAX:,} USD of a resource, got {got}"
        )
    return replace(charge.line, nanousd=round(charge.nanousd))


def _mapped(row: Row, rules: InvoiceRules, layout: Layout) -> _Charge | None:
    """Return the charge of a row by a layout; None if its resource is to be ignored."""

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
    told = (text("invoice"), text("item"), charge_class)
    return _charge(row, layout, rules, resource, _kind(row, layout.columns, kind), told)


def _focus(row: Row, rules: InvoiceRules, layout: Layout) -> _Charge | None:
    """Return the charge of a row of FOCUS; None if its resource is to be ignored."""
    # Support and taxes are of no resource.
    column = layout.columns["resource"]
    resource = row.name(column if row.get(column) else invoice_focus.SERVICE)
    kind = rules.kind_of(resource) or invoice_focus.kind_of(row)
    if kind == IGNORE:
        return None
    told = (
        invoice_focus.invoice_of(row),
        invoice_focus.item_of(row),
        invoice_focus.charge_class_of(row),
    )
    return _charge(row, layout, rules, resource, _kind(row, {}, kind), told)


def _charge(
    row: Row,
    layout: Layout,
    rules: InvoiceRules,
    resource: str,
    kind: Kind,
    told: tuple[str, str, str],
) -> _Charge:
    """Return a charge with its time and its amount; `told` are invoice, item and class."""
    columns = layout.columns
    from_ns, to_ns = (
        row.instant_ns(columns[name], layout.time_format, layout.zone) for name in ("from", "to")
    )
    if to_ns <= from_ns:
        begin, end = row.get(columns["from"]), row.get(columns["to"])
        raise row.wrong(columns["to"], f"an instant after {columns['from']} {begin}", end)
    invoice, item = map(_short, told[:2])
    charge_class = told[2]
    amount = row.number(columns["amount"])
    if amount < 0 and not charge_class:
        expected = f"at least 0, as it is no {' or '.join(CHARGE_CLASSES)}"
        raise row.wrong(columns["amount"], expected, row.get(columns["amount"]))
    nanousd = amount * _usd_rate(row, layout, rules) * NANOUSD_PER_USD
    line = InvoiceLine(resource, kind, from_ns, to_ns, 0, invoice, item, charge_class)
    return _Charge(row.where, line, nanousd)


def _short(text: str) -> str:
    """Return a text that fits a key of the ledger, and differs where the text does."""
    if len(text) <= KEY_CHARS_MAX:
        return text
    return f"{text[:KEY_CHARS_MAX]}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _usd_rate(row: Row, layout: Layout, rules: InvoiceRules) -> Fraction:
    """Return what one of the row's currency is worth in USD."""
    column = layout.columns.get("currency")
    told = layout.constants.get("currency", USD) if column is None else row.get(column)
    if told == USD:
        return Fraction(1)
    if told not in rules.usd_rates:
        expected = ", ".join((USD, *rules.usd_rates))
        raise row.wrong(column or "currency", f"{expected} (or one of [[invoice_rates]])", told)
    return Fraction(rules.usd_rates[told])


def _kind(row: Row, columns: Mapping[str, str], text: str) -> Kind:
    for kind in KINDS:
        if text == kind:
            return kind
    expected = f"{', '.join(KINDS)} (or a kind by [[invoice_resources]])"
    raise row.wrong(columns.get("kind", "kind"), expected, text)


def _snapshots(path: Path, text: str, rules: InvoiceRules) -> InvoiceFile:
    is_json = text.lstrip()[:1] in ("[", "{")
    found: dict[tuple[str, int], BillingSnapshot] = {}
    kinds: dict[str, Kind] = {}
    where: dict[BillingSnapshot, str] = {}
    ignored = 0
    for row in json_rows(path, text) if is_json else _snapshot_rows(path, text):
        snapshot = _snapshot(row, rules)
        if snapshot is None:
            ignored += 1
            continue
        if (kind := kinds.setdefault(snapshot.resource, snapshot.kind)) != snapshot.kind:
            raise row.wrong("kind", f"{kind}, as above", snapshot.kind)
        if (known := found.setdefault(snapshot.key, snapshot)) != snapshot:
            expected = f"one reading of {snapshot.resource!r} at an instant, as in {where[known]}"
            raise row.wrong("timestamp", expected, row.get("timestamp"))
        where.setdefault(snapshot, row.where)
    return InvoiceFile(path.name, where, {}, ignored)


def _snapshot_rows(path: Path, text: str) -> Iterator[Row]:
    return csv_rows(path, text, ("resource", "timestamp"))


def _snapshot(row: Row, rules: InvoiceRules) -> BillingSnapshot | None:
    resource = row.name("resource")
    kind = rules.kind_of(resource) or row.get("kind").casefold() or GPU
    if kind == IGNORE:
        return None
    told = [name for name in ("cumulative_usd", "usd_per_hour") if row.get(name)]
    if len(told) != 1:
        got = "both" if told else "neither"
        raise row.wrong("cumulative_usd", "it or usd_per_hour", got)
    usd = row.number(told[0])
    if not 0 <= usd <= USD_MAX:
        raise row.wrong(told[0], f"a decimal number from 0 to {USD_MAX:,}", row.get(told[0]))
    amounts: list[int | None] = [None, None]
    amounts[told[0] == "usd_per_hour"] = round(usd * NANOUSD_PER_USD)
    at_ns = row.instant_ns("timestamp")
    return BillingSnapshot(resource, _kind(row, {}, kind), at_ns, *amounts)
