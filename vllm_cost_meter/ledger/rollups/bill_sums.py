"""What all bills of each engine run add up to, kept in the transaction that writes them.

An audit, and whoever asks which runs have bills, reads a row of `bill_sums` for each run and no
bill: a year of bills costs no more than a day. A row has a digest over the run's bills too. It is
a sum of one digest for each bill, so it depends neither on the order of writing nor on batches. A
full audit reads the bills again, and holds what they add up to against the row.

A bill's energy comes later, by another journal, and may even be there before the bill. So a table
of its own, `energy_sums`, has what it adds up to.

Every bill and energy is added once, whichever batch brings it: whoever writes them looks first
which ones the ledger lacks. What the bills added up to whose rows were dropped is on record.

Invariant: after each transaction the rows are what `sums_of_rows` makes of the bills.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import orjson
from sqlalchemy import ColumnElement, Table, case, delete, func, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.fleet.changes import note
from vllm_cost_meter.ledger.rollups.upserts import add_to, in_chunks, lock_sums
from vllm_cost_meter.ledger.rows import TableRow, owner_columns
from vllm_cost_meter.ledger.schema import (
    DIGEST_MODULUS,
    PIECE_AMOUNTS,
    bill_sums,
    dropped_bills,
    dropped_hours,
    energy_sums,
    request_energy,
    requests,
    rollup_groups,
)
from vllm_cost_meter.ledger.tables.pieces import (
    PIECE_ERROR_NS,
    PIECE_HOUR,
    piece_amount,
    with_pieces,
)
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.units.time import rfc3339

_DIGEST_BYTES = 8
# What of a bill a digest covers, besides its pieces: all but its latencies and what follows from
# the rest.
# Bills from before these were known keep their digest: they are covered where they are not NULL.
_COVERED_LATER = ("external_tokens", "kv_role")
_COVERED = (
    *("run_id", "seq", "request_id", "http_request_id", "response_id", "prompt_group"),
    *("tenant", "tenant_rule", "tenant_above", "tags", "model", "lora", "route"),
    *("engine_status", "method", "prompt_tokens", "cached_tokens", "output_tokens"),
    *("cost_nanousd", "marginal_cost_nanousd", "started_at", "finished_at"),
)


class BillSums(NamedTuple):
    """What bills of one run add up to; the fields are columns of `bill_sums`.

    `last_seq` is the highest number among them. `started_at` is when the first of their requests
    came, and `finished_at` when the last one ended.
    """

    run_id: str
    bills: int
    last_seq: int
    gpu_time_ns: int
    digest: int
    method: str
    started_at: str
    finished_at: str

    def with_more(self, other: "BillSums") -> "BillSums":
        """Return the sums of these bills and of others of the run."""
        return BillSums(
            run_id=self.run_id,
            bills=self.bills + other.bills,
            last_seq=max(self.last_seq, other.last_seq),
            gpu_time_ns=self.gpu_time_ns + other.gpu_time_ns,
            digest=(self.digest + other.digest) % DIGEST_MODULUS,
            method=min(self.method, other.method),
            started_at=min(self.started_at, other.started_at),
            finished_at=max(self.finished_at, other.finished_at),
        )


def add_bills(connection: Connection, parts: Iterable[EngineRequest]) -> None:
    """Add bills that the ledger did not have."""
    found: dict[str, BillSums] = {}
    for part in parts:
        sums = _of_part(part)
        known = found.get(sums.run_id)
        found[sums.run_id] = sums if known is None else known.with_more(sums)
    _write(connection, [found[run_id] for run_id in sorted(found)])


def new_energy(connection: Connection, rows: Sequence[TableRow]) -> dict[str, int]:
    """Return by run the known energy, in mJ, of those rows that `request_energy` lacks."""
    by_key: dict[tuple[str, int, int], int] = {}
    for row in rows:
        if row["energy_mj"] is not None:
            by_key.setdefault((row["run_id"], row["seq"], row["hour"]), row["energy_mj"])
    if by_key:
        lock_sums(connection)
    e = request_energy.c
    for run_id, of_run in groupby(sorted(by_key), itemgetter(0)):
        for some in in_chunks(sorted({seq for _, seq, _ in of_run})):
            there = select(e.run_id, e.seq, e.hour).where(e.run_id == run_id, e.seq.in_(some))
            for key in connection.execute(there).all():
                by_key.pop(tuple(key), None)
    found: dict[str, int] = {}
    for (run_id, *_), mj in by_key.items():
        found[run_id] = found.get(run_id, 0) + mj
    return found


def add_energy(connection: Connection, energy_mj: Mapping[str, int]) -> None:
    """Add energy that the ledger did not have, by run, in millijoules."""
    add_to(connection, energy_sums, sorted(energy_mj.items()))


def rebuild_bill_sums(connection: Connection) -> None:
    """Delete the sums and make them anew of the bills."""
    connection.execute(delete(bill_sums))
    connection.execute(delete(energy_sums))
    _write(connection, list(sums_of_rows(connection)))
    add_energy(connection, energy_of_rows(connection))


def sums_of_rows(connection: Connection) -> Iterator[BillSums]:
    """Yield what the bills of each run add up to, dropped ones too. Reads all that are left."""
    dropped = dropped_sums(connection)
    for sums in sums_where(connection, true()):
        before = dropped.pop(sums.run_id, None)
        yield sums if before is None else sums.with_more(before)
    yield from dropped.values()


def dropped_sums(connection: Connection) -> dict[str, BillSums]:
    """Return what the dropped bills of each run added up to."""
    return _sums_in(connection, dropped_bills)


def stored_sums(connection: Connection) -> dict[str, BillSums]:
    """Return what all bills of each run add up to, as it was kept with them."""
    return _sums_in(connection, bill_sums)


def _sums_in(connection: Connection, table: Table) -> dict[str, BillSums]:
    rows = connection.execute(select(*(table.c[name] for name in BillSums._fields)))
    return {row.run_id: BillSums._make(row) for row in rows}


def sums_where(connection: Connection, mine: ColumnElement[bool]) -> Iterator[BillSums]:
    """Yield what those bills of each run add up to that meet a condition on `requests`."""
    r = requests.c
    of_bill = [*(r[name] for name in (*_COVERED, *_COVERED_LATER)), r.gpu_time_ns]
    rows = connection.execute(
        select(*of_bill, PIECE_HOUR, *map(piece_amount, PIECE_AMOUNTS), PIECE_ERROR_NS)
        .select_from(with_pieces())
        .where(mine)
        .order_by(r.run_id, r.seq, PIECE_HOUR)
        .execution_options(yield_per=1_000)
    )
    for _, of_run in groupby(rows, itemgetter(0)):
        bills = (_of_rows(list(some)) for _, some in groupby(of_run, itemgetter(1)))
        yield reduce(BillSums.with_more, bills)


def energy_of_rows(connection: Connection) -> dict[str, int]:
    """Return what the known energies of each run's bills add up to, in mJ. Reads them all."""
    e = request_energy.c
    known = select(e.run_id, func.sum(e.energy_mj)).group_by(e.run_id)
    known = known.where(e.energy_mj.is_not(None))
    found = dropped_energy(connection)
    for run_id, mj in connection.execute(known):
        found[run_id] = found.get(run_id, 0) + int(mj)
    return found


