"""What an engine is: everything about it that is constant over one run.

It is made once (`vllm_hooks/identity.py`), rides in every snapshot, and its fields are columns of
the same names of the table `runs`: a new fact about an engine is a field here and a column there.

Invariant: two snapshots of one run have equal identities.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_cost_meter.version import __version__


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """An engine's model, hardware, host and versions, and how its steps are split.

    `parallelism` is e.g. "tp=2 pp=1 dp=1". `host` is the name of its machine, by which a price may
    be chosen. `precision` is what it computes in, e.g. "bfloat16" or "bfloat16, fp8 weights".
    Its KV cache has `kv_blocks` of `kv_block_size` tokens each, None where there is none.
    `labels` are what the operator declared of it, e.g. its pool.
    `native` tells that the native module splits the steps, and not its twin in Python.
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
