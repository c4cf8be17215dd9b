"""FOCUS, the FinOps cost and usage specification (1.2 and later): which column is what.

A file of FOCUS is of a whole account and names what was charged in its own words, so what kind of
thing a row is has to be guessed from its service, resource type and meter; `[[invoice_resources]]`
goes before the guess.

Invariant: every row has a kind, an item and an invoice, whichever optional columns are missing.
"""

import re

from vllm_cost_meter.invoices.rows import Row
from vllm_cost_meter.invoices.timeline import CHARGE_CLASSES, Kind

COLUMNS = {
    "resource": "ResourceId",
    "from": "ChargePeriodStart",
    "to": "ChargePeriodEnd",
    "amount": "BilledCost",
    "currency": "BillingCurrency",
}
SERVICE = "ServiceName"
# What tells charges for one resource and time apart.
_ITEM = (
    *(SERVICE, "SubAccountId", "SkuId", "SkuPriceId", "SkuMeter", "ChargeCategory"),
    *("PricingCategory", "CommitmentDiscountId", "ChargeDescription"),
)
# The more specific column first; a virtual machine's own disk is of the service Compute.
_SAYS_KIND = ("SkuMeter", "ResourceType", SERVICE)
_WORDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("gpu", re.compile(r"\bgpus?\b|accelerat", re.IGNORECASE)),
    ("disk", re.compile(r"disk|volume|storage|snapshot|block store|\bebs\b", re.IGNORECASE)),
    (
        "network",
        re.compile(
            r"network|egress|ingress|bandwidth|transfer|\bnat\b|\bvpn\b|\bip\b|balanc",
            re.IGNORECASE,
        ),
    ),
)
_CATEGORIES: dict[str, Kind] = {
    "compute": "gpu",
    "ai and machine learning": "gpu",
    "storage": "disk",
    "networking": "network",
}


def kind_of(row: Row) -> Kind:
    """Return what kind of thing a row charges for, by its words."""
    if row.get("ChargeCategory") == "Tax":
        return "other"
    for column in _SAYS_KIND:
        for kind, words in _WORDS:
            if words.search(row.get(column)):
                return kind
    return _CATEGORIES.get(row.get("ServiceCategory").casefold(), "other")


def item_of(row: Row) -> str:
    """Return what tells a row from others of its resource and time."""
    return " / ".join(filter(None, map(row.get, _ITEM)))


def invoice_of(row: Row) -> str:
    """Return the invoice of a row: a later one may correct the same time."""
    return row.get("InvoiceId") or row.get("BillingPeriodStart")


def charge_class_of(row: Row) -> str:
    """Return the class by which a row is added to a bill; empty for a charge of its own."""
    words = (row.get("ChargeClass"), row.get("ChargeCategory"))
    return next((word for word in words if word in CHARGE_CLASSES), "")
