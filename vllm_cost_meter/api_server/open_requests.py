"""The engine requests of one API server whose bill has not come, and which of them were announced.

A running request can be looked up in the ledger once it is announced there: whose it is, under
which ids. Most requests end within a second, and would cost two writes for nothing; so a request is
announced when it was here for one sweep already, or when somebody asks.

Invariant: each birth is announced at most once, and never after it was taken.
"""

from collections.abc import Iterator
from itertools import islice

from vllm_cost_meter.exchange import Birth

# Requests whose bill has not come; a server holds far fewer, so more means bills are not coming.
BIRTHS_MAX = 100_000
# Announced at once: they are made on vLLM's event loop.
ANNOUNCED_MAX = 1_000


class Births:
    """Births by internal request id, the oldest first. Used by one event loop only."""

    def __init__(self) -> None:
        self._births: dict[str, Birth] = {}
        # Not announced: those that were here at the last sweep, and those that came since.
        self._older: dict[str, Birth] = {}
        self._newer: dict[str, Birth] = {}

    def __len__(self) -> int:
        return len(self._births)

    def add(self, birth: Birth) -> bool:
        """Keep a birth, in place of the oldest when there are too many; False if it is known."""
        if birth.request_id in self._births:
            return False
        if len(self._births) >= BIRTHS_MAX:
            self.take(next(iter(self._births)))
        self._births[birth.request_id] = self._newer[birth.request_id] = birth
        return True

    def take(self, request_id: str) -> tuple[Birth | None, bool]:
        """Forget a birth and return it, and whether it was announced; None for an unknown one."""
        birth = self._births.pop(request_id, None)
        newer = self._newer.pop(request_id, None)
        older = self._older.pop(request_id, None)
        return birth, birth is not None and newer is None and older is None

    def __iter__(self) -> Iterator[Birth]:
        """Return those whose bill has not come, the oldest first."""
        return iter(self._births.values())

    def due(self) -> list[Birth]:
        """Sweep: return those to announce that were here at the last sweep too."""
        due = self._announce(self._older)
        if not self._older:
            self._older, self._newer = self._newer, self._older
        return due

    def unannounced(self) -> list[Birth]:
        """Return those to announce that were not announced yet, however young."""
        return [*self._announce(self._older), *self._announce(self._newer)]

    @staticmethod
    def _announce(births: dict[str, Birth]) -> list[Birth]:
        chosen = list(islice(births.values(), ANNOUNCED_MAX))
        for birth in chosen:
            del births[birth.request_id]
        return chosen
