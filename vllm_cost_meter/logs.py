"""The meter's log: its one logger, and when an outage is spoken of.

The logger is below vLLM's, which has a handler and a level of its own. So the meter's lines are
where vLLM's are, on every server. A logger of any other name would hang on the root logger, which
one of vLLM's routers sets to ERROR: its warnings would be lost.

Invariant: every line of the meter goes through the logger that `meter_logger` returns.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAME = "vllm.cost_meter"
# An outage is spoken of so often while it lasts. What fails and works in turns fills no log either.
SPOKEN_OF_EVERY_NS = 60 * 1_000_000_000


def meter_logger() -> logging.Logger:
    """Return the logger of the meter."""
    return logging.getLogger(NAME)


def send_all_to(handler: logging.Handler) -> None:
    """Hand all lines of this process to a handler, from level INFO on, whoever logs them."""
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


@contextmanager
def quieter(name: str) -> Iterator[None]:
    """Let another logger say nothing below a warning within the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class Outage:
    """How long something has failed, and whether the log is to say so.

    The log has the first failure of an outage, one line in each minute of it, and its end. What
    fails and works in turns is spoken of once in a minute too.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.failures_in_a_row = 0
        self._clock_ns = clock_ns
        self._since_ns = 0
        self._is_logged = False
        self._logged_at_ns: int | None = None

    @property
    def lasts_s(self) -> float | None:
        """Seconds since the first failure; None while it works."""
        if not self.failures_in_a_row:
            return None
        return (self._clock_ns() - self._since_ns) / 1e9

    @property
    def so_far(self) -> str:
        """How long it has failed, for a line of the log; empty at the first failure."""
        if self.failures_in_a_row <= 1:
            return ""
        return f" (for {self.lasts_s:.0f} s and {self.failures_in_a_row} attempts)"

    def failed(self) -> bool:
        """Count a failure; return whether the log is to say so."""
        now_ns = self._clock_ns()
        if not self.failures_in_a_row:
            self._since_ns, self._is_logged = now_ns, False
        self.failures_in_a_row += 1
        last_ns = self._logged_at_ns
        if last_ns is not None and now_ns - last_ns < SPOKEN_OF_EVERY_NS:
            return False
        self._is_logged, self._logged_at_ns = True, now_ns
        return True

    def ended(self) -> tuple[float, int] | None:
        """Return the seconds and failures of an outage that ends, if the log is to say so."""
        lasted_s, failures = self.lasts_s, self.failures_in_a_row
        self.failures_in_a_row = 0
        return (lasted_s, failures) if lasted_s is not None and self._is_logged else None
