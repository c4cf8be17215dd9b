"""Tenant rules: find the tenant of an HTTP request from its headers and body.

Each rule is small and pure. Identity rules (API key, header, constant) are asked in order, and the
first answer names the tenant. Child rules (`user`, `metadata`, `lora`, `model`, a header with
`names = "child"`) choose a child `tenant/child` of the tenant found; again the first answer counts.
A header with `names = "tag"` adds a tag. If no rule answers, the tenant is `unknown`. If the
operator trusts clients, a body rule may then name a tenant below `unknown`.

The rules are strict because whoever can make the meter bill another tenant steals from it:

- An API key names its tenant by its SHA-256, so that the settings never hold a key.
- A header is believed only from the gateway, which proves itself by a shared secret. Its address
  proves nothing, because uvicorn takes that from X-Forwarded-For.
- Where vLLM checks keys, it admits a request by its first `Authorization`. If that key names a
  tenant, this tenant pays, whatever else the request says.
- Otherwise all credentials that a rule believes must agree. If they name different tenants, client
  and server, or a proxy between them, disagree about who is asking. We take no side, and ask no
  other rule. A value that names nobody is no credential, and voids nothing.
- Proxies join repeated headers with commas, so a header's value is a list of claims.
- A slash separates children, so no name that a request supplies can reach into another tenant.
- A child that was chosen by what we cannot read is `UNREAD`. It counts against the budgets of every
  child that it may be.

Invariant: the tenant is a name from the rules, or printable ASCII of at most 128 characters from a
believed header, or a child of one of these, or `unknown` or below it. It is never a reserved name
that the request itself supplied. A client never becomes a tenant that is not its own or a child of
its own.
"""