def dropped_energy(connection: Connection) -> dict[str, int]:
    """Return what the known energies of each run's dropped bills added up to, in mJ."""
    d, g = dropped_hours.c, rollup_groups.c
    asked = (
        select(g.run_id, func.sum(d.energy_mj))
        .join_from(dropped_hours, rollup_groups, g.group_id == d.group_id)
        .where(d.energies > 0)
        .group_by(g.run_id)
    )
    return {run_id: int(mj) for run_id, mj in connection.execute(asked)}


def _of_part(part: EngineRequest) -> BillSums:
    bill, owner = part.bill, owner_columns(part.owner)
    started_at, finished_at = rfc3339(part.started_at_ns), rfc3339(part.finished_at_ns)
    covered = (
        *(bill.run_id, bill.seq, bill.request_id, part.http_request_id, part.response_id),
        *(part.prompt_group, owner["tenant"], owner["tenant_rule"], owner["tenant_above"]),
        *(owner["tags"], part.model, part.lora, part.route, bill.engine_status, bill.method),
        *(bill.prompt_tokens, bill.cached_tokens, bill.output_tokens, part.cost_nanousd),
        *(part.marginal_cost_nanousd, started_at, finished_at),
        *_later(bill.external_tokens, part.kv_role),
    )
    # A piece is its hour, the amounts in the order of PIECE_AMOUNTS, and the error of its charge.
    pieces = sorted(map(_known, bill.pieces))
    return BillSums(
        run_id=bill.run_id,
        bills=1,
        last_seq=bill.seq,
        gpu_time_ns=bill.gpu_time_ns,
        digest=_digest(covered, pieces),
        method=bill.method,
        started_at=started_at,
        finished_at=finished_at,
    )


