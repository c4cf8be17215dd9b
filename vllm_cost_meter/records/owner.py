"""The owner of a request: its tenant, the rule that named it, the parent and the tags.

`tenants/rules.py` finds the owner once, when the request comes. The owner then travels whole:
through the exchange, into every record of the request, to the budgets and to the ledger's rows. The
class lives here because records hold it, and records may not import `tenants`. A rule is a value
with a kind, so that no decision has to read its text.

`TenantScope` is the one rule for what "a tenant" covers. It goes by the parents that were recorded
with a request. A parent that is declared later changes no record, so no use moves from one tenant
to another after it was billed. `ledger/coverage.py` has the same rule in SQL.

Invariant: `rule_text` is the `tenant_rule` of the ledger and the answers; no code parses it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Self

# The tenant of a request that no rule names.
UNKNOWN = "unknown"
# The slash stands between a tenant and its child.
SLASH = "/"
# The child of a tenant whose request chose a child by what the meter did not read. No request can
# name it, because names that begin with underscores are reserved.
UNREAD = "__unread__"

# The client chooses the value of these rules itself, in its request.
ChildKind = Literal["user", "metadata", "lora", "model"]
CHILD_KINDS: tuple[ChildKind, ...] = ("user", "metadata", "lora", "model")
RuleKind = Literal["none", "contradiction", "api_key", "header", "constant"] | ChildKind


@dataclass(frozen=True, slots=True)
class NamedBy:
    """The rule that named a tenant or a child; `key` is a header's name or a metadata key."""

    kind: RuleKind
    key: str = ""

    @property
    def text(self) -> str:
        return f"{self.kind}:{self.key}" if self.key else self.kind


NO_RULE = NamedBy("none")

# What a tenant means: itself with all tenants below it, or itself alone.
Covers = Literal["with_children", "own"]
WITH_CHILDREN: Covers = "with_children"
OWN: Covers = "own"
COVERS: tuple[Covers, ...] = (WITH_CHILDREN, OWN)
# The same for people, after a tenant's name.
COVERS_TEXT: Mapping[Covers, str] = {
    WITH_CHILDREN: "with all tenants below it",
    OWN: "on its own",
}
# Stands between the names in `Owner.above_text`. No name contains it, because names are printable.
BETWEEN = "\n"


@dataclass(frozen=True, slots=True)
class TenantScope:
    """A tenant whose figures are meant: with all tenants below it, or on its own.

    Below `acme` are the tenants `acme/...`, and those that had `acme`, or one below it, above them
    when their request came.
    """

    tenant: str
    covers: Covers = WITH_CHILDREN

    def __post_init__(self) -> None:
        check_covers(self.covers)

    @property
    def text(self) -> str:
        """Return the tenant and what it covers, for people."""
        return f"{self.tenant} {COVERS_TEXT[self.covers]}"

    def includes(self, tenant: str, above: Iterable[str] = ()) -> bool:
        """Return whether figures of a tenant with these tenants above it are meant."""
        if tenant == self.tenant or self.covers == OWN:
            return tenant == self.tenant
        start = self.tenant + SLASH
        return any(name == self.tenant or name.startswith(start) for name in (tenant, *above))


@dataclass(frozen=True, slots=True)
class Owner:
    """A tenant, with the parent and tags that were declared when the request came.

    `child_rule` is the rule that chose the tenant's child; None if the tenant itself is the owner.
    `higher` are the tenants above the parent, the nearest first.
    """

    tenant: str
    rule: NamedBy = NO_RULE
    child_rule: NamedBy | None = None
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    higher: tuple[str, ...] = ()

    @classmethod
    def stored(cls, tenant: str, above: str | None, tags: str | None) -> Self:
        """Build an owner from a ledger row, with the fields that budgets need."""
        parent, *higher = _names(above) or (None,)
        return cls(tenant, parent=parent, tags=_tags(tags), higher=tuple(map(str, higher)))

    @property
    def above(self) -> tuple[str, ...]:
        """Return all tenants above this one, the nearest first."""
        return () if self.parent is None else (self.parent, *self.higher)

    @property
    def above_text(self) -> str | None:
        """Return `above` as the ledger keeps it: each name on a line of its own; None for none."""
        return "".join((BETWEEN, *(name + BETWEEN for name in self.above))) if self.above else None

    @property
    def rule_text(self) -> str:
        """Return the rule as the ledger and the answers show it, e.g. `api_key+user`."""
        rule = self.rule.text
        return rule if self.child_rule is None else f"{rule}+{self.child_rule.text}"

    @property
    def by_api_key(self) -> bool:
        """Return whether an API key proved the tenant, whatever child the client chose."""
        return self.rule.kind == "api_key"

    @property
    def is_clients_choice(self) -> bool:
        """Return whether the client chose the name or a part of it."""
        return (self.child_rule or self.rule).kind in CHILD_KINDS

    def may_be(self, tenant: str) -> bool:
        """Return whether this request may belong to a child that the meter did not read."""
        above = self.tenant.removesuffix(UNREAD)
        return above != self.tenant and tenant.startswith(above)


def check_covers(covers: str) -> None:
    """Raise ValueError unless the text says what a tenant covers."""
    if covers not in COVERS:
        raise ValueError(f"covers: expected {' or '.join(COVERS)}, got {covers!r:.200}")


# The owner of a request that no rule names.
NOBODY = Owner(UNKNOWN)
# The owner of a request that claims two tenants at once.
CONTRADICTION = Owner(UNKNOWN, NamedBy("contradiction"))


@lru_cache(maxsize=1_024)
def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name for name in (text or "").split(BETWEEN) if name)


# Ledger rows repeat the tags of a few tenants, so the parsed mapping is shared. Nobody changes it.
@lru_cache(maxsize=1_024)
def _tags(text: str | None) -> Mapping[str, str]:
    tags: dict[str, str] = json.loads(text) if text else {}
    return tags
