"""Tenant rules: find the tenant of an HTTP request from its headers and body.

Each rule is small and pure. Identity rules (API key, header, constant) are asked in order, and the
first answer names the tenant. Child rules (`user`, `metadata`, `lora`, `model`) read values that
the client wrote. So they only choose a child `tenant/child` of the tenant found; again the first
answer counts. If the operator trusts clients, a child rule may also name the tenant itself, unless
a rule before it did. If no rule answers, the tenant is `unknown`.

The rules are strict because whoever can make the meter bill another tenant steals from it:

- An API key names its tenant by its SHA-256, so that the settings never hold a key.
- A header is believed only from the gateway, which proves itself by a shared secret. Its address
  proves nothing, because uvicorn takes that from X-Forwarded-For.
- Two different values of one header mean that client and server, or a proxy between them, disagree
  about who is asking. Neither value is taken, and no other rule is asked.
- A comma in a claim is refused for the same reason: proxies join repeated headers with commas.
- A slash separates children, so no name that a request supplies can reach into another tenant.

Invariant: the tenant is a name from the rules, or printable ASCII of at most 128 characters from a
believed header or a trusted client, or a child of one of these, or `unknown`. It is never a
reserved name that the request itself supplied. A client never becomes a declared tenant that is not
its own or a child of its own.
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

# Reports and metrics group many small tenants under this name.
OTHER = "other"
NAME_CHARS_MAX = 128
# Real keys are shorter. We do not spend time on hashing more for a stranger.
CREDENTIAL_BYTES_MAX = 8_192
PROOF_HEADER = "x-cost-meter-gateway-secret"
# The slash stands between a tenant and its child.
SLASH = "/"

_AUTHORIZATION, _API_KEY = b"authorization", b"x-api-key"


@dataclass(frozen=True, slots=True)
class BodyClaims:
    """The fields of a request's body that rules may use; None if missing or not a text.

    `model` is set if the request asks for the served model by one of its names. Any other name is
    taken for a LoRA adapter and stands in `lora`; vLLM refuses the request if there is none.
    """

    user: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    lora: str | None = None
    model: str | None = None


NO_CLAIMS = BodyClaims()


@dataclass(frozen=True, slots=True)
class DeclaredTenant:
    """The parent and tags that the operator declared for a tenant, inherited tags included."""

    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class ContradictionError(Exception):
    """A request claims two tenants at once. This error never leaves the module."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of a request that rules read: one value per watched header, and the body claims."""

    headers: Mapping[bytes, bytes]
    body: BodyClaims


def is_reserved(name: str) -> bool:
    """Return whether a name is reserved: `unknown`, `other`, or a name that starts with `__`."""
    return name.startswith("__") or name.casefold() in (UNKNOWN, OTHER)


def name_problem(name: str) -> str | None:
    """Return what a declared tenant name should have been; None if the name is good."""
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
    """Names the tenant by the request's API key; `by_sha256` has lower-case hex SHA-256 of keys."""

    by_sha256: Mapping[str, str]
    named_by: ClassVar = NamedBy("api_key")
    headers: ClassVar = (_AUTHORIZATION, _API_KEY)

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant of the key; None without a known key.

        Raises ContradictionError for the keys of two tenants.
        """
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
    """Names the tenant by a header, from a gateway that sends its secret or from everyone.

    `paths` are the declared names with a slash. A header may claim only these names with a slash.
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
        """Return the claimed tenant; None if the claim is not believed or not a valid name."""
        claim = _plain_name(asked.headers.get(self.name.encode(), b""))
        if claim is None or (SLASH in claim and claim not in self.paths):
            return None
        return claim if self.trusts_everyone or self._is_proven(asked) else None

    def _is_proven(self, asked: Asked) -> bool:
        proof = sha256_of(asked.headers.get(self.proof_header.encode(), b""))
        return proof is not None and hmac.compare_digest(proof, self.proof_sha256)


@dataclass(frozen=True, slots=True)
class ConstantRule:
    """Names one fixed tenant for every request that no earlier rule named."""

    constant: str
    named_by: ClassVar = NamedBy("constant")
    headers: ClassVar[tuple[bytes, ...]] = ()

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant."""
        return self.constant


@dataclass(frozen=True, slots=True)
class ChildRule:
    """Chooses a child of the tenant by a value that the client wrote into its request.

    `key` is a key of `metadata`. `taken` is None unless clients are trusted to name a tenant. It
    then holds the declared tenant names, case-folded, which a client still must not take.
    """

    kind: ChildKind
    key: str = ""
    taken: Container[str] | None = None
    headers: ClassVar[tuple[bytes, ...]] = ()

    @property
    def named_by(self) -> NamedBy:
        return NamedBy(self.kind, self.key)

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant that a trusted client names; None if clients are not trusted."""
        if self.taken is None:
            return None
        name = self.child(asked)
        return None if name is None or name.casefold() in self.taken else name

    def child(self, asked: Asked) -> str | None:
        """Return the child's own name; None if the request has no valid one."""
        body = asked.body
        said = body.metadata.get(self.key) if self.kind == "metadata" else getattr(body, self.kind)
        if not isinstance(said, str) or len(said) > NAME_CHARS_MAX or not said.isascii():
            return None
        if self.kind in ("lora", "model"):  # The operator's model names mostly have a slash.
            said = said.replace(SLASH, "--")
        name = _plain_name(said.encode())
        return None if name is None or SLASH in name or name != name.strip() else name


Rule = ApiKeyRule | HeaderRule | ConstantRule | ChildRule


class Resolver:
    """Finds the owner of a request by ordered rules and declared tenants. Immutable."""

    def __init__(self, rules: Sequence[Rule], declared: Mapping[str, DeclaredTenant]) -> None:
        self.rules = tuple(rules)
        self.declared = declared
        self._children = tuple(rule for rule in rules if isinstance(rule, ChildRule))
        self._watched = frozenset(header for rule in rules for header in rule.headers)

    @property
    def reads_body(self) -> bool:
        """True if a rule needs the body of a request."""
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
        """Return the one value of each watched header. Raises ContradictionError for two values."""
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
    """Return the lower-case hex SHA-256 of a key or secret; None for an empty or a huge one."""
    if not 0 < len(credential) <= CREDENTIAL_BYTES_MAX:
        return None
    # Hashes are looked up in a dict, not compared in constant time. The timing could leak only a
    # prefix of the hash, and nobody can make a key for a wanted prefix without inverting SHA-256.
    # Also, this only names a tenant; vLLM's own --api-key check decides who may use the server.
    return hashlib.sha256(credential).hexdigest()


def _bearer(authorization: bytes) -> bytes:
    scheme, _, credential = authorization.partition(b" ")
    return credential.strip() if scheme.lower() == b"bearer" else b""


def _plain_name(claim: bytes) -> str | None:
    """Return a claim as a name; None unless it is printable ASCII, short, and not reserved."""
    if not 1 <= len(claim) <= NAME_CHARS_MAX or b"," in claim or not claim.isascii():
        return None
    name = claim.decode("ascii")
    return None if is_reserved(name) or not name.isprintable() else name
