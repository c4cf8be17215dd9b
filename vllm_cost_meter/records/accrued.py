"""What a request used, as the attribution counts it: one tuple for the native part and its twin.

Every field adds up: over the pieces of a request, over requests, over hours. `recomputed`,
`rejected` and `cut` are parts of `prefill` and `decode` (or, of a draft, of either), never more.
"""

from operator import add
from typing import NamedTuple


class Accrued(NamedTuple):
    """GPU time in GPU-ns and tokens computed, by phase; time and tokens add up to the steps'.

    `marginal_ns` is what the steps would have saved without the request, by the cost model.
    Recomputed is what a preemption threw away and had done again; rejected is what drafts cost that
    were not accepted; cut is what was computed for the output and is not in it: behind its end, or
    of a request that was aborted meanwhile. `kv_block_ns` is the blocks of the KV cache that it
    held x wall time, at most 2**63 - 1; `step_ns` is what its steps took in all, of which it has
    its share. `batch` is the sum, over its steps, of the requests in the step.
    """

    prefill_ns: int = 0
    decode_ns: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    marginal_ns: int = 0
    recomputed_ns: int = 0
    recomputed_tokens: int = 0
    rejected_ns: int = 0
    rejected_tokens: int = 0
    cut_ns: int = 0
    cut_tokens: int = 0
    kv_block_ns: int = 0
    step_ns: int = 0
    steps: int = 0
    batch: int = 0

    @property
    def gpu_time_ns(self) -> int:
        return self.prefill_ns + self.decode_ns

    def plus(self, other: "Accrued") -> "Accrued":
        return Accrued(*map(add, self, other))
