"""The first version: facts, states, sums by shipments."""

from vllm_cost_meter.ledger.fleet.migrations.statements import run_file

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    run_file("v0001_first.sql")
