"""Sums are added up, rows may stay with their server, and settings may live here."""

from vllm_cost_meter.ledger.fleet.migrations.statements import run_file

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Rename what is a view from now on, and make the new tables."""
    run_file("v0002_rows.sql")
