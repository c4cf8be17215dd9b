"""Has the ledger sent to the fleet's database by a process of its own.

Invariant: nothing that serves waits for it.
"""

import msgspec

from vllm_cost_meter.api_server.shipping.messages import (
    FLUSH,
    RETRY,
    STATE,
    ShippingHello,
    ShippingState,
)
from vllm_cost_meter.endpoint.answers import FleetSending
from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.ledger.database import parse_url
from vllm_cost_meter.metrics import series
from vllm_cost_meter.side_process.channel import RefusedError, decoded
from vllm_cost_meter.side_process.supervisor import SideProcess
from vllm_cost_meter.units.time import rfc3339

MODULE = "vllm_cost_meter.api_server.shipping.process"
# A stop waits so long for the fleet to have everything; the rest is sent by the next start.
FLUSH_TIMEOUT_S = 3.0


class Shipping:
    """The API server's end of the process that sends. Used by one event loop only."""

    def __init__(self, hello: ShippingHello, flush_timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """`hello` says from where to where."""
        self._flush_timeout_s = flush_timeout_s
        self._database = parse_url(hello.fleet_url).database or ""
        self._has_settings = hello.kept_path is not None
        self.state = ShippingState()
        self.process = SideProcess(
            "the process that sends to the fleet",
            MODULE,
            hello=lambda: hello,
            answer=_answer_nothing,
            take=self._take,
        )

    def start(self) -> None:
        """Start it. Idempotent."""
        self.process.start()

    def try_again(self) -> None:
        """Have it try at once, if it failed and waits: the fleet's database was just read."""
        if self.state.last_error is not None:
            self.process.tell(RETRY, None)

    def health(self) -> FleetSending:
        """Return how sending does, as it was told last."""
        state = self.state
        sent_at = None if state.sent_at_ns is None else rfc3339(state.sent_at_ns)
        return {
            "waiting_rows": state.waiting_rows,
            "waiting_bytes": state.waiting_bytes,
            "sent_at": sent_at,
            "failures": state.failures,
            "last_error": state.last_error,
        }

    def _take(self, name: str, value: msgspec.Raw) -> None:
        if name == STATE:
            self.state = state = decoded(value, ShippingState)
            series.set_fleet(
                self._database,
                is_up=state.last_error is None,
                failures=state.failures,
                waiting_rows=state.waiting_rows,
                waiting_bytes=state.waiting_bytes,
                sent_at_s=_seconds(state.sent_at_ns),
            )
            if self._has_settings:
                series.set_fleet_settings(
                    self._database,
                    version=state.settings_version,
                    seen_at_s=_seconds(state.settings_seen_at_ns),
                    is_refused=state.settings_error is not None,
                )

    async def stop(self) -> None:
        """Send what waits, for a short time, and end the process."""
        if self.process.state == "ok":
            try:
                await self.process.ask(FLUSH, None, bool, self._flush_timeout_s)
            except (AwayError, RefusedError):
                pass  # The ledger keeps it, and the next start sends it.
        await self.process.stop()


def _seconds(instant_ns: int | None) -> float | None:
    return None if instant_ns is None else instant_ns / 1e9


async def _answer_nothing(name: str, _given: msgspec.Raw) -> object:
    raise ValueError(f"expected no question, got {name!r}")
