"""Records as an applier brings them to the ledger: in any order and batches, some of them twice."""

from collections.abc import Sequence

from hypothesis import strategies as st
from sqlalchemy import Engine

from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.database import writing
from vllm_cost_meter.ledger.inserts import write


@st.composite
def batches_of(draw: st.DrawFn, records: Sequence[Record]) -> list[Sequence[Record]]:
    """Return the records in batches, in any order. Some come twice, as after a kill."""
    again = draw(st.lists(st.sampled_from(records), max_size=3)) if records else []
    mixed = [*records, *again]
    draw(st.randoms()).shuffle(mixed)
    cuts = sorted(draw(st.lists(st.integers(0, len(mixed)), max_size=3)))
    bounds = zip([0, *cuts], [*cuts, len(mixed)], strict=True)
    return [mixed[low:high] for low, high in bounds]


def write_batches(engine: Engine, batches: Sequence[Sequence[Record]]) -> None:
    """Write each batch in a transaction of its own."""
    for batch in batches:
        with writing(engine).begin() as connection:
            write(connection, batch)
