"""FOCUS columns (FinOps cost and usage specification, 1.2 and later), and the kind of each row.

A FOCUS file covers a whole account and names charges in its provider's words. So the kind of a row
is a guess from its service, resource type and meter. `[[invoice_resources]]` overrides the guess.

Invariant: every row has a kind, an item and an invoice, even if optional columns are missing.
"""

import re

from vllm_cost_meter.invoices.rows import FileRow
from vllm_cost_meter.invoices.timeline import CHARGE_CLASSES, ResourceKind

COLUMNS = {
    "resource": "ResourceId",
    "from": "ChargePeriodStart",
    "to": "ChargePeriodEnd",
    "amount": "BilledCost",
    "currency": "BillingCurrency",
}
SERVICE = "ServiceName"
# These columns distinguish charges for one resource and time.
_ITEM = (
    *(SERVICE, "SubAccountId", "SkuId", "SkuPriceId", "SkuMeter", "ChargeCategory"),
    *("PricingCategory", "CommitmentDiscountId", "ChargeDescription"),
)
# The more specific column comes first: a virtual machine's own disk has the service Compute.
_SAYS_KIND = ("SkuMeter", "ResourceType", SERVICE)
_WORDS: tuple[tuple[ResourceKind, re.Pattern[str]], ...] = (
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
_CATEGORIES: dict[str, ResourceKind] = {
    "compute": "gpu",
    "ai and machine learning": "gpu",
    "storage": "disk",
    "networking": "network",
}


def kind_of(row: FileRow) -> ResourceKind:
    """Return the kind of resource that a row charges for, guessed from its words."""
    if row.get("ChargeCategory") == "Tax":
        return "other"
    for column in _SAYS_KIND:
        for kind, words in _WORDS:
            if words.search(row.get(column)):
                return kind
    return _CATEGORIES.get(row.get("ServiceCategory").casefold(), "other")


def item_of(row: FileRow) -> str:
    """Return the text that distinguishes a row from others for its resource and time."""
    return " / ".join(filter(None, map(row.get, _ITEM)))


def invoice_of(row: FileRow) -> str:
    """Return a row's invoice, else its billing period: a later one may correct the same time."""
    return row.get("InvoiceId") or row.get("BillingPeriodStart")


def charge_class_of(row: FileRow) -> str:
    """Return a row's class (Correction, Credit, Adjustment); empty for an ordinary charge."""
    words = (row.get("ChargeClass"), row.get("ChargeCategory"))
    return next((word for word in words if word in CHARGE_CLASSES), "")
