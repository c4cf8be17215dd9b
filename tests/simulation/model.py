"""What clients were told, as plain lists, and whether the ledger has it in the end.

It knows nothing of journals but their names and the numbers of their records: the numbers go up by
one with each record that a process could encode, in the order in which they were handed over.

Invariant: `complaints` is empty if and only if the promise was kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from tests.simulation.ledgers import TOO_LARGE, Key, bill_of, key_of
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.records.requests import EngineRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot


class Ledger(Protocol):
    """What the model reads of a ledger."""

    rows: dict[Key, Record]
    # How many records after which one of which journal.
    losses: dict[tuple[str, int], int]


@dataclass(slots=True, eq=False)
class Told:
    """A record that is safe, as its process said."""

    record: Record
    # Of the process that said so.
    journals: list[str]
    number: int
    # No ledger can take it.
    is_bad: bool
    # A crash of the machine may have taken it.
    may_be_lost: bool = False


@dataclass(slots=True)
class Model:
    """All that was made, all that was told, and what may have happened to it."""

    to_disk: bool
    made: dict[Key, list[Record]] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    bad: int = 0
    crashes: int = 0
    damaged: int = 0

    def make(self, record: Record) -> None:
        self.made.setdefault(key_of(record), []).append(record)
        self.bad += is_bad(record)

    def crash(self, ledger: Ledger) -> None:
        """Note what a crash of the machine took: nothing that the disk was asked to keep."""
        self.crashes += 1
        if not self.to_disk:
            for told in self.told:
                told.may_be_lost = told.may_be_lost or not self._is_there(ledger, told.record)

    def missing(self, ledger: Ledger, told: Iterable[Told]) -> list[str]:
        """Return what was told, and is neither in the ledger nor named as lost."""
        found = []
        for each in told:
            if self._is_there(ledger, each.record) or each.may_be_lost:
                continue
            if (each.is_bad or self.damaged) and _is_named(ledger, each):
                continue
            if self.damaged and not self._is_more_there(ledger, each):
                continue  # A damaged end looks like a write that never ended.
            found.append(f"told and not there: {key_of(each.record)}, record {each.number}")
        return found

    def _is_more_there(self, ledger: Ledger, told: Told) -> bool:
        return any(
            each.journals is told.journals
            and each.number > told.number
            and self._is_there(ledger, each.record)
            for each in self.told
        )

    @staticmethod
    def _is_there(ledger: Ledger, record: Record) -> bool:
        there = ledger.rows.get(key_of(record))
        if isinstance(record, OpenRequest) and there is None:
            return bill_of(record) in ledger.rows
        if isinstance(record, Snapshot) and isinstance(there, Snapshot):
            return there.number >= record.number
        return there is not None

    def complaints(self, ledger: Ledger) -> list[str]:
        """Return each way in which the books are wrong."""
        found = self.missing(ledger, self.told)
        for key, record in ledger.rows.items():
            if record not in self.made.get(key, ()):
                found.append(f"nobody made {key} like this: {record}")
            if isinstance(record, OpenRequest) and bill_of(record) in ledger.rows:
                found.append(f"both billed and open: {key}")
        found += self._wrong_losses(ledger)
        found += _wrong_sums(ledger)
        return found

    def _wrong_losses(self, ledger: Ledger) -> list[str]:
        """Return the losses that have no cause: of one record each, and a bad one."""
        if self.crashes or self.damaged:
            return []
        good = {(journal_id, each.number) for each in self.told if not each.is_bad
                for journal_id in each.journals}  # fmt: skip
        return [
            f"lost without a cause: {records} records after {after} of {journal_id}"
            for (journal_id, after), records in ledger.losses.items()
            if records != 1 or (journal_id, after + 1) in good or not self.bad
        ]


def is_bad(record: Record) -> bool:
    """Return whether no ledger can take a record."""
    return isinstance(record, EngineRequest) and (record.cost_nanousd or 0) >= TOO_LARGE


def _is_named(ledger: Ledger, told: Told) -> bool:
    return any(
        journal_id in told.journals and after < told.number <= after + records
        for (journal_id, after), records in ledger.losses.items()
    )


def _wrong_sums(ledger: Ledger) -> list[str]:
    """Return where a snapshot's books do not agree with the bills that it covers."""
    found = []
    bills: dict[str, dict[int, int]] = {}
    for record in ledger.rows.values():
        if isinstance(record, EngineRequest):
            bills.setdefault(record.bill.run_id, {})[record.bill.seq] = record.bill.gpu_time_ns
    for record in ledger.rows.values():
        if isinstance(record, Snapshot):
            covered = {s: ns for s, ns in bills.get(record.run_id, {}).items()
                       if s <= record.last_seq}  # fmt: skip
            total = sum(covered.values())
            if total > record.billed_ns or (
                len(covered) == record.last_seq and total != record.billed_ns
            ):
                found.append(f"run {record.run_id}: {total} billed, snapshot {record.billed_ns}")
    return found
