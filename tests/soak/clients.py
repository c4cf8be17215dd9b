"""Clients that ask servers without a pause, and remember each cost that they saw.

Invariant: a cost is in `seen` once its reply was whole.
"""

import http.client
import threading
import time
from collections.abc import Callable
from decimal import Decimal

TIMEOUT_S = 15


class Clients:
    """Threads that ask the servers at some ports. `seen` has each reply's cost in nano-USD."""

    def __init__(
        self, headers: dict[str, str] | None = None, body: str = "{}", pause_s: float = 0.002
    ) -> None:
        self.seen: dict[str, int] = {}
        self.failures = 0
        # Replies that left without their cost: the disk refused the journal, or it took too long.
        self.without_cost = 0
        self._headers = {"content-type": "application/json", **(headers or {})}
        self._body = body
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, port: Callable[[], int | None], threads: int) -> None:
        """Let so many threads ask whichever port is given, None while there is none."""
        for _ in range(threads):
            self._threads.append(threading.Thread(target=self._ask_on, args=(port,), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ask no more; return once the last replies have come."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, port: Callable[[], int | None]) -> None:
        while not self._is_over.is_set():
            at = port()
            try:
                if at is None:
                    raise ConnectionError
                self._ask_one(at)
            except (OSError, http.client.HTTPException):
                self.failures += 1
                time.sleep(0.05)

    def _ask_one(self, port: int) -> None:
        """Ask over one connection until it breaks."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        try:
            while not self._is_over.is_set():
                connection.request("POST", "/v1/completions", self._body, self._headers)
                reply = connection.getresponse()
                reply.read()
                cost = reply.headers.get("x-cost-meter-cost-usd")
                name = reply.headers.get("x-cost-meter-request-id")
                if reply.status != 200:
                    raise http.client.HTTPException(str(reply.status))
                if cost is None or name is None:
                    self.without_cost += 1
                else:
                    self.seen[name] = int(Decimal(cost) * 10**9)
                time.sleep(self._pause_s)
        finally:
            connection.close()
