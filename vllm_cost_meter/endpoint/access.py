"""Who may see which figures: an operator all, a tenant its own, anybody else none.

A bearer token is the admin token or one of a tenant's API keys; tokens are known by their SHA-256
only and compared in a time that does not depend on them. Without an admin token (allowed on
loopback only) who shows no token at all is an operator; who shows a wrong one never is.

Invariant: a tenant's viewer sees a name only if it is the tenant's own or a child of it, and what
it may not see looks as if it did not exist.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks. `tenant` is None for an operator."""

    tenant: str | None = None

    @property
    def is_admin(self) -> bool:
        """Whether all figures may be seen."""
        return self.tenant is None

    def may_see(self, tenant: str | None) -> bool:
        """Tell whether figures of this tenant may be seen."""
        if self.tenant is None:
            return True
        own = self.tenant
        return tenant is not None and (tenant == own or tenant.startswith(f"{own}/"))


ADMIN = Viewer()
# Who has shown no token where one is expected: no tenant has an empty name.
STRANGER = Viewer("")


@dataclass(frozen=True, slots=True)
class Access:
    """The tokens that open the side endpoint. `keys` gives the tenants by the SHA-256 of
    their keys, as they are now."""

    admin_sha256: str | None = None
    keys: Callable[[], Mapping[str, str]] = dict

    def viewer(self, authorization: str | None) -> Viewer | None:
        """Return who shows this `Authorization` header; None if nobody may."""
        if not authorization:
            return None if self.admin_sha256 else ADMIN
        scheme, _, token = authorization.partition(" ")
        digest = sha256(token)
        is_bearer = scheme.lower() == "bearer"
        # First, and whatever the scheme, so that the answer takes the same time.
        is_admin = hmac.compare_digest(digest, self.admin_sha256 or "")
        if is_admin and is_bearer:
            return ADMIN
        tenant = self.keys().get(digest) if is_bearer else None
        return None if tenant is None else Viewer(tenant)


# On loopback, without an admin token and without tenants.
OPEN = Access()


def sha256(token: str) -> str:
    """Return the lower-case hexadecimal SHA-256 of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
