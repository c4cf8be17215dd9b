"""The guard of an API server: contains errors of its hooks, and counts the time they take.

Invariant: `run` never raises. Once the guard has switched itself off, it calls nothing.
"""

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vllm_cost_meter.guard import Guard
from vllm_cost_meter.metrics import series

P = ParamSpec("P")
R = TypeVar("R")


class ApiGuard(Guard):
    """The error account of one API server, and the wall time of its hooks."""

    def __init__(self) -> None:
        super().__init__("API server")
        # Wall time of the hooks that is not in the metrics yet.
        self.own_ns = 0

    def run(self, hook: str, body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Call `body` for `hook`. Never raises; returns None after an error."""
        if self.off:
            return None
        start_ns = time.perf_counter_ns()
        try:
            result = body(*args, **kwargs)
            self.succeeded(hook)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self.failed(hook, error)
            series.count_error("api")
            if self.off:
                series.set_api_off()
            return None
        finally:
            self.own_ns += time.perf_counter_ns() - start_ns
        return result

    def show_own_time(self) -> None:
        """Add the hooks' time since the last call to the metrics."""
        series.count_own_time(self.own_ns)
        self.own_ns = 0
