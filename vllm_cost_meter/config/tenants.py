"""Tenant settings: `[[tenants]]` and `[[tenant_rules]]`, and the resolver that they declare.

The checks here cover all entries together: unique names and keys, declared parents, no circle.

Invariant: `resolver_of` gets only checked settings, and never fails.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from vllm_cost_meter.config import types as t
from vllm_cost_meter.records.owner import SLASH, UNKNOWN
from vllm_cost_meter.tenants.rules import (
    PROOF_HEADER,
    ApiKeyRule,
    Believed,
    ChildRule,
    ConstantRule,
    DeclaredTenant,
    HeaderChildRule,
    HeaderRule,
    HeaderTagRule,
    Resolver,
    Rule,
)

HASH_CHARS_SHOWN = 8


class TenantSetting(BaseModel):
    """One `[[tenants]]` entry: a tenant's API keys, and how reports group it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: t.TenantName = Field(
        description="Name of the tenant in bills and reports; unique. A slash only in "
        "`PARENT/CHILD`, of a parent that is declared too.",
        json_schema_extra=t.about(
            "1 to 128 printable characters, not `unknown` or `other`, not starting with `__`"
        ),
    )
    api_key_sha256: tuple[t.Digest, ...] = Field(
        default=(),
        repr=False,
        description="SHA-256 of each of the tenant's API keys; a key belongs to one tenant.",
        json_schema_extra=t.about(f"a list, each {t.SHA256}", secret=True),
    )
    parent: t.TenantName | None = Field(
        default=None,
        description="The tenant that this one belongs to.",
        json_schema_extra=t.about("the name of a declared tenant"),
    )
    tags: t.Tags = Field(
        default={},
        description="What reports group by: cost centre, R&D or COGS, anything. A tenant has its "
        "parent's tags too, where it does not set them itself.",
        json_schema_extra=t.about(t.TAGS),
    )
    fail_closed: bool = Field(
        default=False,
        description="Whether requests of this tenant and all below it are refused (503) while the "
        "meter cannot measure what their budgets count.",
        json_schema_extra=t.about("true or false"),
    )
    reply: t.ReplyDetail | None = Field(
        default=None,
        description="What this tenant's clients are told; without it what its parent says, else "
        "`reply`.",
        json_schema_extra=t.about(t.REPLY),
    )

    @property
    def owner(self) -> str | None:
        """The parent's name: the `parent` setting, else the part before the slash in the name."""
        return self.parent or self.name.rpartition(SLASH)[0] or None


