"""A server's part in a fleet without vLLM: it has a ledger, and sends it when told. Main program.

It is run with the sources of another version (`tests/support/older_version.py`), so it imports what
that version has, and not what stands beside this file.

It reads one JSON object a line (`do`, and what that takes) and answers each with one: `error`, None
or the text of a LedgerError, and `sources`, where the version is that runs.
"""

import json
import sys
from collections.abc import Callable

import vllm_cost_meter
from tests.ecosystem.test_fleet import records_of, write
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet.sender import FleetSender


class Sending:
    """A ledger, and what sends it."""

    def __init__(self, ledger: str, fleet: str) -> None:
        self._ledger = ledger
        self._sender = FleetSender(ledger, fleet)
        open_database(ledger).dispose()

    def write(self, run: str, begin: int, end: int) -> None:
        """Apply some records of a run to the ledger."""
        write(self._ledger, *records_of(run)[begin:end])

    def send(self) -> None:
        """Send all that waits."""
        while self._sender.step():
            pass

    def end(self) -> None:
        """Say that this was all, as a server that stops."""
        self._sender.end()


def main() -> None:
    """Do what is asked until there is no more."""
    sending = Sending(*sys.argv[1:])
    known: dict[str, Callable[..., None]] = {
        "write": sending.write, "send": sending.send, "end": sending.end
    }  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        error = None
        try:
            known[asked.pop("do")](**asked)
        except LedgerError as failure:
            error = str(failure)
        print(json.dumps({"error": error, "sources": vllm_cost_meter.__file__}), flush=True)


if __name__ == "__main__":
    main()
