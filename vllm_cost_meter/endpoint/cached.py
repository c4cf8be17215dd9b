"""Cache one answer that takes long to make.

A call after the answer has grown old makes a new one. Making it takes at most a small share of all
time, however often callers ask. Other callers get the old answer meanwhile. Nobody waits, so many
callers at once hold only one thread.

Invariant: at most one answer is being made at any time.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

KEEP_S = 60.0
# The largest share of all time that may go into making the answer.
SHARE_MAX = 0.02


class Kept(Generic[T]):
    """Makes one answer and keeps it for a while. Thread-safe."""

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
        """Return the answer; None while another caller has the first one made.

        Raises what `make` raises; the next call tries again.
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
