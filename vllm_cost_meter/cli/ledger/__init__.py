"""The commands `ledger ...`: look after the file of a SQLite ledger."""

from vllm_cost_meter.cli.ledger.commands import app

__all__ = ["app"]
