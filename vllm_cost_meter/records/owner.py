"""Whose a request is: the tenant, the rule that named it, its parent and its tags.

An owner is found once, when the request comes, and then travels whole: through the exchange, into
every record of the request, to the budgets and to the ledger's rows. It lives here, below `tenants`
which finds it (`tenants/rules.py`), because the records hold it and records stand on the floor
below tenants. The rule is a value with a kind, so that no decision reads its text.

Invariant: `rule_text` is what the ledger and the answers call `tenant_rule`; nothing parses it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Self

# The tenant that no rule named.
UNKNOWN = "unknown"

# A client chooses these itself, by what it writes into its request.
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
    """A tenant, and what was declared of it when the request came.

    `child_rule` is the rule that chose the tenant's child, None where the tenant itself is meant.
    """

    tenant: str
    rule: NamedBy = NO_RULE
    child_rule: NamedBy | None = None
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def stored(cls, tenant: str, parent: str | None, tags: str | None) -> Self:
        """Return the owner that a row of the ledger names, as far as budgets ask."""
        return cls(tenant, parent=parent, tags=_tags(tags))

    @property
    def rule_text(self) -> str:
        """Return the rule as the ledger and the answers show it, e.g. `api_key+user`."""
        rule = self.rule.text
        return rule if self.child_rule is None else f"{rule}+{self.child_rule.text}"

    @property
    def by_api_key(self) -> bool:
        """Tell whether an API key proved who asks, whatever child the client chose."""
        return self.rule.kind == "api_key"

    @property
    def is_clients_choice(self) -> bool:
        """Tell whether the client chose the name or a part of it."""
        return (self.child_rule or self.rule).kind in CHILD_KINDS


# No rule named a tenant.
NOBODY = Owner(UNKNOWN)
# A request that claims to be two at once.
CONTRADICTION = Owner(UNKNOWN, NamedBy("contradiction"))


# The rows of a ledger repeat the tags of a few tenants. The mapping is shared and never changed.
@lru_cache(maxsize=1_024)
def _tags(text: str | None) -> Mapping[str, str]:
    tags: dict[str, str] = json.loads(text) if text else {}
    return tags