import hashlib
import hmac
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from vllm_cost_meter.records.owner import (
    CONTRADICTION,
    NOBODY,
    SLASH,
    UNKNOWN,
    UNREAD,
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

_AUTHORIZATION, _API_KEY = "authorization", "x-api-key"


@dataclass(frozen=True, slots=True)
class BodyClaims:
    """The fields of a request's body that rules may use; None if missing or not a text.

    `model` is set if the request asks for the served model. Any other name is taken for a LoRA
    adapter and stands in `lora`; vLLM refuses the request if there is none. `unread` names the
    fields that vLLM may find in the request and we did not read.
    """

    user: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    lora: str | None = None
    model: str | None = None
    unread: Collection[ChildKind] = frozenset()


NO_CLAIMS = BodyClaims()


@dataclass(frozen=True, slots=True)
class DeclaredTenant:
    """The parent and tags that the operator declared for a tenant, inherited tags included.

    `higher` are the tenants above the parent, the nearest first.
    """

    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    higher: tuple[str, ...] = ()

    @property
    def above(self) -> tuple[str, ...]:
        """Return all tenants above this one, the nearest first."""
        return () if self.parent is None else (self.parent, *self.higher)


class ContradictionError(Exception):
    """A request claims two tenants at once. This error never leaves the module."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of a request that rules read: all values of each watched header, and the body.

    `keys_checked` says that vLLM admitted the request by its first `Authorization`.
    """

    headers: Mapping[bytes, Sequence[bytes]]
    body: BodyClaims
    keys_checked: bool = False

    def said(self, header: str) -> Sequence[bytes]:
        """Return the values of a header."""
        return self.headers.get(header.encode(), ())


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

        Raises ContradictionError for the keys of two tenants between which vLLM did not decide.
        """
        bearers = [self._tenant_of(_bearer(said)) for said in asked.said(_AUTHORIZATION)]
        if asked.keys_checked and bearers and bearers[0] is not None:
            return bearers[0]
        return _agreed([*bearers, *map(self._tenant_of, asked.said(_API_KEY))])

    def _tenant_of(self, key: bytes) -> str | None:
        # Only ASCII means the same bytes everywhere. vLLM compares the UTF-8 form of Latin-1.
        forms = {key, key.decode("latin-1").encode()}
        digests = (digest for form in forms if (digest := sha256_of(form)) is not None)
        return _agreed(self.by_sha256.get(digest) for digest in digests)


@dataclass(frozen=True, slots=True)
class Believed:
    """A header that is believed from a gateway that sends its secret, or from everyone."""

    name: str
    proof_sha256: str = ""
    proof_header: str = PROOF_HEADER
    trusts_everyone: bool = False

    @property
    def headers(self) -> tuple[str, ...]:
        return (self.name,) if self.trusts_everyone else (self.name, self.proof_header)

    def claims(self, asked: Asked) -> list[bytes]:
        """Return what the header claims; nothing if it is not believed."""
        if not self.trusts_everyone and not self._is_proven(asked):
            return []
        return [claim for said in asked.said(self.name) for claim in _parts(said)]

    def _is_proven(self, asked: Asked) -> bool:
        # Whoever adds a guess beside the secret takes nothing from whoever knows it.
        for said in asked.said(self.proof_header):
            for candidate in {said, *_parts(said)}:
                proof = sha256_of(candidate)
                if proof is not None and hmac.compare_digest(proof, self.proof_sha256):
                    return True
        return False


@dataclass(frozen=True, slots=True)
class _HeaderRule:
    """Reads a header that is believed."""

    header: Believed

    @property
    def named_by(self) -> NamedBy:
        return NamedBy("header", self.header.name)

    @property
    def headers(self) -> tuple[str, ...]:
        return self.header.headers


@dataclass(frozen=True, slots=True)
class HeaderRule(_HeaderRule):
    """Names the tenant by a header.

    `paths` are the declared names with a slash. A header may claim only these names with a slash.
    """

    paths: Container[str] = frozenset()

    def tenant(self, asked: Asked) -> str | None:
        """Return the claimed tenant; None without a believed claim that is a valid name.

        Raises ContradictionError for claims of two tenants.
        """
        names = map(_plain_name, self.header.claims(asked))
        return _agreed(name for name in names if name and (SLASH not in name or name in self.paths))


@dataclass(frozen=True, slots=True)
class HeaderChildRule(_HeaderRule):
    """Chooses a child of the tenant by a header."""

    def child(self, asked: Asked) -> str | None:
        """Return the child's own name; None without a believed claim that is a valid one.

        Raises ContradictionError for claims of two children.
        """
        return _agreed(map(_child_name, self.header.claims(asked)))


@dataclass(frozen=True, slots=True)
class HeaderTagRule(_HeaderRule):
    """Adds a tag to the request by a header; a tag that the operator declared stays."""

    tag: str

    def value(self, asked: Asked) -> str | None:
        """Return the tag's value; None without a believed claim that is a plain text.

        Raises ContradictionError for two values.
        """
        return _agreed(map(_plain_text, self.header.claims(asked)))


@dataclass(frozen=True, slots=True)
class ConstantRule:
    """Names one fixed tenant for every request that no earlier rule named."""

    constant: str
    named_by: ClassVar = NamedBy("constant")
    headers: ClassVar[tuple[str, ...]] = ()

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant."""
        return self.constant


@dataclass(frozen=True, slots=True)
class ChildRule:
    """Chooses a child of the tenant by a value that the client wrote into its request's body.

    `key` is a key of `metadata`. If clients are trusted, it also names a tenant below `unknown`.
    """

    kind: ChildKind
    key: str = ""
    trusts_clients: bool = False
    headers: ClassVar[tuple[str, ...]] = ()

    @property
    def named_by(self) -> NamedBy:
        return NamedBy(self.kind, self.key)

    def tenant(self, asked: Asked) -> str | None:
        """Return the tenant below `unknown` that a trusted client names; None for others."""
        return child_of(UNKNOWN, self.child(asked)) if self.trusts_clients else None

    def child(self, asked: Asked) -> str | None:
        """Return the child's own name; None if the request has no valid one."""
        body = asked.body
        if self.kind in body.unread:
            return UNREAD
        said = body.metadata.get(self.key) if self.kind == "metadata" else getattr(body, self.kind)
        if not isinstance(said, str) or len(said) > NAME_CHARS_MAX or not said.isascii():
            return None
        if self.kind in ("lora", "model"):  # The operator's model names mostly have a slash.
            said = said.replace(SLASH, "--")
        return None if "," in said else _child_name(said.encode())


Rule = ApiKeyRule | HeaderRule | HeaderChildRule | HeaderTagRule | ConstantRule | ChildRule


def child_of(tenant: str, child: str | None) -> str | None:
    """Return the full name of a tenant's child; None without a child, or if it is too long."""
    if child is None or (child != UNREAD and len(tenant) + 1 + len(child) > NAME_CHARS_MAX):
        return None
    return f"{tenant}{SLASH}{child}"


class Resolver:
    """Finds the owner of a request by ordered rules and declared tenants. Immutable."""

    def __init__(self, rules: Sequence[Rule], declared: Mapping[str, DeclaredTenant]) -> None:
        self.rules = tuple(rules)
        self.declared = declared
        self._tenants = tuple(
            rule for rule in rules if not isinstance(rule, HeaderChildRule | HeaderTagRule)
        )
        self._children = tuple(r for r in rules if isinstance(r, ChildRule | HeaderChildRule))
        self._tags = tuple(rule for rule in rules if isinstance(rule, HeaderTagRule))
        self._watched = frozenset(header.encode() for rule in rules for header in rule.headers)
        # The fields of a body that rules need.
        self.body_fields = frozenset(rule.kind for rule in rules if isinstance(rule, ChildRule))

    def resolve(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        body: BodyClaims = NO_CLAIMS,
        *,
        keys_checked: bool = False,
    ) -> Owner:
        """Return the owner of a request with these (ASGI) headers and this body. Never raises.

        `keys_checked` says that vLLM admitted the request by the key in its first `Authorization`.
        """
        asked = Asked(self._said(headers), body, keys_checked)
        try:
            owner = self._named(asked)
            return self._tagged(asked, owner) if self._tags else owner
        except ContradictionError:
            return CONTRADICTION

    def _said(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
        """Return the values of each watched header, in their order."""
        said: dict[bytes, list[bytes]] = {}
        for raw_name, value in headers:
            name = raw_name.lower()
            if name in self._watched:
                said.setdefault(name, []).append(value.strip())
        return said

    def _named(self, asked: Asked) -> Owner:
        for rule in self._tenants:
            if (tenant := rule.tenant(asked)) is not None:
                return self._child(asked, tenant, rule.named_by)
        return NOBODY

    def _child(self, asked: Asked, tenant: str, by: NamedBy) -> Owner:
        """Return the tenant's child that a rule chooses, else the tenant itself."""
        if tenant.endswith(SLASH + UNREAD):
            return self._owner(tenant, by)  # It stands for every child already.
        for rule in self._children:
            child = None if rule.named_by == by else child_of(tenant, rule.child(asked))
            if child is not None:
                return self._owner(child, by, rule.named_by)
        return self._owner(tenant, by)

    def _owner(self, tenant: str, rule: NamedBy, child_rule: NamedBy | None = None) -> Owner:
        declared = self.declared.get(tenant)
        if declared is None:
            parent = tenant.rpartition(SLASH)[0] or None
            known = self.declared.get(parent or "", _UNDECLARED)
            return Owner(tenant, rule, child_rule, parent, known.tags, known.above)
        return Owner(tenant, rule, child_rule, declared.parent, declared.tags, declared.higher)

    def _tagged(self, asked: Asked, owner: Owner) -> Owner:
        given = {rule.tag: value for rule in self._tags if (value := rule.value(asked)) is not None}
        return replace(owner, tags=dict(sorted({**given, **owner.tags}.items())))


_UNDECLARED = DeclaredTenant()


def _agreed(names: Iterable[str | None]) -> str | None:
    """Return the one name among these; None without any. Raises ContradictionError for two."""
    different = {name for name in names if name is not None}
    if len(different) > 1:
        raise ContradictionError
    return next(iter(different), None)


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


def _parts(value: bytes) -> list[bytes]:
    """Return the values that a proxy may have joined with commas."""
    return [part.strip() for part in value.split(b",")]


def _plain_text(claim: bytes) -> str | None:
    """Return a claim as text; None unless it is printable ASCII of 1 to 128 characters."""
    if not 1 <= len(claim) <= NAME_CHARS_MAX or not claim.isascii():
        return None
    text = claim.decode("ascii")
    return text if text.isprintable() else None


def _plain_name(claim: bytes) -> str | None:
    """Return a claim as a name; None unless it is plain text and not reserved."""
    name = _plain_text(claim)
    return None if name is None or is_reserved(name) else name


def _child_name(claim: bytes) -> str | None:
    """Return a claim as a child's own name; None unless it is a name without a slash."""
    name = _plain_name(claim)
    return None if name is None or SLASH in name or name != name.strip() else name
