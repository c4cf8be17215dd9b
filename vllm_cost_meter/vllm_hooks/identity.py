"""Make an engine's meter, and read its model, hardware, parallelism, host and precision from vLLM.

Invariant: nothing here changes vLLM. If an engine's GPUs cannot be found, it is metered without
their energy.
"""

import platform
from pathlib import Path
from typing import Any

from vllm_cost_meter.attribution import NATIVE
from vllm_cost_meter.config.engine import load_engine_settings
from vllm_cost_meter.engine.energy.nvml import EnergyCounter
from vllm_cost_meter.engine.meter import EngineMeter
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.engine import EngineIdentity

logger = meter_logger()


def make_engine_meter(scheduler: Any) -> EngineMeter:
    """Make the meter of one engine from its scheduler's configuration."""
    from vllm.version import __version__ as vllm_version  # Only engines need it.

    from vllm_cost_meter.vllm_hooks.model_counts import prior_of_model  # Only engines need it.

    settings = load_engine_settings()
    config = scheduler.vllm_config
    parallel = config.parallel_config
    engine = EngineIdentity(
        model=model_name(config),
        engine_index=getattr(parallel, "data_parallel_index", parallel.data_parallel_rank),
        vllm_version=vllm_version,
        hardware=device_name(),
        parallelism=f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}"
        f" dp={parallel.data_parallel_size}",
        gpus=parallel.world_size,
        method=settings.method,
        native=NATIVE,
        kv_blocks=scheduler.kv_cache_config.num_blocks or None,
        kv_block_size=scheduler.block_size or None,
        host=host_name() or "unknown",
        precision=precision_of(config),
        labels=settings.labels,
        preemption_paid_by=settings.preemption_paid_by,
    )
    meter = EngineMeter(
        engine=engine,
        prior=prior_of_model(config, engine.hardware),
        step_log=Path(settings.step_log) if settings.step_log else None,
        energy=_energy_counter(parallel),
    )
    logger.info(
        "cost meter: engine %d is metered (%s, %d GPU, method %s, run %s)",
        engine.engine_index,
        type(scheduler).__name__.removeprefix("Metered"),
        engine.gpus,
        engine.method,
        meter.run_id,
    )
    return meter


def _energy_counter(parallel: Any) -> EnergyCounter:
    """Make the energy counter of the engine's GPUs. Never raises; metering goes on without it."""
    try:
        from vllm_cost_meter.vllm_hooks import devices  # Only engines need it.

        ordinals, why_none = devices.gpu_ordinals(parallel)
    except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
        ordinals, why_none = [], f"the engine's GPUs could not be found out: {error!r}"
    return EnergyCounter(ordinals, why_none=why_none)


def host_name() -> str:
    """Return the name of this machine, or an empty text if it has none."""
    return platform.node()


def device_name() -> str:
    """Return the name of the GPU, or of the CPU if vLLM runs on that."""
    from vllm.platforms import current_platform  # Only engines and API servers need it.

    if current_platform.is_cpu():
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return str(current_platform.get_device_name())


def precision_of(vllm_config: Any) -> str:
    """Return an engine's data type and the quantization of weights and cache, as one text."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    # This text is only shown, so an engine is metered without it too.
    parts = [str(getattr(model, "dtype", "unknown")).removeprefix("torch.")]
    if quantization := getattr(model, "quantization", None):
        parts.append(f"{quantization} weights")
    if (cache_dtype := getattr(cache, "cache_dtype", "auto")) != "auto":
        parts.append(f"{cache_dtype} KV cache")
    return ", ".join(parts)


def model_name(vllm_config: Any) -> str:
    """Return the first served model name of a vLLM configuration."""
    name = vllm_config.model_config.served_model_name
    return str(name[0] if isinstance(name, list) else name)
