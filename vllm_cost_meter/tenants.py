"""Whose request it is: from the headers of one HTTP request to a tenant, and by which rule.

An API key names its tenant by its SHA-256, so that the settings never hold a key. A tenant header
is believed only where the operator says that a gateway sets it. Everything else is `unknown`.

Why so strict: whoever can make the meter bill another tenant steals from them. Two different
values of a header mean that someone between client and server disagrees about who is asking, so
neither is taken. A comma in a tenant header is refused for the same reason: proxies join repeated
headers with one.

Invariant: the tenant is a name from the rules, or printable ASCII of at most 128 characters from
the trusted header, or `unknown`; never a reserved name that the request itself supplied.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

UNKNOWN = "unknown"
NAME_CHARS_MAX = 128
# No sane key is longer; hashing more would be work done for a stranger.
CREDENTIAL_BYTES_MAX = 8_192

Rule = Literal["api_key", "header", "none"]


@dataclass(frozen=True, slots=True)
class TenantRules:
    """What the operator declared: tenants by lower-case hex SHA-256 of a key, and a header.

    `tenant_header` is the name of the header trusted to carry the tenant, None to trust none.
    """

    by_api_key_sha256: Mapping[str, str]
    tenant_header: str | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A tenant, and the rule that named it; `none` goes with `unknown`."""

    tenant: str
    rule: Rule


NOBODY = Resolved(UNKNOWN, "none")


def is_reserved(name: str) -> bool:
    """Tell whether a name belongs to the meter: `unknown`, and all of `__...` (report rows)."""
    return name.startswith("__") or name.casefold() == UNKNOWN


def name_problem(name: str) -> str | None:
    """Return what a declared tenant name was expected to be, or None if it is good."""
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        return f"1 to {NAME_CHARS_MAX} characters"
    if not name.isprintable() or name != name.strip():
        return "printable characters without spaces at the ends"
    if is_reserved(name):
        return f"a name other than {UNKNOWN!r} and not starting with '__'"
    return None


def resolve(headers: Iterable[tuple[bytes, bytes]], rules: TenantRules) -> Resolved:
    """Return the tenant of a request with these (ASGI) headers. Never raises."""
    trusted = rules.tenant_header.lower().encode("latin-1") if rules.tenant_header else None
    authorizations: set[bytes] = set()
    api_keys: set[bytes] = set()
    claims: set[bytes] = set()
    for raw_name, value in headers:
        name = raw_name.lower()
        if name == b"authorization":
            authorizations.add(value.strip())
        elif name == b"x-api-key":
            api_keys.add(value.strip())
        elif name == trusted:
            claims.add(value.strip())
    if max(len(authorizations), len(api_keys), len(claims)) > 1:
        return NOBODY
    credentials = api_keys | {_bearer(value) for value in authorizations}
    tenants = {_tenant_of_key(key, rules) for key in credentials} - {None}
    if len(tenants) > 1:
        return NOBODY
    for tenant in tenants:
        if tenant is not None:
            return Resolved(tenant, "api_key")
    for claim in claims:
        return _claimed(claim)
    return NOBODY


def _bearer(authorization: bytes) -> bytes:
    scheme, _, credential = authorization.partition(b" ")
    return credential.strip() if scheme.lower() == b"bearer" else b""


def _tenant_of_key(key: bytes, rules: TenantRules) -> str | None:
    # A plain dict lookup, not a constant-time comparison: what the lookup's timing could leak is a
    # prefix of the key's SHA-256, which nobody can steer towards a wanted value without
    # inverting SHA-256. And this names a tenant; admission is vLLM's own --api-key check.
    if not 0 < len(key) <= CREDENTIAL_BYTES_MAX:
        return None
    return rules.by_api_key_sha256.get(hashlib.sha256(key).hexdigest())


def _claimed(claim: bytes) -> Resolved:
    if not 1 <= len(claim) <= NAME_CHARS_MAX or b"," in claim:
        return NOBODY
    if not all(0x20 <= byte <= 0x7E for byte in claim):
        return NOBODY
    name = claim.decode("ascii")
    return NOBODY if is_reserved(name) else Resolved(name, "header")
