"""Records of simulated engines: bills with their replies, snapshots, and open requests.

Invariant: each record has a value of its own, so a ledger that mixes two of them up is found out.
"""

from dataclasses import replace
from random import Random

from tests.support.builders import HOUR, T0, make_bill, make_open, make_part, make_snapshot
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Usage
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot

# No entry of a journal can hold it, and no ledger the other.
UNWRITABLE, TOO_LARGE_COST = 2**70, 2**63
_PART = make_part(make_bill())
_OPEN = make_open()
_SNAPSHOT = make_snapshot(cost_models=())
_HTTP = HttpRequest(
    "h", None, None, Owner("alice"), "m", "/v1/completions", 200, False, Usage(10, 2, 5), 300, 7,
    T0, T0 + 5,
)  # fmt: skip


def _name(run_id: str, seq: int) -> str:
    """Return an id of a request: with digits, which SQLite stores as bytes."""
    return f"{run_id}-{seq:08x}"


class Engine:
    """An engine: it numbers its bills, and says now and then what it has billed in all."""

    def __init__(self, run_id: str, bad_share: float) -> None:
        self.run_id = run_id
        self._bad_share = bad_share
        self._seq = 0
        self._snapshots = 0
        self._billed_ns = 0
        # Whether the next request was said to run.
        self._is_announced = False
        self._said: list[Record] = []

    def next_records(self, random: Random) -> list[Record]:
        """Return what the end of a request gives to a server."""
        kind = random.random()
        if kind < 0.1:
            self._said = [self._snapshot()]
        elif kind < 0.15:
            name = _name(self.run_id, self._seq + 1)
            self._is_announced = True
            self._said = [replace(_OPEN, request_id=name, external_id=name)]
        elif kind > 0.97 and self._said:
            pass  # As after a reconnection: the same again.
        else:
            self._said = self._request(random)
        return self._said

    def _request(self, random: Random) -> list[Record]:
        self._seq += 1
        seq, ns = self._seq, random.randrange(1, 10**9)
        name = _name(self.run_id, seq)
        self._billed_ns += ns
        bill = _PART.bill._replace(
            run_id=self.run_id, seq=seq, request_id=name, pieces=(UsagePiece(HOUR, ns, 0, 8, 5),)
        )
        cost = random.randrange(10**6)
        if random.random() < self._bad_share:
            cost = random.choice((UNWRITABLE, TOO_LARGE_COST))
        text = "r" * random.choice((0, 0, 0, 10, 100, 3000))
        part = EngineRequest(
            bill, name, None, None, name, _PART.owner, "m", None, f"/v1/{text}", cost, None, T0,
            T0 + seq, _PART.latencies, self._is_announced,
        )  # fmt: skip
        self._is_announced = False
        return [part, replace(_HTTP, http_request_id=name, gpu_time_ns=ns, cost_nanousd=seq)]

    def _snapshot(self) -> Snapshot:
        self._snapshots += 1
        totals = ClassTotals(requests=self._billed_ns, idle=self._snapshots)
        return replace(
            _SNAPSHOT, run_id=self.run_id, number=self._snapshots, totals=totals,
            wall_ns=totals.total(), last_seq=self._seq, billed_ns=self._billed_ns,
            hours={HOUR: totals},
        )  # fmt: skip
