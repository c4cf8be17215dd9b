"""Ledgers of servers that send to a fleet."""

from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet.sender import FleetSender


def sent(ledger_url: str, fleet_url: str, *, stops: bool = False, rows: str = "fleet") -> None:
    """Send all that a ledger has to a fleet; the first time it joins. The ledger may be new.

    With `stops` it says that this was all, as a server does that stops.
    """
    open_database(ledger_url).dispose()
    sender = FleetSender(ledger_url, fleet_url, rows=rows)
    try:
        while sender.step():
            pass
        if stops:
            sender.end()
    finally:
        sender.close()
