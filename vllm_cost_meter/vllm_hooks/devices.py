"""Which GPUs are an engine's own, by the rules of vLLM's workers.

Each worker takes the visible GPU whose ordinal is its rank within the engine, after those of the
engines of lower rank on the same host (vllm/v1/worker/gpu_worker.py, `init_device`); `--device-ids`
names others (`assigned_physical_gpu_ids`). Where the workers were placed by somebody else, e.g. by
Ray, the engine process does not know their GPUs, and an energy of others would be worse than none.

Invariant: the ordinals are all of the engine's GPUs, or none with the reason.
"""

import os
from typing import Any


def gpu_ordinals(parallel_config: Any) -> tuple[list[int], str | None]:
    """Return the CUDA ordinals of one engine's GPUs; none, and why, where they are not known."""
    from vllm.platforms import current_platform  # heavy; engine only

    if not current_platform.is_cuda():
        return [], f"vLLM runs on {current_platform.device_name}, not on NVIDIA GPUs"
    if (elsewhere := _placed_elsewhere(parallel_config)) is not None:
        return [], elsewhere
    gpus = parallel_config.world_size
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    rank = getattr(parallel_config, "data_parallel_rank_local", None)
    if rank is None:
        rank = getattr(parallel_config, "data_parallel_index", parallel_config.data_parallel_rank)
    if visible and len(visible.split(",")) == gpus:
        rank = 0  # it was cut to this engine's GPUs
    ordinals = list(range(rank * gpus, (rank + 1) * gpus))
    assigned = getattr(parallel_config, "assigned_physical_gpu_ids", None)
    if assigned is None:
        return ordinals, None
    # Indices of the machine's GPUs; CUDA counts the visible ones.
    named = [assigned[ordinal] for ordinal in ordinals]
    if visible:
        physical = [
            current_platform.device_control_id_to_physical_device_id(entry)
            for entry in visible.split(",")
        ]
        named = [physical.index(gpu) for gpu in named]
    return named, None


def _placed_elsewhere(parallel_config: Any) -> str | None:
    """Say who placed the workers, if it was not vLLM's own executor on this host."""
    backends = (
        getattr(parallel_config, "distributed_executor_backend", None),
        getattr(parallel_config, "data_parallel_backend", None),
    )
    for backend in backends:
        if backend in ("ray", "external_launcher"):
            return f"the engine's GPUs were chosen by the backend {backend}"
    if getattr(parallel_config, "nnodes_within_dp", 1) > 1:
        return "some of the engine's GPUs are on other hosts"
    return None