class RuleSetting(BaseModel):
    """One `[[tenant_rules]]` entry: a way to find a request's tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["api_key", "header", "user", "metadata", "lora", "model", "constant"] = Field(
        description="What names the tenant (`api_key`, `header`, `constant`) or chooses a child of "
        "the tenant found (the others, and a header that `names` one).",
        json_schema_extra=t.about("api_key, header, user, metadata, lora, model or constant"),
    )
    name: t.HeaderName | None = Field(
        default=None,
        description="`header`: the header that carries the name.",
        json_schema_extra=t.about(t.HEADER),
    )
    names: Literal["tenant", "child", "tag"] = Field(
        default="tenant",
        description="`header`: what its value is: a tenant, a child of the tenant found, or the "
        "value of a `tag`.",
        json_schema_extra=t.about("tenant, child or tag"),
    )
    tag: t.TagKey | None = Field(
        default=None,
        description='`header` with `names = "tag"`: the key of the tag. A tag that the tenant '
        "declares stays as declared.",
        json_schema_extra=t.about(t.TAG_KEY),
    )
    proof_sha256: t.Digest | None = Field(
        default=None,
        repr=False,
        description="`header`: SHA-256 of the secret by which the gateway proves itself; without "
        "it that of `gateway_secret`.",
        json_schema_extra=t.about(t.SHA256, secret=True),
    )
    proof_header: t.HeaderName = Field(
        default=PROOF_HEADER,
        description="`header`: the header in which the gateway sends that secret.",
        json_schema_extra=t.about(t.HEADER),
    )
    trust: Literal["everyone"] | None = Field(
        default=None,
        description="`header`: believe the header from everyone, without a proof.",
        json_schema_extra=t.about("everyone"),
    )
    key: t.MetadataKey | None = Field(
        default=None,
        description="`metadata`: the key of the body's `metadata`.",
        json_schema_extra=t.about(t.METADATA_KEY),
    )
    trust_clients: bool = Field(
        default=False,
        strict=True,
        description="`user`, `metadata`, `lora`, `model`: where no rule before it found a tenant, "
        "name one below `unknown`, as `unknown/NAME`.",
        json_schema_extra=t.about("true or false"),
    )
    tenant: t.TenantName | None = Field(
        default=None,
        description="`constant`: the tenant.",
        json_schema_extra=t.about("the name of a tenant"),
    )
    id: t.EntryId | None = Field(
        default=None,
        description=t.ENTRY_ID_IS,
        json_schema_extra=t.about(t.ENTRY_ID),
    )

    @model_validator(mode="after")
    def _only_what_belongs_to_it(self) -> Self:
        for name in sorted(self.model_fields_set - {"id", "rule"} - _TAKES[self.rule]):
            raise t.WrongError(f"no `{name}` in a rule {self.rule!r}", "a value")
        if (needed := _NEEDS.get(self.rule)) and getattr(self, needed) is None:
            raise t.WrongError(f"`{needed}` in a rule {self.rule!r}", "nothing")
        if (self.names == "tag") != (self.tag is not None):
            raise t.WrongError('`tag` where `names = "tag"`, and only there', "one of them")
        if self.trust is not None and self.proof_sha256 is not None:
            raise t.WrongError("`proof_sha256` or `trust` in a rule 'header'", "both")
        return self


_TAKES: Mapping[str, set[str]] = {
    "api_key": set(),
    "header": {"name", "names", "tag", "proof_sha256", "proof_header", "trust"},
    "user": {"trust_clients"},
    "metadata": {"key", "trust_clients"},
    "lora": {"trust_clients"},
    "model": {"trust_clients"},
    "constant": {"tenant"},
}
_NEEDS: Mapping[str, str] = {"header": "name", "metadata": "key", "constant": "tenant"}
# Without rules in the settings, only API keys name tenants.
_BY_DEFAULT = (RuleSetting(rule="api_key"),)


# -- checks over all entries --------------------------------------------------------------------


def check_tenants(tenants: Sequence[TenantSetting]) -> None:
    """Raise WrongError unless names and keys are unique, parents declared, and without a circle."""
    owners: dict[str, str] = {}
    parents: dict[str, str | None] = {}
    for tenant in tenants:
        if tenant.name in parents:
            raise t.WrongError("each tenant's name once", f"{tenant.name!r} twice")
        parents[tenant.name] = tenant.owner
        for digest in tenant.api_key_sha256:
            if (owner := owners.setdefault(digest, tenant.name)) != tenant.name:
                short = f"{digest[:HASH_CHARS_SHOWN]}..."
                got = f"{short} at {owner!r} and {tenant.name!r}"
                raise t.WrongError("each api_key_sha256 at one tenant", got)
    for tenant in tenants:
        _check_parent(tenant, parents)
    _check_no_circle(parents)


def _check_parent(tenant: TenantSetting, parents: Mapping[str, str | None]) -> None:
    before, slash, child = tenant.name.rpartition(SLASH)
    if slash and (before not in parents or not child or child != child.strip()):
        raise t.WrongError("a slash only in PARENT/CHILD of a declared parent", repr(tenant.name))
    if tenant.owner is not None and tenant.owner not in parents:
        got = f"{tenant.owner!r} of {tenant.name!r}"
        raise t.WrongError("each parent to be a declared tenant", got)
    if slash and tenant.owner != before:
        got = f"{tenant.owner!r} of {tenant.name!r}"
        raise t.WrongError("the same parent as in the name PARENT/CHILD", got)


def _check_no_circle(parents: Mapping[str, str | None]) -> None:
    good: set[str] = set()
    for name in parents:
        chain: dict[str, None] = {}
        at: str | None = name
        while at is not None and at not in good:
            if at in chain:
                raise t.WrongError("parents without a circle", f"{at!r} above itself")
            chain[at] = None
            at = parents[at]
        good.update(chain)


def check_rules(
    rules: Sequence[RuleSetting], tenants: Iterable[TenantSetting], secret: SecretStr | None
) -> None:
    """Raise WrongError unless every rule has what it needs: a proof, a header, a known tenant."""
    names = {tenant.name for tenant in tenants}
    proofs = {rule.proof_header for rule in rules if rule.rule == "header" and rule.trust is None}
    for rule in rules:
        if rule.rule == "header":
            if rule.trust is None and rule.proof_sha256 is None and secret is None:
                raise t.WrongError(
                    '`proof_sha256`, `trust = "everyone"` or COST_METER_GATEWAY_SECRET for the'
                    f" header {rule.name!r}",
                    "none of them",
                )
            if rule.name in proofs:  # The secret would become a name in the ledger.
                raise t.WrongError("one header for the tenant, another for the proof", "one")
        elif rule.tenant is not None and SLASH in rule.tenant and rule.tenant not in names:
            got = repr(rule.tenant)
            raise t.WrongError("a declared tenant, because the name has a slash", got)


def check_secrets(
    admin_sha256: str | None,
    rules: Iterable[RuleSetting],
    tenants: Iterable[TenantSetting],
    secret: SecretStr | None,
) -> None:
    """Raise WrongError if two parties would have one secret: admin, gateway, a tenant.

    A tenant with the admin token would see all tenants' figures, and with the gateway's secret it
    could name any tenant.
    """
    keys = keys_of(tenants)
    proofs = {rule.proof_sha256 for rule in rules if rule.proof_sha256 is not None}
    if secret is not None:
        proofs.add(digest_of(secret))
    if admin_sha256 in proofs:
        raise t.WrongError("an admin token other than the gateway's secret", "the same")
    if admin_sha256 in keys:
        got = f"the same as a key of {keys[admin_sha256]!r}"
        raise t.WrongError("an admin token other than every API key", got)
    for proof in proofs & keys.keys():
        got = f"the same as a key of {keys[proof]!r}"
        raise t.WrongError("a gateway's secret other than every API key", got)


def digest_of(secret: SecretStr) -> str:
    """Return the lower-case hexadecimal SHA-256 of a secret."""
    return hashlib.sha256(secret.get_secret_value().encode()).hexdigest()


def can_be_named(name: str, tenants: Iterable[TenantSetting], rules: Sequence[RuleSetting]) -> bool:
    """Tell whether a request can be of this tenant: by its declaration, or by any rule."""
    if name == UNKNOWN or any(tenant.name == name for tenant in tenants):
        return True
    if any(rule.rule == "constant" and rule.tenant == name for rule in rules):
        return True
    parent, slash, _ = name.rpartition(SLASH)
    if slash:
        choose = any(rule.rule not in ("api_key", "constant") for rule in rules)
        return choose and can_be_named(parent, tenants, rules)
    return any(rule.rule == "header" or rule.trust_clients for rule in rules)


# -- values derived from the entries ------------------------------------------------------------


def resolver_of(
    rules: Sequence[RuleSetting], tenants: Sequence[TenantSetting], secret: SecretStr | None
) -> Resolver:
    """Return the resolver that finds a request's tenant by these rules, in their order."""
    declared = declared_of(tenants)
    return Resolver(
        [_rule(rule, tenants, declared, secret) for rule in rules or _BY_DEFAULT], declared
    )


