"""The open engine requests of one API server: no bill yet, announced to the ledger or not.

Once a request is announced, its owner and ids can be looked up in the ledger while it runs. Most
requests end within a second, and announcing them would cost two writes for nothing. So a request is
announced when it was already open at the last round, or when a reader asks.

Invariant: each birth is announced at most once, and never after it was taken.
"""

from collections.abc import Iterator
from itertools import islice

from vllm_cost_meter.exchange import Birth
from vllm_cost_meter.records.client_text import stored

# A server holds far fewer requests, so more means that bills do not come.
REQUESTS_MAX = 100_000
# Announcing runs on vLLM's event loop, so it is limited.
ANNOUNCED_AT_ONCE_MAX = 1_000


class OpenRequests:
    """Births by internal request id, as it is stored, the oldest first.

    Used by one event loop only.
    """

    def __init__(
        self,
        requests_max: int = REQUESTS_MAX,
        announced_at_once_max: int = ANNOUNCED_AT_ONCE_MAX,
    ) -> None:
        self._requests_max = requests_max
        self._announced_at_once_max = announced_at_once_max
        self._births: dict[str, Birth] = {}
        # Unannounced requests: those that were open at the last round, and those that came since.
        self._older: dict[str, Birth] = {}
        self._newer: dict[str, Birth] = {}

    def __len__(self) -> int:
        return len(self._births)

    def add(self, birth: Birth) -> bool:
        """Keep a birth, in place of the oldest when there are too many; False if it is known."""
        id = stored(birth.request_id)
        if id in self._births:
            return False
        if len(self._births) >= self._requests_max:
            self.take(next(iter(self._births)))
        self._births[id] = self._newer[id] = birth
        return True

    def take(self, request_id: str) -> tuple[Birth | None, bool]:
        """Remove a request and return (request, was announced); None if it is unknown."""
        birth = self._births.pop(request_id, None)
        newer = self._newer.pop(request_id, None)
        older = self._older.pop(request_id, None)
        return birth, birth is not None and newer is None and older is None

    def __iter__(self) -> Iterator[Birth]:
        """Iterate over the open requests, oldest first."""
        return iter(self._births.values())

    def due(self) -> list[Birth]:
        """Begin a round; return the unannounced requests that were open at the last round, too."""
        due = self._announce(self._older)
        if not self._older:
            self._older, self._newer = self._newer, self._older
        return due

    def unannounced(self) -> list[Birth]:
        """Return all unannounced requests for announcing, even the youngest."""
        return [*self._announce(self._older), *self._announce(self._newer)]

    def _announce(self, births: dict[str, Birth]) -> list[Birth]:
        chosen = list(islice(births.values(), self._announced_at_once_max))
        for birth in chosen:
            del births[stored(birth.request_id)]
        return chosen
