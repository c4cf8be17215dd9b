"""Wait for something to be so: ask again until it is, and fail with what came last."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    ask: Callable[[], T],
    is_so: Callable[[T], object] = bool,
    *,
    timeout_s: float = 20,
    what: str = "",
    pause_s: float = 0.05,
) -> T:
    """Return the first answer that `is_so`; fail after `timeout_s` seconds with the last one."""
    deadline = time.monotonic() + timeout_s
    while not is_so(answer := ask()):
        assert time.monotonic() < deadline, f"{what or 'it never was so'}; at last: {answer!r}"
        time.sleep(pause_s)
    return answer