def _rule(
    rule: RuleSetting,
    tenants: Iterable[TenantSetting],
    declared: Mapping[str, DeclaredTenant],
    secret: SecretStr | None,
) -> Rule:
    if rule.rule == "api_key":
        return ApiKeyRule(keys_of(tenants))
    if rule.rule == "header":
        header = _believed(rule, secret)
        if rule.names == "child":
            return HeaderChildRule(header)
        if rule.tag is not None:
            return HeaderTagRule(header, rule.tag)
        return HeaderRule(header, paths=frozenset(name for name in declared if SLASH in name))
    if rule.rule == "constant":
        return ConstantRule(str(rule.tenant))
    return ChildRule(rule.rule, rule.key or "", rule.trust_clients)


def _believed(rule: RuleSetting, secret: SecretStr | None) -> Believed:
    known = SecretStr("") if secret is None else secret
    return Believed(
        str(rule.name),
        rule.proof_sha256 or digest_of(known),
        rule.proof_header,
        trusts_everyone=rule.trust is not None,
    )


def keys_of(tenants: Iterable[TenantSetting]) -> dict[str, str]:
    """Return tenant names by the SHA-256 of their API keys."""
    return {digest: tenant.name for tenant in tenants for digest in tenant.api_key_sha256}


def declared_of(tenants: Iterable[TenantSetting]) -> dict[str, DeclaredTenant]:
    """Return each tenant's declared parents and tags; tags include its parents' tags."""
    return {
        chain[0].name: DeclaredTenant(
            chain[0].owner, _tags_of(chain), tuple(each.name for each in chain[2:])
        )
        for chain in _chains(tenants)
    }


def above(declared: Mapping[str, DeclaredTenant], name: str) -> tuple[str, ...]:
    """Return the tenants that are above this one by the settings, the nearest first."""
    if name in declared:
        return declared[name].above
    parent, slash, _ = name.rpartition(SLASH)
    return (parent, *above(declared, parent)) if slash else ()


def failing_closed(tenants: Iterable[TenantSetting]) -> frozenset[str]:
    """Return the declared tenants that fail closed, or are below a tenant that does."""
    return frozenset(
        one[0].name for one in _chains(tenants) if any(each.fail_closed for each in one)
    )


def replies_of(
    tenants: Iterable[TenantSetting], otherwise: t.ReplyDetail
) -> dict[str, t.ReplyDetail]:
    """Return, by declared tenant, what its clients are told."""
    return {
        chain[0].name: next((one.reply for one in chain if one.reply), otherwise)
        for chain in _chains(tenants)
    }


def _chains(tenants: Iterable[TenantSetting]) -> Iterable[list[TenantSetting]]:
    """Yield each tenant followed by all tenants above it."""
    by_name = {tenant.name: tenant for tenant in tenants}
    for tenant in by_name.values():
        chain, above = [tenant], tenant.owner
        while above is not None:
            chain.append(by_name[above])
            above = chain[-1].owner
        yield chain


def _tags_of(chain: Sequence[TenantSetting]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for tenant in reversed(chain):
        tags |= tenant.tags
    return dict(sorted(tags.items()))
