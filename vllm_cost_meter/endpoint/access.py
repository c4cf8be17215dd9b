"""Access to the side endpoint: an operator sees all figures, a tenant its own, others none.

A bearer token is the admin token or one of a tenant's API keys. The meter knows only the SHA-256 of
a token, and compares it in constant time. Without an admin token (allowed on loopback only) a
caller that shows no token is an operator. A caller that shows a wrong token never is.

Invariant: a tenant sees only itself and all tenants below it. Any other tenant looks to it as if it
did not exist.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.reports.coarse import coarse
from vllm_cost_meter.reports.price_answers import without_labels
from vllm_cost_meter.reports.request_answers import Explanation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Viewer:
    """The caller of a route: a tenant, or an operator if `tenant` is None.

    A tenant with `is_coarse` sees coarse figures only.
    """

    tenant: str | None = None
    is_coarse: bool = False

    @property
    def is_admin(self) -> bool:
        """Whether the caller may see all figures."""
        return self.tenant is None

    def may_see(self, tenant: str | None, above: Iterable[str] = ()) -> bool:
        """Return whether the caller may see figures of a tenant with these tenants above it."""
        if self.tenant is None:
            return True
        return tenant is not None and TenantScope(self.tenant).includes(tenant, above)

    def view(self, answer: T) -> T:
        """Return an answer as this caller may see it; its rows are the caller's own already."""
        return coarse(answer) if self.is_coarse else answer

    def view_explained(self, explanation: Explanation) -> Explanation:
        """Return an explanation as this caller may see it."""
        if self.is_admin:
            return explanation
        parts = [
            {**part, "prices": without_labels(part["prices"])} for part in explanation["parts"]
        ]
        return cast("Explanation", {**explanation, "parts": parts})


ADMIN = Viewer()
# A caller without a token on a public page. No tenant has an empty name, so it sees none.
STRANGER = Viewer("")


@dataclass(frozen=True, slots=True)
class Access:
    """The tokens that open the side endpoint.

    `keys` returns the present tenants, by the SHA-256 of their API keys. `coarse` returns whether
    tenants see coarse figures only.
    """

    admin_sha256: str | None = None
    keys: Callable[[], Mapping[str, str]] = dict
    coarse: Callable[[], bool] = lambda: False

    def viewer(self, authorization: str | None) -> Viewer | None:
        """Return the caller with this `Authorization` header; None if it must be refused."""
        if not authorization:
            return None if self.admin_sha256 else ADMIN
        scheme, _, token = authorization.partition(" ")
        digest = sha256(token)
        is_bearer = scheme.lower() == "bearer"
        # This comparison runs first and for any scheme, so all answers take the same time.
        is_admin = hmac.compare_digest(digest, self.admin_sha256 or "")
        if is_admin and is_bearer:
            return ADMIN
        tenant = self.keys().get(digest) if is_bearer else None
        return None if tenant is None else Viewer(tenant, is_coarse=self.coarse())


# The access on loopback without an admin token: a caller without a token is an operator.
OPEN = Access()


def sha256(token: str) -> str:
    """Return the lower-case hexadecimal SHA-256 of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
