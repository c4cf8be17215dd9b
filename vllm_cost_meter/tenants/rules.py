"""Whose request it is: ordered rules from what an HTTP request says to a tenant.

Each rule is small and pure. Identity rules (API key, header, constant) are asked in the order of
the list, and the first that answers names the tenant. Child rules (`user`, `metadata`, `lora`,
`model`) read what the client itself wrote, so they only choose a child `tenant/child` of the tenant
found, again the first that answers; where the operator trusts clients, such a rule names a tenant
outright if none was found before it in the list. What no rule names is `unknown`.

Why so strict: whoever can make the meter bill another tenant steals from them. An API key names its
tenant by its SHA-256, so that the settings never hold a key. A header is believed from the gateway
only, and a peer's address proves no gateway (uvicorn takes it from X-Forwarded-For): a shared
secret does. Two different values of a header mean that someone between client and server disagrees
about who is asking, so neither is taken, and no other rule is asked. A comma in a claim is refused
for the same reason: proxies join repeated headers with one. A slash belongs to children, so that no
name that a request supplies can reach into another tenant.

Invariant: the tenant is a name from the rules, or printable ASCII of at most 128 characters from a
believed header or a trusted client, or a child of one of these, or `unknown`; never a reserved name
that the request itself supplied. A client never becomes a declared tenant that is not its own or a
child of its own.
"""

import hashlib
import hmac
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vllm_cost_meter.records.owner import (
    CONTRADICTION,
    NOBODY,
    UNKNOWN,
    ChildKind,
    NamedBy,
    Owner,
)

# Reports and metrics say it of many small tenants together.
OTHER = "other"
NAME_CHARS_MAX = 128
# No sane key is longer; hashing more would be work done for a stranger.
CREDENTIAL_BYTES_MAX = 8_192
PROOF_HEADER = "x-cost-meter-gateway-secret"
# Between a tenant and its child.
SLASH = "/"

_AUTHORIZATION, _API_KEY = b"authorization", b"x-api-key"


@dataclass(frozen=True, slots=True)
class BodyClaims:
    """What the body of a request says; None where it says nothing, or nothing that is a text.

    `model` is a name under which the server serves its model, `lora` any other name it was asked
    for, which then is an adapter's (or a request that vLLM refuses).
    """

    user: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    lora: str | None = None
    model: str | None = None


NO_CLAIMS = BodyClaims()


@dataclass(frozen=True, slots=True)
class DeclaredTenant:
    """What the operator declared of a tenant, and it has from its parents."""

    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class ContradictionError(Exception):
    """A request that claims to be two at once. Never leaves this module."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says: the one value of each header that a rule looks at, and its body."""

    headers: Mapping[bytes, bytes]
    body: BodyClaims


def is_reserved(name: str) -> bool:
    """Tell whether a name belongs to the meter: `unknown`, `other`, and all of `__...`."""
    return name.startswith("__") or name.casefold() in (UNKNOWN, OTHER)


def name_problem(name: str) -> str | None:
    """Return what a declared tenant name was expected to be, or None if it is good."""
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        return f"1 to {NAME_CHARS_MAX} characters"
    if not name.isprintable() or name != name.strip():
        return "printable characters without spaces at the ends"
    if is_reserved(name):
        return f"a name other than {UNKNOWN!r} and {OTHER!r} and not starting with '__'"
    return None


# -- the rules: `named_by` goes into the owner, `headers` are those a rule looks at --------------


@dataclass(frozen=True, slots=True)
class ApiKeyRule:
    """The tenant whose API key the request carries; tenants by lower-case hex SHA-256 of a key."""

    by_sha256: Mapping[str, str]
    named_by: ClassVar = NamedBy("api_key")
    headers: ClassVar = (_AUTHORIZATION, _API_KEY)

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant, None if there is no known key. Raises ContradictionError at two."""
        credentials = {
            asked.headers.get(_API_KEY, b""),
            _bearer(asked.headers.get(_AUTHORIZATION, b"")),
        }
        digests = (digest for key in credentials if (digest := sha256_of(key)) is not None)
        tenants = {self.by_sha256[digest] for digest in digests if digest in self.by_sha256}
        if len(tenants) > 1:
            raise ContradictionError
        return next(iter(tenants), None)


@dataclass(frozen=True, slots=True)
class HeaderRule:
    """The tenant that a header names: from a gateway that sends its secret, or from everyone.

    `paths` are the names with a slash that may be claimed: those that are declared.
    """

    name: str
    proof_sha256: str = ""
    proof_header: str = PROOF_HEADER
    trusts_everyone: bool = False
    paths: Container[str] = frozenset()

    @property
    def named_by(self) -> NamedBy:
        return NamedBy("header", self.name)

    @property
    def headers(self) -> tuple[bytes, ...]:
        name, proof = self.name.encode(), self.proof_header.encode()
        return (name,) if self.trusts_everyone else (name, proof)

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant claimed, None if it may not be believed or is no name."""
        claim = _plain_name(asked.headers.get(self.name.encode(), b""))
        if claim is None or (SLASH in claim and claim not in self.paths):
            return None
        return claim if self.trusts_everyone or self._is_proven(asked) else None

    def _is_proven(self, asked: Asked) -> bool:
        proof = sha256_of(asked.headers.get(self.proof_header.encode(), b""))
        return proof is not None and hmac.compare_digest(proof, self.proof_sha256)


