"""The owner of a request: its tenant, the rule that named it, the parent and the tags.

`tenants/rules.py` finds the owner once, when the request comes. The owner then travels whole:
through the exchange, into every record of the request, to the budgets and to the ledger's rows. The
class lives here because records hold it, and records may not import `tenants`. A rule is a value
with a kind, so that no decision has to read its text.

Invariant: `rule_text` is the `tenant_rule` of the ledger and the answers; no code parses it.
"""

import json
from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class Owner:
    """A tenant, with the parent and tags that were declared when the request came.

    `child_rule` is the rule that chose the tenant's child; None if the tenant itself is the owner.
    """

    tenant: str
    rule: NamedBy = NO_RULE
    child_rule: NamedBy | None = None
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def stored(cls, tenant: str, parent: str | None, tags: str | None) -> Self:
        """Build an owner from a ledger row, with the fields that budgets need."""
        return cls(tenant, parent=parent, tags=_tags(tags))

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


# The owner of a request that no rule names.
NOBODY = Owner(UNKNOWN)
# The owner of a request that claims two tenants at once.
CONTRADICTION = Owner(UNKNOWN, NamedBy("contradiction"))


# Ledger rows repeat the tags of a few tenants, so the parsed mapping is shared. Nobody changes it.
@lru_cache(maxsize=1_024)
def _tags(text: str | None) -> Mapping[str, str]:
    tags: dict[str, str] = json.loads(text) if text else {}
    return tags