def _of_rows(rows: Sequence[Sequence[Any]]) -> BillSums:
    """Return the sums of one bill by its rows, one for each piece; without a piece it has one."""
    width = len(_COVERED) + len(_COVERED_LATER)
    covered = dict(zip(_COVERED, rows[0], strict=False))
    covered["prompt_group"] = covered["prompt_group"] or covered["request_id"]
    later = _later(*rows[0][len(_COVERED) : width])
    pieces = [_known(row[width + 1 :]) for row in rows if row[width + 1] is not None]
    return BillSums(
        run_id=covered["run_id"],
        bills=1,
        last_seq=covered["seq"],
        gpu_time_ns=rows[0][width],
        digest=_digest((*covered.values(), *later), pieces),
        method=covered["method"],
        started_at=covered["started_at"],
        finished_at=covered["finished_at"],
    )


def _later(external_tokens: int | None, kv_role: str | None) -> tuple[Any, ...]:
    """Return what a digest covers of these two: nothing of a bill from before they were known."""
    return tuple(value for value in (external_tokens, kv_role) if value is not None)


def _known(piece: Sequence[Any]) -> tuple[int, ...]:
    """Return what is known of a piece: bills from before there were errors keep their digest."""
    return tuple(piece[:-1] if piece[-1] is None else piece)


def _digest(covered: tuple[Any, ...], pieces: Sequence[tuple[int, ...]]) -> int:
    """Return the digest of a bill. Raises TypeError for what no ledger can take."""
    text = orjson.dumps((covered, pieces))
    digest = hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()
    return int.from_bytes(digest) % DIGEST_MODULUS


def _write(connection: Connection, sums: Sequence[BillSums]) -> None:
    """Add sums to those of the ledger."""
    if not sums:
        return
    note(connection, bill_sums, sums)
    is_postgresql = connection.dialect.name == "postgresql"
    insert = (postgresql if is_postgresql else sqlite).insert(bill_sums)
    own, new = bill_sums.c, insert.excluded
    changed = {
        "bills": own.bills + new.bills,
        "last_seq": _greater(own.last_seq, new.last_seq),
        "gpu_time_ns": own.gpu_time_ns + new.gpu_time_ns,
        "digest": (own.digest + new.digest) % DIGEST_MODULUS,
        "method": _less(own.method, new.method),
        "started_at": _less(own.started_at, new.started_at),
        "finished_at": _greater(own.finished_at, new.finished_at),
    }
    statement = insert.on_conflict_do_update(index_elements=[own.run_id], set_=changed)
    connection.execute(statement, [one._asdict() for one in sums])


def _less(one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[Any]:
    return case((one <= other, one), else_=other)


def _greater(one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[Any]:
    return case((one >= other, one), else_=other)
