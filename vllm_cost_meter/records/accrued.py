"""GPU time and tokens that a request has used so far: one tuple for native code and Python twin.

Every field adds up: over the pieces of a request, over requests, over hours. `recomputed`,
`rejected` and `cut` are already contained in `prefill` and `decode`; do not add them again. Where
the operator pays preemptions, `recomputed_ns` stands beside `prefill_ns` instead.
"""

from operator import add
from typing import NamedTuple


class Accrued(NamedTuple):
    """GPU time in GPU-ns and computed tokens, by phase; over all requests they equal the steps'.

    - `marginal_ns`: GPU time that the steps would have saved without the request, as the cost
      model predicts it.
    - `recomputed`: work that was repeated because a preemption threw it away.
    - `rejected`: work for draft tokens that were not accepted.
    - `cut`: work for output tokens that nobody got, because the request had ended before them or
      was aborted during the step.
    - `kv_block_ns`: blocks of the KV cache held, times wall time; at most 2**63 - 1.
    - `step_ns`: the full GPU time of all its steps, of which the request pays its share.
    - `batch`: the number of requests in a step, summed over the request's steps.
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
