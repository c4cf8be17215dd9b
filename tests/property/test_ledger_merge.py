"""Any ledgers that share any bills and snapshots merge into what plain Python makes of their rows.

The judge reads the rows of both by sqlite3 and joins them as sets and dictionaries.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.component.ledger.test_reader import http, part, snapshot
from tests.support.builders import make_open
from tests.support.examples import examples
from tests.support.upkeep import Rows, kept_tables, rows_of, url_of, without_sums, wrong_sums
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.schema import metadata
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.records.requests import EngineRequest

RUNS = ("a", "b")
seqs = st.frozensets(st.integers(1, 6))
# For each run: its bills, its requests without one, and the number of its snapshot, 0 for none.
contents = st.fixed_dictionaries({run: st.tuples(seqs, seqs, st.integers(0, 3)) for run in RUNS})


def make(path: Path, drawn: dict) -> Rows:
    engine = open_database(url_of(path))
    records = []
    for run, (billed, opened, number) in drawn.items():
        records += [bill(run, seq) for seq in billed]
        records += [http(f"cost-{run}-{seq:032x}") for seq in billed]
        records += [make_open(request_id=bill(run, seq).bill.request_id) for seq in opened - billed]
        if number:
            # What a snapshot says depends on its number alone, as an honest engine's does.
            before = [bill(run, seq) for seq in range(1, number + 1)]
            records.append(snapshot(before, number, run))
    with writing(engine).begin() as connection:
        write(connection, records)
    engine.dispose()
    return rows_of(path)


def bill(run: str, seq: int) -> EngineRequest:
    made = part(seq, f"cost-{run}-{seq:032x}", run_id=run)
    return replace(made, bill=made.bill._replace(request_id=f"{run}-internal-{seq:08x}"))


def joined(one: Rows, two: Rows) -> Rows:
    found = {}
    for name, table in kept_tables().items():
        columns = table.c.keys()
        keys = [columns.index(column.name) for column in table.primary_key]
        by_key: dict = {}
        for row in (*one[name], *two[name]):
            key = tuple(row[at] for at in keys)
            known = by_key.get(key)
            newer = known is None or (
                "number" in columns
                and row[columns.index("number")] > known[columns.index("number")]
            )
            if newer:
                by_key[key] = row
        found[name] = set(by_key.values())
    ids = metadata.tables["requests"].c.keys().index("request_id")
    billed = {row[ids] for row in found["requests"]}
    found["open_requests"] = {row for row in found["open_requests"] if row[0] not in billed}
    return found


@settings(max_examples=examples(25))
@given(contents, contents)
def test_a_merge_has_the_rows_of_both_each_once(first, second):
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one.db", Path(folder) / "two.db"
        expected = joined(make(one, first), make(two, second))
        merge(url_of(one), [two], 1)
        assert without_sums(rows_of(one)) == expected
        # And the other way round, with what is there already.
        merge(url_of(two), [one], 1)
        assert without_sums(rows_of(two)) == expected
        merge(url_of(one), [two], 1)
        assert without_sums(rows_of(one)) == expected
        assert rows_of(one) == rows_of(two)
        assert wrong_sums(one) == []
