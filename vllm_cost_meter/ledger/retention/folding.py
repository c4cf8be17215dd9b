"""What rows that are about to be dropped add up to, put into the tables of retention.

The amounts are those that `rollups/adding.py` has put into the sums, so the sums stay as they are.
Beside them stands what questions read from rows alone: the energy of bills, and of how many of them
it is unknown.

Invariant: rows and what is folded, together, answer as the rows did before.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import RowMapping, Select, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.adding import ExchangeFacts
from vllm_cost_meter.ledger.rollups.exchanges import PartFacts, ended_of
from vllm_cost_meter.ledger.rollups.groups import Group, group_id_of
from vllm_cost_meter.ledger.rollups.histograms import Counted
from vllm_cost_meter.ledger.rollups.upserts import add_to, in_chunks, insert_new
from vllm_cost_meter.ledger.schema import (
    ENDED_AMOUNTS,
    SUMMED_AMOUNTS,
    dropped_hours,
    dropped_latencies,
    dropped_unknown_energy,
    request_energy,
    requests,
    rollup_groups,
)
from vllm_cost_meter.ledger.tables.pieces import PIECE_HOUR, summed_amount, with_pieces

# The hour of a bill that has none: it never used a GPU. No window has it.
NO_HOUR = -(1 << 31)
_AMOUNTS = (*SUMMED_AMOUNTS, *ENDED_AMOUNTS, "arrivals", "energy_mj", "energies")
_ARRIVALS, _ENERGY_MJ, _ENERGIES = range(len(_AMOUNTS) - 3, len(_AMOUNTS))

KeyOfBill = tuple[str, int]


class _Energy(NamedTuple):
    """What is known of a bill's energy: mJ by hour, and the hours in which it is unknown."""

    known: Mapping[int, int]
    unknown: Sequence[int]


@dataclass(slots=True)
class Folded:
    """What exchanges add up to."""

    groups: dict[int, Group] = field(default_factory=dict)
    hours: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    unknown: dict[tuple[int, int, int], int] = field(default_factory=lambda: defaultdict(int))
    counted: dict[str, Counted] = field(default_factory=lambda: defaultdict(Counted))

    def write(self, connection: Connection) -> None:
        """Add all of it to the tables of retention."""
        insert_new(
            connection, rollup_groups, [(id, *group) for id, group in sorted(self.groups.items())]
        )
        add_to(connection, dropped_hours, _rows(self.hours))
        add_to(
            connection,
            dropped_unknown_energy,
            [(*key, bills) for key, bills in sorted(self.unknown.items()) if bills],
        )
        latencies = [
            (*bucket, run_id, *both)
            for run_id, counted in self.counted.items()
            for bucket, both in counted.buckets().items()
        ]
        add_to(connection, dropped_latencies, sorted(latencies))

    def _amounts(self, hour: int, group: Group) -> list[int]:
        id = group_id_of(group)
        self.groups[id] = group
        return self.hours.setdefault((hour, id), [0] * len(_AMOUNTS))

    def add_exchange(self, exchange: ExchangeFacts) -> None:
        """Add what an exchange counts for as one: requests, tokens, arrival and latencies."""
        reply, parts = exchange
        for ended in ended_of(reply, parts):
            amounts = self._amounts(ended.hour, ended.group)
            for place, amount in enumerate(ended[2:], len(SUMMED_AMOUNTS)):
                amounts[place] += amount
        if parts:
            first = min(parts, key=lambda part: part.run_id).group
            self.counted[first.run_id].add(reply, parts)
            self._amounts(min(part.started_hour for part in parts), first)[_ARRIVALS] += 1

    def add_bill(
        self, part: PartFacts, pieces: Sequence[RowMapping], energies: Mapping[int, Any]
    ) -> None:
        """Add a bill's pieces and its energy."""
        for piece in pieces:
            amounts = self._amounts(int(piece["hour"]), part.group)
            for place, name in enumerate(SUMMED_AMOUNTS):
                amounts[place] += int(piece[name])
        energy = _energy_of([int(piece["hour"]) for piece in pieces], energies)
        for hour, mj in energy.known.items():
            amounts = self._amounts(hour, part.group)
            amounts[_ENERGY_MJ] += mj
            amounts[_ENERGIES] += 1
        id = group_id_of(part.group)
        self.groups[id] = part.group
        for hour in energy.unknown:
            self.unknown[hour, hour, id] += 1
        for hour, later in pairwise(energy.unknown):
            self.unknown[hour, later, id] -= 1


def _energy_of(hours: Sequence[int], energies: Mapping[int, Any]) -> _Energy:
    """Return a bill's energy; while none was told, it is unknown in the hours of its time."""
    known = {hour: int(mj) for hour, mj in energies.items() if mj is not None}
    unknown = sorted(energies.keys() - known.keys()) if energies else sorted(hours)
    is_without = not energies or unknown
    return _Energy(known, unknown if hours else [NO_HOUR] if is_without else [])


def _rows(hours: Mapping[tuple[int, int], Sequence[int]]) -> list[tuple[int, ...]]:
    return [(*key, *amounts) for key, amounts in sorted(hours.items())]


def fold(connection: Connection, exchanges: Sequence[ExchangeFacts]) -> Folded:
    """Return what exchanges and their bills add up to, read from the rows."""
    bills = [part for _, parts in exchanges for part in parts]
    keys: dict[str, list[int]] = defaultdict(list)
    for part in bills:
        keys[part.run_id].append(part.seq)
    pieces = _by_bill(connection, _PIECES, keys)
    energies = _by_bill(connection, _ENERGY_ROWS, keys)
    folded = Folded()
    for exchange in exchanges:
        folded.add_exchange(exchange)
    for part in bills:
        key = part.run_id, part.seq
        used = {int(row["hour"]): row["energy_mj"] for row in energies.get(key, ())}
        folded.add_bill(part, pieces.get(key, ()), used)
    return folded


_PIECES: Select[Any] = (
    select(
        *(requests.c.run_id, requests.c.seq, PIECE_HOUR.label("hour")),
        *(summed_amount(name).label(name) for name in SUMMED_AMOUNTS),
    )
    .select_from(with_pieces())
    .where(PIECE_HOUR.is_not(None))
)
_ENERGY_ROWS: Select[Any] = select(request_energy)


def _by_bill(
    connection: Connection, rows: Select[Any], keys: Mapping[str, Sequence[int]]
) -> dict[KeyOfBill, list[RowMapping]]:
    """Return the rows of a query that begin with (run, number) of these bills, by bill."""
    run, number, *_ = rows.selected_columns
    found: dict[KeyOfBill, list[RowMapping]] = {}
    for run_id, seqs in keys.items():
        for some in in_chunks(seqs):
            asked = rows.where(run == run_id, number.in_(some))
            for row in connection.execute(asked).mappings():
                found.setdefault((run_id, int(row["seq"])), []).append(row)
    return found
