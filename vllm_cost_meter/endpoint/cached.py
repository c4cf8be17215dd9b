"""An answer that takes long to make, kept for whoever asks next.

It is made anew when somebody asks after it has grown old, and at most so often that making it takes
a small part of the time. While it is made, others get the old one: nobody waits, so however many
ask at once, one thread is held.

Invariant: at most one is being made at any time.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

KEEP_S = 60.0
# Of all time, how much may go into making it.
SHARE_MAX = 0.02


class Kept(Generic[T]):
    """Makes and keeps one answer. Thread-safe."""

    def __init__(
        self,
        make: Callable[[], T],
        *,
        keep_s: float = KEEP_S,
        share_max: float = SHARE_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._keep_s, self._share_max, self._clock = make, keep_s, share_max, clock
        self._making = threading.Lock()
        self._answer: T | None = None
        self._old_from_s = 0.0

    def __call__(self) -> T | None:
        """Return the answer; None while the first one is being made for somebody else.

        Raises what making it raises; then it is made anew for the next one who asks.
        """
        if self._answer is not None and self._clock() < self._old_from_s:
            return self._answer
        if not self._making.acquire(blocking=False):
            return self._answer
        try:
            began_s = self._clock()
            self._answer = self._make()
            ended_s = self._clock()
            self._old_from_s = ended_s + max(self._keep_s, (ended_s - began_s) / self._share_max)
            return self._answer
        finally:
            self._making.release()
