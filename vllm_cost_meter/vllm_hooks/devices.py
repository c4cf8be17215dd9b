"""Find the GPUs that belong to an engine, by the rules of vLLM's workers.

The visible GPUs are dealt out in order: first those of the engines with lower rank on the same
host, then one for each worker of this engine by rank (vllm/v1/worker/gpu_worker.py, `init_device`).
`--device-ids` names other GPUs (`assigned_physical_gpu_ids`). If somebody else placed the workers,
e.g. Ray, the engine process does not know their GPUs. We then report none, because the energy of
other GPUs would be worse than no energy.

Invariant: the ordinals are all of the engine's GPUs, or none with the reason.
"""

import os
from typing import Any


def gpu_ordinals(parallel_config: Any) -> tuple[list[int], str | None]:
    """Return the CUDA ordinals of an engine's GPUs; if they are unknown, none and the reason."""
    from vllm.platforms import current_platform  # a heavy import that only engines need

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
        rank = 0  # The variable was already cut to this engine's GPUs.
    ordinals = list(range(rank * gpus, (rank + 1) * gpus))
    assigned = getattr(parallel_config, "assigned_physical_gpu_ids", None)
    if assigned is None:
        return ordinals, None
    # vLLM assigns indices of the machine's GPUs, but CUDA counts only the visible ones.
    named = [assigned[ordinal] for ordinal in ordinals]
    if visible:
        physical = [
            current_platform.device_control_id_to_physical_device_id(entry)
            for entry in visible.split(",")
        ]
        named = [physical.index(gpu) for gpu in named]
    return named, None


def _placed_elsewhere(parallel_config: Any) -> str | None:
    """Return who placed the workers, or None if vLLM's own executor on this host did."""
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
