"""Idle policies: which tenant pays for engine time that no request used.

A policy applies when a report is made. It shares eight classes of time: idle, sleep, startup, tail,
dummy, recomputed, host and lost. Time in flight is not shared, because requests that still run will
be billed for it. A policy gives each tenant's part of the shared time; the rest stays in the row
of its class. Core: standard library only.

Invariant: shares are exact fractions, never negative, and at most 1 together. So sharing moves time
and money, and neither makes nor loses any.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from vllm_cost_meter.records.snapshot import OTHER_CLASSES
from vllm_cost_meter.units.text import fields, quoted

SHARED_CLASSES = OTHER_CLASSES
EXPECTED = "none, proportional, even, reserved:TENANT=PERCENT,... or owner:TENANT"
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%?\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class IdlePolicy:
    """How shared time is divided; `declared` has the declared fraction of each tenant."""

    text: str = "none"
    declared: Mapping[str, Fraction] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> "IdlePolicy":
        """Parse a policy; no text means `none`. Raises ValueError for text that is no policy."""
        name, colon, rest = (text or "none").partition(":")
        if name in ("none", "proportional", "even") and not colon:
            return cls(name)
        if name == "owner" and _is_tenant(rest):
            return cls(f"owner:{rest}", {rest: Fraction(1)})
        if name == "reserved" and rest:
            return cls(f"reserved:{rest}", _reserved(rest))
        raise ValueError(f"idle: expected {EXPECTED}, got {quoted(text)}")

    @property
    def name(self) -> str:
        """Return the policy's name without its tenants and percentages."""
        return self.text.partition(":")[0]

    def shares(self, used_ns: Mapping[str, int]) -> dict[str, Fraction]:
        """Return the part that each tenant carries; `used_ns` is the GPU time by tenant.

        If nobody used anything, `proportional` and `even` leave all time to its class.
        """
        users = {tenant: ns for tenant, ns in used_ns.items() if ns > 0}
        if self.name == "proportional":
            total_ns = sum(users.values())
            return {tenant: Fraction(ns, total_ns) for tenant, ns in users.items()}
        if self.name == "even":
            return dict.fromkeys(users, Fraction(1, max(len(users), 1)))
        return dict(self.declared)


def _reserved(text: str) -> dict[str, Fraction]:
    """Parse declared shares, such as alice=30,bob=12.5; a name with a comma is in quotes."""
    shares: dict[str, Fraction] = {}
    for each in fields(text):
        tenant, _, percent = each.rpartition("=")
        found = _PERCENT.match(percent.strip())
        if found is None or not _is_tenant(tenant):
            raise ValueError(f"idle: expected reserved:TENANT=PERCENT,..., got {quoted(each)}")
        if tenant in shares:
            raise ValueError(
                f"idle: expected each tenant once in reserved, got {quoted(tenant)} twice"
            )
        shares[tenant] = Fraction(found[1]) / 100
    if sum(shares.values()) > 1:
        percent = f"{float(sum(shares.values()) * 100):g}"
        raise ValueError(f"idle: expected reserved shares of at most 100 %, got {percent} %")
    return shares


def _is_tenant(name: str) -> bool:
    return bool(name) and not name.startswith("__")
