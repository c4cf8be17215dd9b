"""Contain the meter's own errors, so that they never reach vLLM.

Every hook runs its body inside `try` and reports here. The guard counts errors and logs the first
error of each hook. After `ERRORS_IN_A_ROW_MAX` failures of one hook in a row the guard switches off
for good, because a meter that cannot work must stop costing time. Work in the background does not
report here, because its failures pass (`api_server/background.py`). What may hang is called in a
thread of its own (`in_daemon_thread`), so that the caller can give it up.

Invariant: nothing here raises.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

P = ParamSpec("P")
R = TypeVar("R")

# A hook that has failed this often in a row will not recover by itself.
ERRORS_IN_A_ROW_MAX = 10


class Guard:
    """The error account for one side of the meter: engine or API server."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.errors = 0
        self.off = False
        self._in_a_row: dict[str, int] = {}
        self._logged: set[str] = set()

    @property
    def failing(self) -> bool:
        """True while the last call of some hook failed."""
        return bool(self._in_a_row)

    def succeeded(self, hook: str) -> None:
        """Record that `hook` worked; its failures in a row count from 0 again."""
        if self._in_a_row:
            self._in_a_row.pop(hook, None)

    def failed(self, hook: str, error: BaseException) -> None:
        """Count a failure of `hook`; log it the first time; switch off after too many in a row."""
        self.errors += 1
        row = self._in_a_row.get(hook, 0) + 1
        self._in_a_row[hook] = row
        if hook not in self._logged:
            self._logged.add(hook)
            logger.error(
                "cost meter (%s): %s failed and was contained: %r. Serving goes on; the time it "
                "could not measure is booked as lost. Further failures here are only counted.",
                self.side,
                hook,
                error,
                exc_info=error,
            )
        if row >= ERRORS_IN_A_ROW_MAX and not self.off:
            self.off = True
            logger.error(
                "cost meter (%s): switched itself off after %d failures of %s in a row. Serving "
                "goes on unmetered until the server is restarted.",
                self.side,
                row,
                hook,
            )


def in_daemon_thread(body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
    """Begin a call of `body` in a thread that neither a pool nor the end of a process waits for."""
    answer: Future[R] = Future()
    answer.set_running_or_notify_cancel()  # from here on nobody can cancel it

    def run() -> None:
        try:
            answer.set_result(body(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            answer.set_exception(error)

    threading.Thread(target=run, name="cost-meter-background", daemon=True).start()
    return answer
