"""Facts about an engine that stay constant over one run: model, hardware, versions, method.

An identity is made once (`vllm_hooks/identity.py`) and rides in every snapshot. Each field is also
a column of the ledger's table `runs`, so a new fact about engines needs a field here and a column
there.

Invariant: two snapshots of one run have equal identities.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_cost_meter.version import __version__

# Who pays the time to compute again what a preemption threw away: the request that was preempted,
# or the operator.
VICTIM, OPERATOR = "victim", "operator"


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """An engine's model, hardware, host and versions, and the method that splits its steps.

    `parallelism` is e.g. "tp=2 pp=1 dp=1". `host` is the machine's name; prices may depend on it.
    `precision` is the number format it computes in, e.g. "bfloat16" or "bfloat16, fp8 weights".
    The KV cache has `kv_blocks` blocks with `kv_block_size` tokens each; both are None without a
    cache. `labels` are the operator's own, e.g. a pool. `native` is True if the native module
    splits the steps, False if its Python twin does. `preemption_paid_by` is VICTIM or OPERATOR.
    """

    model: str
    engine_index: int
    vllm_version: str
    hardware: str
    parallelism: str
    gpus: int
    method: str
    native: bool
    kv_blocks: int | None = None
    kv_block_size: int | None = None
    host: str = "unknown"
    precision: str = "unknown"
    meter_version: str = __version__
    labels: Mapping[str, str] = field(default_factory=dict)
    preemption_paid_by: str = VICTIM
