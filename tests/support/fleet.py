"""Ledgers of servers that send to a fleet."""

from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet.sender import FleetSender


def sent(ledger_url: str, fleet_url: str) -> None:
    """Send all that a ledger has to a fleet; the first time it joins. The ledger may be new."""
    open_database(ledger_url).dispose()
    sender = FleetSender(ledger_url, fleet_url)
    try:
        while sender.step():
            pass
    finally:
        sender.close()
