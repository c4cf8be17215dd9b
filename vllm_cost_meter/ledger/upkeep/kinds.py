"""How the rows of each table come about, which decides how two ledgers become one.

A new table must be named here: a test fails, and `ledger merge` refuses, until it is. A guess would
add up rows twice, or leave them out.

Invariant: every table of the schema has exactly one kind.
"""

from enum import StrEnum

from sqlalchemy import Table

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger import schema


class RowKind(StrEnum):
    """How the rows of a table come about."""

    # Written once by key by a server: the row that is there stays.
    FACT = "fact"
    # Overwritten by a row with the same key and a higher snapshot number.
    CUMULATIVE = "cumulative"
    # From a person's file or settings: two different rows with one key contradict each other.
    DECLARED = "declared"
    # Gone once there is a bill.
    OPEN = "open"
    # How far this file has its journals, and the fleet has this file: nothing of another file.
    OWN = "own"
    # Follows from the facts of a provider's bills, and is computed from them.
    BILLED_HOURS = "billed hours"
    # Adds up other rows of this file, and is made anew of them.
    SUM = "sum"
    # What the dropped bills of a run added up to: of two ledgers one has it right.
    DROPPED = "dropped"
    # The version of the tables themselves.
    VERSION = "version"


_KINDS = {
    schema.schema_version.name: RowKind.VERSION,
    schema.prices.name: RowKind.DECLARED,
    schema.runs.name: RowKind.FACT,
    schema.cost_models.name: RowKind.FACT,
    schema.snapshots.name: RowKind.CUMULATIVE,
    schema.engine_hours.name: RowKind.CUMULATIVE,
    schema.energy_hours.name: RowKind.CUMULATIVE,
    schema.live_usage.name: RowKind.CUMULATIVE,
    schema.open_requests.name: RowKind.OPEN,
    schema.http_requests.name: RowKind.FACT,
    schema.requests.name: RowKind.FACT,
    schema.usage_pieces.name: RowKind.FACT,
    schema.request_energy.name: RowKind.FACT,
    schema.rollup_groups.name: RowKind.SUM,
    schema.rollup_hours.name: RowKind.SUM,
    schema.rollup_days.name: RowKind.SUM,
    schema.rollup_latencies.name: RowKind.SUM,
    schema.rollup_arrivals.name: RowKind.SUM,
    schema.bill_sums.name: RowKind.SUM,
    schema.energy_sums.name: RowKind.SUM,
    schema.row_cutoffs.name: RowKind.FACT,
    schema.dropped_bills.name: RowKind.DROPPED,
    schema.dropped_hours.name: RowKind.DROPPED,
    schema.dropped_unknown_energy.name: RowKind.DROPPED,
    schema.dropped_latencies.name: RowKind.DROPPED,
    schema.journals.name: RowKind.OWN,
    schema.fleet_sender.name: RowKind.OWN,
    schema.outbox.name: RowKind.OWN,
    schema.journal_losses.name: RowKind.FACT,
    schema.billing_snapshots.name: RowKind.DECLARED,
    schema.invoice_lines.name: RowKind.DECLARED,
    schema.billed_hours.name: RowKind.BILLED_HOURS,
    schema.saturation_points.name: RowKind.DECLARED,
}
# Columns of declared rows that say who declared it and when, not what: they may differ.
ORIGIN = frozenset({"source", "imported_at", "effective_from", "measured_at"})


def kind_of_rows(table: Table) -> RowKind:
    """Return how a table's rows come about. Raises LedgerError for a table that nobody named."""
    try:
        return _KINDS[table.name]
    except KeyError:
        raise LedgerError(
            f"table {table.name}: expected a table whose rows can be merged, got one that"
            " ledger/upkeep/kinds.py does not name"
        ) from None