@dataclass(frozen=True, slots=True)
class ConstantRule:
    """One tenant for whatever no rule before it has named."""

    constant: str
    named_by: ClassVar = NamedBy("constant")
    headers: ClassVar[tuple[bytes, ...]] = ()

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant."""
        return self.constant


@dataclass(frozen=True, slots=True)
class ChildRule:
    """A child of the tenant found, by what the client wrote into its request.

    `key` is that of `metadata`. `taken` is None unless clients are trusted to name a tenant; then
    it holds the names, case-folded, that they may not take all the same: those that are declared.
    """

    kind: ChildKind
    key: str = ""
    taken: Container[str] | None = None
    headers: ClassVar[tuple[bytes, ...]] = ()

    @property
    def named_by(self) -> NamedBy:
        return NamedBy(self.kind, self.key)

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant named outright, None where clients are not trusted with that."""
        if self.taken is None:
            return None
        name = self.child(asked)
        return None if name is None or name.casefold() in self.taken else name

    def child(self, asked: Asked) -> str | None:
        """Return the child's own name, None if the request has none that is good."""
        body = asked.body
        said = body.metadata.get(self.key) if self.kind == "metadata" else getattr(body, self.kind)
        if not isinstance(said, str) or len(said) > NAME_CHARS_MAX or not said.isascii():
            return None
        if self.kind in ("lora", "model"):  # names of the operator's, most of them with a slash
            said = said.replace(SLASH, "--")
        name = _plain_name(said.encode())
        return None if name is None or SLASH in name or name != name.strip() else name


Rule = ApiKeyRule | HeaderRule | ConstantRule | ChildRule


class Resolver:
    """The rules in their order, and what is declared of tenants. Never changed."""

    def __init__(self, rules: Sequence[Rule], declared: Mapping[str, DeclaredTenant]) -> None:
        self.rules = tuple(rules)
        self.declared = declared
        self._children = tuple(rule for rule in rules if isinstance(rule, ChildRule))
        self._watched = frozenset(header for rule in rules for header in rule.headers)

    @property
    def reads_body(self) -> bool:
        """True if a rule wants to know what the body of a request says."""
        return bool(self._children)

    def resolve(
        self, headers: Iterable[tuple[bytes, bytes]], body: BodyClaims = NO_CLAIMS
    ) -> Owner:
        """Return the owner of a request with these (ASGI) headers and this body. Never raises."""
        try:
            asked = Asked(self._said(headers), body)
            for rule in self.rules:
                if (tenant := rule.tenant(asked)) is not None:
                    return self._child(asked, tenant, rule)
        except ContradictionError:
            return CONTRADICTION
        return NOBODY

    def _said(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
        """Return the one value of each header looked at. Raises ContradictionError at two."""
        said: dict[bytes, bytes] = {}
        for raw_name, raw_value in headers:
            name = raw_name.lower()
            if name in self._watched:
                value = raw_value.strip()
                if said.setdefault(name, value) != value:
                    raise ContradictionError
        return said

    def _child(self, asked: Asked, tenant: str, by: Rule) -> Owner:
        """Return the tenant's child that a rule chooses, else the tenant itself."""
        for rule in self._children:
            child = None if rule is by else rule.child(asked)
            if child is not None and len(tenant) + 1 + len(child) <= NAME_CHARS_MAX:
                return self._owner(f"{tenant}{SLASH}{child}", by.named_by, rule.named_by)
        return self._owner(tenant, by.named_by)

    def _owner(self, tenant: str, rule: NamedBy, child_rule: NamedBy | None = None) -> Owner:
        declared = self.declared.get(tenant)
        if declared is None:
            parent = tenant.rpartition(SLASH)[0] or None
            tags = self.declared.get(parent or "", _UNDECLARED).tags
            return Owner(tenant, rule, child_rule, parent, tags)
        return Owner(tenant, rule, child_rule, declared.parent, declared.tags)


_UNDECLARED = DeclaredTenant()


def sha256_of(credential: bytes) -> str | None:
    """Return the lower-case hex SHA-256 of a key or secret; None of an empty or a huge one."""
    if not 0 < len(credential) <= CREDENTIAL_BYTES_MAX:
        return None
    # Keys are then looked up in a dict, not compared in constant time: what the lookup's timing
    # could leak is a prefix of the key's SHA-256, which nobody can steer towards a wanted value
    # without inverting SHA-256. And this names a tenant; admission is vLLM's own --api-key check.
    return hashlib.sha256(credential).hexdigest()


def _bearer(authorization: bytes) -> bytes:
    scheme, _, credential = authorization.partition(b" ")
    return credential.strip() if scheme.lower() == b"bearer" else b""


def _plain_name(claim: bytes) -> str | None:
    """Return a claim as a name; None unless it is printable ASCII, short and not reserved."""
    if not 1 <= len(claim) <= NAME_CHARS_MAX or b"," in claim or not claim.isascii():
        return None
    name = claim.decode("ascii")
    return None if is_reserved(name) or not name.isprintable() else name
