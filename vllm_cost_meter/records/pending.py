"""A bill that an API server has handed to its journal and not yet seen counted in the ledger.

Budgets add it to what the ledger says. It has no more than that needs.

Invariant: `run_id` and `seq` identify it, as they do in the ledger.
"""

from typing import Self

import msgspec

from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest


class PendingBill(msgspec.Struct, frozen=True, array_like=True):
    """Whose bill it is, and its GPU time and KV residency by UTC hour since the epoch.

    GPU time is in nanoseconds, and KV residency in blocks x milliseconds.
    """

    run_id: str
    seq: int
    request_id: str
    tenant: str
    above: tuple[str, ...]
    tags: dict[str, str]
    gpu_time_ns: dict[int, int]
    kv_block_ms: dict[int, int]

    @classmethod
    def of(cls, part: EngineRequest) -> Self:
        """Return what budgets need of a billed engine request."""
        bill, owner = part.bill, part.owner
        times: dict[int, int] = {}
        blocks: dict[int, int] = {}
        for piece in bill.pieces:
            times[piece.hour] = times.get(piece.hour, 0) + piece.gpu_time_ns
            blocks[piece.hour] = blocks.get(piece.hour, 0) + piece.kv_block_ms
        key = (bill.run_id, bill.seq, bill.request_id)
        return cls(*key, owner.tenant, owner.above, dict(owner.tags), times, blocks)

    @property
    def owner(self) -> Owner:
        """The owner, with the fields that budgets need."""
        parent, *higher = self.above or (None,)
        return Owner(self.tenant, parent=parent, tags=self.tags, higher=tuple(map(str, higher)))
